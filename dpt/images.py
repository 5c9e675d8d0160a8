"""Pictures on disk: PNGs that carry their own metadata, a metadata file beside them, labelled grids.

Nothing is ever overwritten, also when several runs write into one folder.
"""

import functools
import itertools
import json
import os
import textwrap
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

import matplotlib
import msgspec
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from dpt.boxes import cxcywh_to_xyxy
from dpt.files import append_line, read_json_lines

SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
UNSCALED = ("I", "F")
METADATA_FILE = "metadata.jsonl"
FORMATS = ("PNG", "JPEG", "WEBP")  # of pictures that are read
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, AssertionError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""what Pillow raises at damaged pictures, and at more pixels than memory should be taken for"""


Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Picture(TypedDict, total=False):
    """The part of a metadata record that is read; paths are relative to the metadata file's folder."""

    file: Required[str]
    prompt: Required[str]
    seed: Required[Seed]
    settings: dict[str, Any]
    """of `txt2img.py`, as are the next four"""
    dpt_source: str | None
    lora: str | None
    versions: dict[str, str]
    cost: dict[str, float]
    number: int
    noise_seed: Seed
    category: str
    categories: list[str]
    scores: list[float]
    kept_seed: Seed
    corrected_from: float
    candidates: list[dict[str, Any]]
    seconds: float
    peak_mb: float
    whole_passes: float
    truncated_passes: float


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 images (H, W, 3) to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [0, 1] to uint8 images (B, H, W, 3)."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def with_boxes(image: np.ndarray, boxes: list[tuple[list[float], str]]) -> np.ndarray:
    """A copy of a uint8 image (H, W, 3) with boxes on it: normalised cxcywh and a colour's name each."""
    picture = Image.fromarray(image)
    pen, sides = ImageDraw.Draw(picture), torch.tensor([*picture.size, *picture.size])
    for box, color in boxes:
        corners = cxcywh_to_xyxy(torch.tensor(box)) * sides
        pen.rectangle(corners.tolist(), outline=color, width=max(1, max(picture.size) // 100))
    return np.array(picture)


def save_new(image: Image.Image, candidates: Iterator[Path], metadata: dict | None = None) -> Path:
    """Saves a PNG under the first candidate that does not exist yet and returns its path.

    The file appears complete or not at all. `metadata` becomes text chunks; what is no string is written as JSON.

    Raises:
        FileExistsError: all candidates exist.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    for path in candidates:
        if path.exists():
            continue
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            image.save(temporary, "PNG", pnginfo=info)
            _take_name(temporary, path)
            return path
        except FileExistsError:  # taken meanwhile
            continue
        finally:
            temporary.unlink(missing_ok=True)
    raise FileExistsError(f"{path} exists already")


def _take_name(temporary: Path, path: Path) -> None:
    """Gives a finished file its name; FileExistsError where there is one of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("xb") as file:
            file.write(temporary.read_bytes())


def numbered(folder: Path, pattern: str, start: int = 0) -> Iterator[Path]:
    """folder/pattern.format(n) for n = start, start + 1, ..."""
    return (folder / pattern.format(n) for n in itertools.count(start))


def compbench_stem(prompt: str) -> str:
    """The pattern of a file's name, without its ending, as T2I-CompBench expects it: <prompt>_<6 digits>."""
    name = " ".join(prompt.replace("/", " ").split())
    name = name.encode()[:200].decode(errors="ignore")  # file names end at 255 bytes
    return name.replace("{", "{{").replace("}", "}}") + "_{:06d}"


def append_metadata(folder: Path, record: dict) -> None:
    """Adds one line to the folder's metadata file."""
    append_line(folder / METADATA_FILE, record)


def read_metadata(folder: Path) -> list[dict]:
    """The records of the folder's metadata file whose pictures are there, as `Picture` says; empty without a file.

    Raises:
        ValueError: a line that is no such record; file, line and field are named.
    """
    return [record for record in read_records(folder) if (folder / record["file"]).is_file()]


def read_records(folder: Path) -> list[dict]:
    """`read_metadata`, also of pictures that are not there."""
    path = folder / METADATA_FILE
    records = read_json_lines(path, Picture) if path.exists() else []
    return [{"settings": {}} | record for record in records]


def text_chunks(path: Path) -> dict[str, str]:
    """The text chunks that `save_new` wrote into a PNG; empty where there are none, or the file is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(image.info)
    except UNREADABLE:
        return {}


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, whatever its mode, EXIF rotation applied.

    Raises:
        ValueError: numbers of unknown range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BITS:  # Pillow would cut, not scale them
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in UNSCALED:
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is unknown: save it with 8 bits a channel")
    return image.convert("RGB")


def read_image(path: Path) -> np.ndarray:
    """A picture (H, W, 3) uint8.

    Raises:
        ValueError: it is missing, damaged, of another format than `FORMATS`, or of so many pixels that it is no
            picture but an attack on memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return np.array(upright_rgb(image))
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); remove it and generate again") from error


@functools.cache
def _letters() -> tuple[str, frozenset[int]]:
    """The file of DejaVu Sans, which matplotlib brings along, and the code points that it has."""
    path = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    return path, frozenset(FT2Font(path).get_charmap())


def without_glyph(text: str) -> str:
    """The characters of a text that a label cannot show, each once and in order."""
    return "".join(c for c in dict.fromkeys(text) if ord(c) not in _letters()[1] and not c.isspace())


def legible(text: str) -> str:
    """The text in one line; characters that DejaVu Sans lacks are written as \\uXXXX."""
    lacking = {c: c.encode("unicode_escape").decode() for c in without_glyph(text)}
    return "".join(lacking.get(c, c) for c in " ".join(text.split()))


def make_grid(rows: list[tuple[str, list[np.ndarray]]], *, cell: int = 192, label_width: int = 200) -> Image.Image:
    """A labelled grid: each row is a text and its pictures, (H, W, 3) uint8."""
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (label_width + columns * cell, len(rows) * cell), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        font = ImageFont.load_default(14) if label.isascii() else ImageFont.truetype(_letters()[0], 12)
        lines = textwrap.wrap(legible(label), 26)[: cell // 18 - 1]
        draw.multiline_text((8, r * cell + cell // 2), "\n".join(lines), "black", font, anchor="lm", spacing=4)
        for c, image in enumerate(images):
            method = Image.Resampling.LANCZOS if max(image.shape[:2]) > cell - 4 else Image.Resampling.BICUBIC
            picture = ImageOps.contain(Image.fromarray(image), (cell - 4, cell - 4), method)
            canvas.paste(picture, (label_width + c * cell + 2, r * cell + 2))
    return canvas
