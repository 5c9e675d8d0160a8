"""Pictures to label by eye, against which the oracle is checked.

    python -m dpt.shapes.label collect outputs/shapes-pretrain/samples/step_* --count 300
    python -m dpt.shapes.label sheets outputs/labelling          # numbered pictures with their prompts, no verdicts
    (write the labels into dpt/shapes/labelled/labels.jsonl; --folder names another set)
    python -m dpt.shapes.quality oracle                          # compares

`collect` draws the same number from each folder that `dpt.shapes.quality.judge_prompts` filled, at random, and takes
nothing of the oracle's verdicts along.
"""

import sys

from dpt.commands.label import main

if __name__ == "__main__":  # before the imports below, which take seconds
    sys.exit(main())

import json
import re
import textwrap
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dpt.files import read_json_lines, write_text
from dpt.images import read_image
from dpt.shapes.quality import JudgedPicture, Labelled, load_labelled
from dpt.shapes.scenes import IMAGE_SIZE

COLUMNS = 20  # of the file of all pictures
SHEET_COLUMNS, SHEET_ROWS, CELL = 6, 5, 190


def collect(folders: list[Path], count: int, output: Path) -> None:
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
