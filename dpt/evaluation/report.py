"""`evaluate.py report`: one page to look at, without a network.

    python evaluate.py report outputs/experiment/shapes-val/{base,denoise/0,dpt/0} \\
        --tables outputs/experiment/shapes-val/tables/table.json --figures outputs/experiment/*/curves.png \\
        --output outputs/report.html

Tables, figures, and a gallery: the same prompt and seed across arms side by side, to be filtered by category, verdict
and by the arm that alone is correct; a click enlarges, with the oracle's boxes and the matching score by step. The page
is built from report.html beside this module; everything it shows is data to it, never markup.
"""

import argparse
import base64
import io
import json
import warnings
from itertools import chain
from pathlib import Path

from PIL import Image

from dpt.evaluation.align import file_hashes, pictures, read_scores
from dpt.evaluation.arms import folder_name
from dpt.evaluation.probes import Summary, laid_out
from dpt.evaluation.table import arms_table, category_table, read_tables
from dpt.files import read_json, read_text, write_text
from dpt.images import UNREADABLE, read_image
from dpt.results import check_replaceable
from dpt.shapes.oracle import LABELS
from dpt.training.run_folder import versions

TEMPLATE = Path(__file__).with_name("report.html")
PLACEHOLDER = "__DATA__"
DATA_ELEMENT = 'id="data"'
LARGEST, QUALITY = 256, 80  # side in pixels, WebP's
MOST_BYTES = 25_000_000


def run(args: argparse.Namespace) -> dict:
    """Writes the page; returns its path, number of pictures and size.

    Raises:
        ValueError: folders without pictures, an unreadable file, a page too large, or another file in its place.
    """
    check_replaceable(args.output, _check_page)
    arms = [folder_name(folder) for folder in args.folders]
    if len(set(arms)) < len(arms):
        raise ValueError(f"two folders are of one arm: {', '.join(arms)}")
    rows: dict[tuple, dict] = {}
    for k, folder in enumerate(args.folders):
        for key, category, shown in cells(folder, args.seeds):
            row = {"prompt": key[0], "seed": key[1], "category": category, "cells": [None] * len(arms)}
            rows.setdefault(key, row)["cells"][k] = shown
    if args.per_category:
        shown: dict[str, list] = {}
        for key, row in rows.items():
            shown.setdefault(row["category"], []).append(key)
        rows = {key: rows[key] for keys in shown.values() for key in keys[: args.per_category]}
    if not rows:
        raise ValueError(f"no pictures of the seeds {args.seeds} in these folders")
    data = {
        "title": args.title,
        "about": f"{len(rows)} prompts and seeds, {len(arms)} arms; {versions()}",
        "tables": [*chain.from_iterable([*map(tables, args.tables), *map(probe_tables, args.probes)])],
        "figures": [{"title": f"{place(path)}: {path.stem}", "source": embedded(path)} for path in args.figures],
        "arms": arms,
        "categories": sorted({row["category"] for row in rows.values()}),
        "verdicts": list(LABELS),
        "rows": list(rows.values()),
    }
    text = page(data)
    if len(text) > MOST_BYTES:
        raise ValueError(f"the page would have {len(text) / 1e6:.0f} MB, above 25: name fewer folders or --seeds")
    write_text(args.output, text)
    count = sum(one is not None for row in rows.values() for one in row["cells"])
    return {"page": str(args.output), "pictures": count, "megabytes": round(len(text) / 1e6, 2)}


def page(data: dict) -> str:
    """The template with its data: JSON in which nothing can end the script element."""
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text("utf-8").replace(PLACEHOLDER, text)


def _check_page(path: Path) -> None:
    if DATA_ELEMENT not in read_text(path):
        raise ValueError(f"{path} is no page of evaluate.py report")


def cells(folder: Path, seeds: list[int]) -> list[tuple]:
    """((prompt, seed), category, what the gallery shows) of an arm's pictures."""
    records, found = pictures(folder), []
    verdicts = read_scores(folder, file_hashes(folder, records)).get("oracle", {})
    for record in records:
        if record["seed"] not in seeds:
            continue
        verdict = verdicts.get(record["file"], {})
        image = Image.fromarray(read_image(folder / record["file"]))
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY)
        shown = {
            "source": "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(),
            "label": verdict.get("label", ""),
            "reason": verdict.get("reason", ""),
            "boxes": verdict.get("objects", []),
            "scores": record.get("scores", []),
        }
        found.append(((record["prompt"], record["seed"]), record["category"], shown))
    return found


def place(path: Path) -> str:
    """A file's two last folders: an experiment's name and its prompt set, so that two experiments' tables differ."""
    return "/".join(path.absolute().parts[-3:-1])


def tables(path: Path) -> list[dict]:
    """The tables of a file that `table` wrote."""
    try:
        result = read_tables(path)
    except ValueError as error:
        raise ValueError(f"--tables {path} is no table.json of evaluate.py table: {error}") from error
    parts = [("arms", *arms_table(result.pop("arms")))]
    parts += [(key, *category_table(key.removesuffix(" by category"), rows)) for key, rows in result.items()]
    return [{"title": f"{place(path)}: {title}", "header": header, "rows": rows} for title, header, rows in parts]


def probe_tables(path: Path) -> list[dict]:
    """The tables of a file that `itm` or `rec` wrote."""
    try:
        summary = read_json(path, Summary)
    except ValueError as error:
        raise ValueError(f"--probes {path} is no itm.json or rec.json: {error}") from error
    found = []
    for name, rows in summary.items():
        header, cells = laid_out(rows)
        found.append({"title": f"{place(path)}: {path.stem}, {name}", "header": header, "rows": cells})
    return found


def embedded(path: Path) -> str:
    """A PNG as a data URI. Raises ValueError where it is none."""
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(content), formats=["PNG"]).close()
    except UNREADABLE as error:
        raise ValueError(f"--figures {path} is no picture: {error}") from error
    return "data:image/png;base64," + base64.b64encode(content).decode()
