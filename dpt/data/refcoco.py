"""Referring expressions: MDETR's annotations of RefCOCO, RefCOCO+ and RefCOCOg, one image entry an expression.

Boxes are normalised cxcywh.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpt.data.coco import read_json


@dataclass(frozen=True)
class ReferredImage:
    """An image file, an expression, the boxes it refers to, (N, 4), and each box's [begin, end) character spans."""

    id: int
    path: Path
    expression: str
    boxes: np.ndarray
    tokens_positive: tuple[tuple[tuple[int, int], ...], ...]


def load_expressions(annotations: Path, images: Path) -> list[ReferredImage]:
    """All expressions of a `finetune_*.json`, with their boxes cut to the image.

    Crowds are left out, and boxes without area, as the reference does.

    Raises:
        ValueError: unreadable, or no such file; the message names it.
    """
    content = read_json(annotations)
    try:
        boxes: dict[int, list[dict]] = {}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd"):
                boxes.setdefault(annotation["image_id"], []).append(annotation)
        ids = [entry["id"] for entry in content["images"]]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{len(ids) - len(set(ids))} ids of expressions occur twice")
        return [_referred(entry, boxes.get(entry["id"], []), images) for entry in content["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{annotations} is no REC annotation file: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from error


def _referred(entry: dict, annotations: list[dict], images: Path) -> ReferredImage:
    """Raises ValueError for an entry whose boxes or spans are not of the format."""
    for annotation in annotations:
        box, spans = annotation["bbox"], annotation["tokens_positive"]
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        if not numbers or not all(len(span) == 2 and 0 <= span[0] <= span[1] for span in spans):
            raise ValueError(f"expression {entry['id']} has bbox {box} and tokens_positive {spans}")
    if entry["width"] <= 0 or entry["height"] <= 0:
        raise ValueError(f"expression {entry['id']} is of an image of {entry['width']} x {entry['height']} pixels")
    scale = np.array([entry["width"], entry["height"]] * 2, float)
    xywh = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1) / scale
    corners = corners.clip(0, 1)
    cxcywh = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    kept = (cxcywh[:, 2:] > 0).all(1)
    spans = tuple(
        tuple((int(begin), int(end)) for begin, end in annotation["tokens_positive"])
        for annotation, keep in zip(annotations, kept, strict=True)
        if keep
    )
    return ReferredImage(entry["id"], images / entry["file_name"], entry["caption"], cxcywh[kept], spans)
