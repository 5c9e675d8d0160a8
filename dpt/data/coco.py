"""COCO's images and annotation files, in the layouts that users have.

Images are resized to a square without keeping the aspect, as the paper trains on them.
"""

import hashlib
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from PIL import Image

from dpt.files import in_words, read_bytes, read_text
from dpt.images import upright_rgb

Id = int | str
"""an image's, an expression's; text too, such as "img-64" """
Name = Annotated[str, Meta(min_length=1)]
Side = Annotated[float, Meta(gt=0, le=1_000_000)]
"""pixels"""


class CocoImage(Struct, gc=False):
    """An image of a caption file."""

    id: Id
    file_name: Name
    width: Side | None = None
    height: Side | None = None


class CocoCaption(Struct, gc=False):
    image_id: Id
    caption: str
    id: Id | None = None


I = TypeVar("I")  # noqa: E741
A = TypeVar("A")


class Annotations(Struct, Generic[I, A]):
    """A COCO-style file."""

    images: list[I]
    annotations: list[A]


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and one of its captions."""

    path: Path
    caption: str


def read_coco_json(path: Path):
    """The contents of a JSON file, NaN allowed. Raises ValueError naming the file where it is none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is no valid JSON (nested too deeply): get the file again") from error
    except ValueError as error:  # a JSONDecodeError, or an integer of more digits than Python reads
        if text.lstrip().startswith("<"):
            raise ValueError(f"{path} is a web page, not JSON: download the file itself") from error
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{path} is no valid JSON ({where}): get the file again") from error


def read_annotations(
    path: Path, image: type[I], annotation: type[A], *, kind: str, noun: str
) -> tuple[Annotations[I, A], list[str]]:
    """A COCO-style file without the records that do not fit, and the problems of those records.

    Args:
        kind: name of the kind of file, for errors.
        noun: the thing that an id identifies, for errors.

    Raises:
        ValueError: the file is no JSON, or lacks lists of images and annotations; it is named.
    """
    schema = Annotations[image, annotation]
    try:
        return msgspec.json.decode(read_bytes(path), type=schema), []
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass  # read again in a slower way, to say what is wrong with which record
    content, problems = read_coco_json(path), []
    try:
        outline = msgspec.convert(content, Annotations[dict, dict])
    except msgspec.ValidationError as error:
        raise ValueError(f"{path} is no {kind} file: {in_words(str(error))}") from error
    images = _fitting(outline.images, image, "id", noun, problems)
    return Annotations(images, _fitting(outline.annotations, annotation, "image_id", noun, problems)), problems


def _fitting(records: list[dict], schema: type, key: str, noun: str, problems: list[str]) -> list:
    fitting = []
    for record in records:
        try:
            fitting.append(_plain(msgspec.convert(record, schema)))
        except ValueError as error:  # a ValidationError is one
            reason = in_words(str(error))
            field = reason.partition(":")[0].partition("[")[0]
            value = f" ({field} is {reprlib.repr(record[field])})" if field in record else ""
            problems.append(f"{noun} {reprlib.repr(record.get(key))}: {reason}{value}")
    return fitting


def _plain(record: Struct) -> Struct:
    """The record. Raises ValueError where one of its texts holds half a character."""
    for name in record.__struct_fields__:
        if isinstance(value := getattr(record, name), str):
            check_characters(name, value)
    return record


def check_characters(name: str, text: str) -> str:
    """The text. Raises ValueError where it holds a lone surrogate, half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: half a character (a lone surrogate, \\u{ord(text[error.start]):x})") from error
    return text


def stable_id(value: Id) -> int:
    """A number for an id, the same on every machine: the id itself if it is a number (also as text), else its hash."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 19 and str(int(value)) == value:
        value = int(value)
    if isinstance(value, int) and 0 <= value < 2**63:
        return value
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:7], "big")


def base_name(file_name: str) -> str:
    """The name of an image file without folders. Annotation files may separate folders by either slash."""
    return file_name.replace("\\", "/").rpartition("/")[2]


def image_path(folder: Path, file_name: str) -> Path:
    """The path of an image that an annotation file names: with its subfolders below the folder, or directly in it."""
    written = folder / file_name.replace("\\", "/")
    name = base_name(file_name)
    return written if name == file_name or written.exists() else folder / name


def read_captions(path: Path) -> tuple[Annotations[CocoImage, CocoCaption], list[str]]:
    """A `captions_*.json`, and the problems of records that do not fit; see `read_annotations`."""
    return read_annotations(path, CocoImage, CocoCaption, kind="COCO caption", noun="image")


def load_captions(annotations: Path, images: Path) -> list[CaptionedImage]:
    """All captions of a `captions_*.json`, in its order.

    Raises:
        ValueError: the file cannot be read, or has a caption of an image that is not in it.
    """
    content, problems = read_captions(annotations)
    if problems:
        raise ValueError(f"{annotations} is no COCO caption file: {first_of(problems)}")
    files = {stable_id(image.id): image_path(images, image.file_name) for image in content.images}
    unknown = [str(a.image_id) for a in content.annotations if stable_id(a.image_id) not in files]
    if unknown:
        raise ValueError(f"{annotations}: captions of images that it does not hold: image_id {first_of(unknown)}")
    return [CaptionedImage(files[stable_id(a.image_id)], a.caption.strip()) for a in content.annotations]


def first_of(problems: list[str]) -> str:
    """The first item and the number of the others, as text."""
    return problems[0] + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")


def load_pixels(path: Path, size: int) -> torch.Tensor:
    """An image as (3, size, size) in [-1, 1]: EXIF rotation applied, any mode turned into RGB, aspect not kept.

    Raises:
        ValueError: no readable image there.
    """
    image = open_image(path).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def open_image(path: Path) -> Image.Image:
    """An image as upright RGB. Raises ValueError naming the file where there is none."""
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
