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
from pathlib import Path

from PIL import Image

from dpt.evaluation.align import file_hashes, pictures, read_image, read_scores
from dpt.evaluation.arms import folder_name
from dpt.evaluation.probes import laid_out
from dpt.evaluation.table import arms_table, category_table
from dpt.runs import versions
from dpt.shapes.quality import LABELS

TEMPLATE = Path(__file__).with_name("report.html")
PLACEHOLDER = "__DATA__"
LARGEST, QUALITY = 256, 80  # side in pixels, WebP's
MOST_BYTES = 25_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms, or of an arm's training seeds")
    parser.add_argument("--tables", nargs="*", type=Path, default=[], help="table.json files of `table`")
    parser.add_argument("--figures", nargs="*", type=Path, default=[], help="PNG files: heat maps, curves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise (default: 0)")
    parser.add_argument("--per_category", type=int, help="only the first so many prompts a category")
    parser.add_argument("--probes", nargs="*", type=Path, default=[], help="itm.json and rec.json files")
    parser.add_argument("--title", default="dpt report")
    parser.add_argument("--output", type=Path, required=True, help="the page")


def run(args: argparse.Namespace) -> dict:
    """Writes the page; returns what it holds, in numbers.

    Raises:
        ValueError: folders without pictures, an unreadable file, or a page larger than 25 MB.
    """
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
        "tables": [table for path in args.tables for table in tables(path)]
        + [table for path in args.probes for table in probe_tables(path)],
        "figures": [{"title": f"{place(path)}: {path.stem}", "source": embedded(path)} for path in args.figures],
        "arms": arms,
        "categories": sorted({row["category"] for row in rows.values()}),
        "verdicts": list(LABELS),
        "rows": list(rows.values()),
    }
    text = page(data)
    if len(text) > MOST_BYTES:
        raise ValueError(f"the page would have {len(text) / 1e6:.0f} MB, above 25: name fewer folders or --seeds")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, "utf-8")
    count = sum(one is not None for row in rows.values() for one in row["cells"])
    return {"page": str(args.output), "pictures": count, "megabytes": round(len(text) / 1e6, 2)}


def page(data: dict) -> str:
    """The template with its data: JSON in which nothing can end the script element."""
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text("utf-8").replace(PLACEHOLDER, text)


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
        result = json.loads(path.read_text())
        parts = [("arms", *arms_table(as_tuples(result["arms"])))]
        for key, rows in result.items():
            if key.endswith(" by category"):
                parts.append((key, *category_table(key.removesuffix(" by category"), as_tuples(rows))))
    except (OSError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--tables {path} is no table.json of evaluate.py table: {error!r}") from error
    return [{"title": f"{place(path)}: {title}", "header": header, "rows": rows} for title, header, rows in parts]


def probe_tables(path: Path) -> list[dict]:
    """The tables of a file that `itm` or `rec` wrote."""
    try:
        found = []
        for name, rows in json.loads(path.read_text()).items():
            header, cells = laid_out(rows)
            found.append({"title": f"{place(path)}: {path.stem}, {name}", "header": header, "rows": cells})
        return found
    except (OSError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"--probes {path} is no itm.json or rec.json: {error!r}") from error


def as_tuples(value):
    """JSON's lists of numbers as the tuples that they were."""
    if isinstance(value, dict):
        return {key: as_tuples(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def embedded(path: Path) -> str:
    """A PNG as a data URI. Raises ValueError where it is none."""
    try:
        content = path.read_bytes()
        if Image.open(io.BytesIO(content)).format != "PNG":
            raise OSError("it is no PNG")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"--figures {path} is no picture: {error}") from error
    return "data:image/png;base64," + base64.b64encode(content).decode()
