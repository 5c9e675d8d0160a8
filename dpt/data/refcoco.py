"""Referring expressions: MDETR's annotations of RefCOCO, RefCOCO+ and RefCOCOg, with one image entry for each.

Boxes are normalised cxcywh.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from dpt.data.coco import Annotations, Id, Name, Side, first_of, image_path, read_annotations, stable_id

Coordinate = Annotated[float, Meta(ge=-1_000_000, le=1_000_000)]
Place = Annotated[int, Meta(ge=0, le=100_000)]
"""a character's, in an expression"""


class Expression(Struct, gc=False):
    """An expression and the image that it is of."""

    id: Id
    file_name: Name
    width: Side
    height: Side
    caption: str


class ExpressionBox(Struct, gc=False):
    """A box (x, y, width, height) in pixels, and the [begin, end) spans of characters that name it."""

    image_id: Id
    bbox: tuple[Coordinate, Coordinate, Coordinate, Coordinate]
    tokens_positive: list[tuple[Place, Place]]
    iscrowd: int | bool | None = 0
    id: Id | None = None

    def __post_init__(self):
        if any(begin > end for begin, end in self.tokens_positive):
            raise ValueError("tokens_positive: a span ends before it begins")


@dataclass(frozen=True)
class ReferredImage:
    """An image file, an expression, the boxes it refers to, (N, 4), and each box's [begin, end) character spans."""

    id: int
    path: Path
    expression: str
    boxes: np.ndarray
    tokens_positive: tuple[tuple[tuple[int, int], ...], ...]


def read_expressions(path: Path) -> tuple[Annotations[Expression, ExpressionBox], list[str]]:
    """A `finetune_*.json`, and the problems of records that do not fit; see `read_annotations`."""
    return read_annotations(path, Expression, ExpressionBox, kind="REC annotation", noun="expression")


def load_expressions(annotations: Path, images: Path) -> list[ReferredImage]:
    """All expressions of a `finetune_*.json`, with their boxes cut to the image.

    Crowds are left out, and boxes without area, as the reference does.

    Raises:
        ValueError: the file cannot be read, or its boxes do not belong to its expressions; it is named.
    """
    content, problems = read_expressions(annotations)
    if problems:
        raise ValueError(f"{annotations} is no REC annotation file: {first_of(problems)}")
    row = {stable_id(image.id): k for k, image in enumerate(content.images)}
    if len(row) < len(content.images):
        raise ValueError(f"{annotations}: {len(content.images) - len(row)} ids of expressions occur twice")
    boxes = [box for box in content.annotations if not box.iscrowd]
    rows = np.array([row.get(stable_id(box.image_id), -1) for box in boxes], int)
    _check_matching(annotations, content, rows)
    return list(_referred(content.images, boxes, rows, images))


def _check_matching(path: Path, content: Annotations, rows: np.ndarray) -> None:
    """Raises ValueError where boxes of unknown images leave expressions without any."""
    of = {stable_id(box.image_id) for box in content.annotations}
    bare = [str(image.id) for image in content.images if stable_id(image.id) not in of]
    if (rows < 0).any() and bare:
        known = {stable_id(image.id) for image in content.images}
        unknown = [str(box.image_id) for box in content.annotations if stable_id(box.image_id) not in known]
        raise ValueError(
            f"{path}: boxes of image_id {first_of(unknown)}, belong to no expression, and expression {first_of(bare)}, "
            "has no box: ids and image_ids do not match"
        )
    if len(bare) == len(content.images) > 0:
        raise ValueError(f"{path}: no expression has a box")


def _referred(
    entries: list[Expression], boxes: list[ExpressionBox], rows: np.ndarray, images: Path
) -> Iterator[ReferredImage]:
    """Expressions with their boxes, in the files' order."""
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] >= 0]
    xywh = np.array([boxes[k].bbox for k in order], float).reshape(-1, 4)
    scale = np.array([(entries[row].width, entries[row].height) * 2 for row in rows[order]], float).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1) / scale
    corners = corners.clip(0, 1)
    cxcywh = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    order, cxcywh = (part[(cxcywh[:, 2:] > 0).all(1)] for part in (order, cxcywh))
    ends = np.searchsorted(rows[order], np.arange(len(entries) + 1)).tolist()
    for entry, begin, end in zip(entries, ends[:-1], ends[1:], strict=True):
        spans = tuple(tuple(boxes[k].tokens_positive) for k in order[begin:end])
        path = image_path(images, entry.file_name)
        yield ReferredImage(stable_id(entry.id), path, entry.caption, cxcywh[begin:end], spans)
