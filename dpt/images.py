"""Pictures on disk: PNGs that carry their own metadata, a metadata file beside them, labelled grids.

Nothing is ever overwritten, also when several runs write into one folder.
"""

import functools
import itertools
import json
import os
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dpt.boxes import cxcywh_to_xyxy

METADATA_FILE = "metadata.jsonl"


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
    raise AssertionError("candidates are endless")


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


def append_line(path: Path, record: dict) -> None:
    """Adds a record to a file of JSON lines, in one write."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    if _cut_short(path):
        line = b"\n" + line
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def _cut_short(path: Path) -> bool:
    """Whether a kill left the last line without its end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_metadata(folder: Path) -> list[dict]:
    """The records of the folder's metadata file whose pictures are there."""
    return [record for record in read_lines(folder / METADATA_FILE) if (folder / record["file"]).exists()]


def read_lines(path: Path) -> list[dict]:
    """The records, each with a `file`, of a file of JSON lines, if it is there; a line cut short is passed over."""
    records = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "file" in record:
            records.append(record)
    return records


@functools.cache
def _letters() -> tuple[str, frozenset[int]]:
    """The file of DejaVu Sans, which matplotlib brings along, and the code points that it has."""
    path = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    return path, frozenset(FT2Font(path).get_charmap())


def without_glyph(text: str) -> str:
    """The characters, each once and in order, that a label cannot show."""
    return "".join(c for c in dict.fromkeys(text) if ord(c) not in _letters()[1] and not c.isspace())


def legible(text: str) -> str:
    """A text in one line, what DejaVu Sans lacks written as \\uXXXX."""
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
            picture = Image.fromarray(image)
            picture.thumbnail((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            if max(picture.size) < cell - 4:
                scale = (cell - 4) / max(picture.size)
                picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
            canvas.paste(picture, (label_width + c * cell + 2, r * cell + 2))
    return canvas
