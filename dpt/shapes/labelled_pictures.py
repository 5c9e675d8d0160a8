"""Pictures labelled by eye: chosen, shown on numbered pages, and compared with the oracle."""

import json
import re
import textwrap
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dpt.files import read_json_lines, write_text
from dpt.images import read_image
from dpt.shapes.oracle import Label, judge
from dpt.shapes.scenes import IMAGE_SIZE
from dpt.shapes.settings import LABELLED_FOLDER

COLUMNS = 20  # of the file of all pictures
SHEET_COLUMNS, SHEET_ROWS, CELL = 6, 5, 190
LABELLED = {
    "early stages": LABELLED_FOLDER,
    "late stages": LABELLED_FOLDER / "late",
    "with CLIP trained along": LABELLED_FOLDER / "joint",
}
"""Sets of pictures labelled by eye. The oracle's threshold of outlines was chosen on the first half of the first set,
its threshold at the border on the first two sets, and nothing on the third."""


class JudgedPicture(msgspec.Struct):
    """A line of `verdicts.jsonl`: a picture that `judge_prompts` drew, and the oracle's verdict."""

    category: str
    prompt: str
    seed: int
    label: Label
    reason: str


class Labelled(msgspec.Struct):
    """A line of `labels.jsonl`: a picture to be labelled by eye, and its label, null until then."""

    stage: str
    category: str
    prompt: str
    seed: int
    label: Label | None


def load_labelled(folder: Path) -> list[dict]:
    """The pictures of a folder that were labelled by eye: image (128, 128, 3) uint8, prompt, label, stage."""
    sheet = read_image(folder / "pictures.png")
    rows, columns = (side // IMAGE_SIZE for side in sheet.shape[:2])
    records = msgspec.to_builtins(read_json_lines(folder / "labels.jsonl", Labelled))
    if len(records) > rows * columns:
        raise ValueError(f"{folder / 'pictures.png'} has {rows * columns} pictures, labels.jsonl {len(records)} lines")
    for k, record in enumerate(records):
        y, x = (IMAGE_SIZE * v for v in divmod(k, columns))
        record["image"] = np.ascontiguousarray(sheet[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE])
    return records


def agreement(folder: Path) -> tuple[list[dict], dict[tuple[str, str], int]]:
    """The pictures of a folder on which the oracle disagrees, and counts of (label by eye, oracle's label)."""
    wrong, counts = [], {}
    for k, record in enumerate(load_labelled(folder)):
        verdict = judge(record["image"], record["prompt"])
        counts[record["label"], verdict.label] = counts.get((record["label"], verdict.label), 0) + 1
        if verdict.label != record["label"]:
            wrong.append({"index": k, "label": record["label"], "oracle": verdict.label, "reason": verdict.reason})
    return wrong, counts


def collect_pictures(folders: list[Path], count: int, output: Path) -> None:
    """Writes `pictures.png` and `labels.jsonl` (labels still null) of `count` pictures, mixed.

    Raises:
        ValueError: too few pictures, or labels that are there already.
    """
    for name in ("labels.jsonl", "pictures.png"):
        if (output / name).exists():
            raise ValueError(f"{output / name} exists already; remove it to begin anew")
    if count % len(folders):
        raise ValueError(f"--count is {count}; it must be a multiple of the {len(folders)} folders")
    rng, chosen = np.random.default_rng(0), []
    for folder in folders:
        records = read_json_lines(folder / "verdicts.jsonl", JudgedPicture)
        share = count // len(folders)
        if len(records) < share:
            raise ValueError(f"{folder} holds {len(records)} pictures; {share} are wanted of each folder")
        for k in rng.choice(len(records), share, replace=False):
            stage, one = f"{folder.parent.parent.name}/{folder.name}", records[k]
            chosen.append((Labelled(stage, one.category, one.prompt, one.seed, None), folder / f"{k:04d}.png"))
    chosen = [chosen[k] for k in rng.permutation(len(chosen))]
    sheet = Image.new("RGB", (COLUMNS * IMAGE_SIZE, -(-len(chosen) // COLUMNS) * IMAGE_SIZE))
    for k, (_, path) in enumerate(chosen):
        sheet.paste(Image.fromarray(read_image(path)), tuple(IMAGE_SIZE * v for v in reversed(divmod(k, COLUMNS))))
    output.mkdir(parents=True, exist_ok=True)
    sheet.save(output / "pictures.png", optimize=True)
    write_text(output / "labels.jsonl", "".join(json.dumps(msgspec.to_builtins(one)) + "\n" for one, _ in chosen))


def sheets(output: Path, folder: Path) -> None:
    """Writes pages of the folder's pictures, numbered, with their prompts, large enough to judge.

    Raises:
        ValueError: a set that cannot be read, or an output folder that holds anything but such pages.
    """
    if output.exists() and (others := [p for p in output.iterdir() if not re.fullmatch(r"page_\d+\.png", p.name)]):
        raise ValueError(f"{output} holds {others[0].name}, which is no page; name another folder")
    records, font = load_labelled(folder), ImageFont.load_default(12)
    output.mkdir(parents=True, exist_ok=True)
    per_page, text_height = SHEET_COLUMNS * SHEET_ROWS, 48
    for first in range(0, len(records), per_page):
        page = Image.new("RGB", (SHEET_COLUMNS * CELL, SHEET_ROWS * (CELL + text_height)), "white")
        draw = ImageDraw.Draw(page)
        for k, record in enumerate(records[first : first + per_page]):
            row, column = divmod(k, SHEET_COLUMNS)
            x, y = column * CELL, row * (CELL + text_height)
            page.paste(Image.fromarray(record["image"]).resize((CELL - 6, CELL - 6), Image.Resampling.BICUBIC), (x, y))
            text = "\n".join(textwrap.wrap(f"{first + k}: {record['prompt']}", 30)[:3])
            draw.multiline_text((x + 2, y + CELL - 4), text, "black", font, spacing=2)
        page.save(output / f"page_{first // per_page:02d}.png")
