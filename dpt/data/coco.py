"""COCO's captions and images, in the files that users have.

Images are resized to a square without keeping the aspect, as the paper trains on them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and one of its captions."""

    path: Path
    caption: str


def read_json(path: Path):
    """The contents of a JSON file. Raises ValueError naming the file where it is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        if path.read_text("utf-8").lstrip().startswith("<"):
            raise ValueError(f"{path} is a web page, not JSON: download the file itself") from error
        raise ValueError(f"{path} is no valid JSON (line {error.lineno}: {error.msg}): get the file again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def load_captions(annotations: Path, images: Path) -> list[CaptionedImage]:
    """All captions of a `captions_*.json`, in its order."""
    content = read_json(annotations)
    try:
        files = {image["id"]: images / image["file_name"] for image in content["images"]}
        return [CaptionedImage(files[a["image_id"]], a["caption"].strip()) for a in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{annotations} is no COCO caption file: {error!r} is missing") from error


def load_pixels(path: Path, size: int) -> torch.Tensor:
    """An image as (3, size, size) in [-1, 1]: EXIF rotation applied, any mode turned into RGB, aspect not kept.

    Raises:
        ValueError: no readable image there.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
