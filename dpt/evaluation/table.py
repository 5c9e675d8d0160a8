"""`evaluate.py table`: arms side by side, with intervals.

    python evaluate.py table outputs/evaluation/base outputs/evaluation/dpt --against base --output outputs/tables

One row an arm: the share of each verdict and the mean of each score, with 95 % bootstrap intervals, the paired
difference to the arm named by --against, and what a picture cost. Folders `arm/0`, `arm/1`, ... are training seeds of
one arm: the bootstrap is crossed over training seeds and prompts. Writes table.md and table.json into --output.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dpt.images import read_lines, read_metadata
from dpt.metrics import crossed_bootstrap
from dpt.shapes.quality import LABELS

COSTS = ("seconds", "whole_passes", "truncated_passes", "peak_mb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms, or of an arm's training seeds")
    parser.add_argument("--against", help="name of the arm that others are compared with")
    parser.add_argument("--categories", nargs="+", help="only these (default: all but unseen)")
    parser.add_argument("--output", type=Path, required=True, help="a folder")


def run(args: argparse.Namespace) -> dict:
    """Writes the table; returns it as a dict of rows.

    Raises:
        ValueError: folders without scores, or arms of different pictures.
    """
    arms: dict[str, list[dict]] = {}
    for folder in args.folders:
        name = folder.parent.name if folder.name.isdigit() else folder.name
        arms.setdefault(name, []).append(read_arm(folder, args.categories))
    if args.against is not None and args.against not in arms:
        raise ValueError(f"--against is {args.against!r}; the arms are {', '.join(arms)}")
    keys = {frozenset(seed["values"]) for seeds in arms.values() for seed in seeds}
    if len(keys) > 1:
        raise ValueError("the arms do not show the same prompts and seeds: generate and align all of them first")
    rows = {name: _row(seeds, arms.get(args.against), name == args.against) for name, seeds in arms.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.output / "table.md").write_text(markdown(rows))
    print(markdown(rows))
    return rows


def read_arm(folder: Path, categories: list[str] | None) -> dict:
    """An arm's figures by (prompt, seed), and its mean costs."""
    records = {r["file"]: r for r in read_metadata(folder)}
    values: dict[tuple[str, int], dict[str, float]] = {}
    for metric in sorted(folder.glob("*.jsonl")):
        if metric.name == "metadata.jsonl":
            continue
        for scored in read_lines(metric):
            record = records.get(scored["file"])
            wanted = record and (record["category"] in categories if categories else record["category"] != "unseen")
            if not wanted:
                continue
            figures = {label: float(scored["label"] == label) for label in LABELS} if "label" in scored else {}
            figures |= {key: value for key, value in scored.items() if isinstance(value, float)}
            values.setdefault((record["prompt"], record["seed"]), {}).update(figures)
    if not values:
        raise ValueError(f"{folder} holds no scores: run evaluate.py align first")
    costs = {cost: float(np.mean([r[cost] for r in records.values()])) for cost in COSTS}
    return {"values": values, "costs": costs}


def _row(seeds: list[dict], against: list[dict] | None, is_reference: bool) -> dict:
    pairs = sorted(seeds[0]["values"])
    prompts, row = np.array([prompt for prompt, _ in pairs]), {"training_seeds": len(seeds)}
    for figure in seeds[0]["values"][pairs[0]]:
        matrix = np.array([[seed["values"][pair][figure] for pair in pairs] for seed in seeds])  # (S, N)
        row[figure] = crossed_bootstrap(matrix, prompts)
        if against is not None and not is_reference:
            other = np.array([[seed["values"][pair][figure] for pair in pairs] for seed in against])
            row[f"{figure}_difference"] = crossed_bootstrap(matrix, prompts, other)
    return row | {cost: float(np.mean([seed["costs"][cost] for seed in seeds])) for cost in COSTS}


def markdown(rows: dict[str, dict]) -> str:
    """The table as Markdown; shares in percent."""
    figures = [key for row in rows.values() for key in row if isinstance(row[key], tuple)]
    columns = ["training_seeds", *dict.fromkeys(figures), *COSTS]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [_cell(column, row.get(column)) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(column: str, value) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        percent = 100 if column.removesuffix("_difference") in LABELS else 1
        mean, low, high = (percent * x for x in value)
        return f"{mean:.3g} ({low:.3g} to {high:.3g})"
    return f"{value:.3g}"
