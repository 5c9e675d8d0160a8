"""`evaluate.py table`: arms side by side, with intervals.

    python evaluate.py table outputs/evaluation/base outputs/evaluation/dpt --against base --output outputs/tables

One row an arm: the share of each verdict and the mean of each score, with 95 % bootstrap intervals, the paired
difference to the arm named by --against, and what a picture cost. Folders `arm/0`, `arm/1`, ... are training seeds of
one arm: the bootstrap is crossed over training seeds and prompts. --by names figures that are shown by category too,
differences with p values that Holm's method corrects for the number of categories. Writes table.md, table.tex and
table.json into --output.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dpt.evaluation.align import pictures
from dpt.images import METADATA_FILE, read_lines
from dpt.metrics import bootstrap_p, crossed_bootstrap, holm
from dpt.shapes.quality import LABELS

COSTS = ("seconds", "whole_passes", "truncated_passes", "peak_mb")
APART = "unseen"  # a category that overall figures leave out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms, or of an arm's training seeds")
    parser.add_argument("--against", help="name of the arm that others are compared with")
    parser.add_argument("--categories", nargs="+", help="only these (default: all but unseen)")
    parser.add_argument("--by", nargs="*", default=[], metavar="FIGURE", help="figures to show by category")
    parser.add_argument("--output", type=Path, required=True, help="a folder")


def run(args: argparse.Namespace) -> dict:
    """Writes the tables; returns the rows by arm, and those of a category under `<figure> by category`.

    Raises:
        ValueError: folders without scores, arms of different pictures, or a name that is not there.
    """
    arms: dict[str, list[dict]] = {}
    for folder in args.folders:
        name = folder.parent.name if folder.name.isdigit() else folder.name
        arms.setdefault(name, []).append(read_arm(folder))
    if args.against is not None and args.against not in arms:
        raise ValueError(f"--against is {args.against!r}; the arms are {', '.join(arms)}")
    everything = [seed for seeds in arms.values() for seed in seeds]
    if len({frozenset(seed["values"]) for seed in everything}) > 1:
        raise ValueError("the arms do not show the same prompts and seeds: generate and align all of them first")
    known = {category for category, _, _ in everything[0]["values"]}
    chosen = args.categories or [category for category in known if category != APART] or [APART]
    if unknown := set(chosen) - known:
        raise ValueError(f"--categories names {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    result = {"arms": {}}
    for name, seeds in arms.items():
        against = arms[args.against] if args.against not in (None, name) else None
        result["arms"][name] = _row(seeds, against, chosen)
    for figure in args.by:
        if any(figure not in row for seed in everything for row in seed["values"].values()):
            raise ValueError(f"--by names {figure!r}; not every picture has that figure")
        result[f"{figure} by category"] = _by_category(arms, args.against, figure, sorted(known))
    tables = [arms_table(result["arms"])]
    tables += [category_table(figure, result[f"{figure} by category"]) for figure in args.by]
    args.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(markdown(*table) for table in tables)
    for suffix, content in (
        ("json", json.dumps(result, indent=1) + "\n"),
        ("md", text),
        ("tex", "\n".join(latex(*table) for table in tables)),
    ):
        (args.output / f"table.{suffix}").write_text(content)
    print(text)
    return result


def read_arm(folder: Path) -> dict:
    """An arm's figures by (category, prompt, seed), its mean costs, and what `quality` found of it as a whole."""
    records = {r["file"]: r for r in pictures(folder)}
    values: dict[tuple[str, str, int], dict[str, float]] = {}
    for metric in sorted(folder.glob("*.jsonl")):
        for scored in read_lines(metric) if metric.name != METADATA_FILE else ():
            record = records.get(scored["file"])
            if record is None:
                continue
            figures = {label: float(scored["label"] == label) for label in LABELS} if "label" in scored else {}
            figures |= {key: value for key, value in scored.items() if isinstance(value, float)}
            values.setdefault((record["category"], record["prompt"], record["seed"]), {}).update(figures)
    if not values:
        raise ValueError(f"{folder} holds no scores: run evaluate.py align first")
    known = [cost for cost in COSTS if all(cost in r for r in records.values())]
    costs = {cost: float(np.mean([r[cost] for r in records.values()])) for cost in known}
    quality = folder / "quality.json"
    return {"values": values, "costs": costs | (json.loads(quality.read_text()) if quality.exists() else {})}


def _matrix(seeds: list[dict], pairs: list[tuple], figure: str) -> np.ndarray:
    return np.array([[seed["values"][pair][figure] for pair in pairs] for seed in seeds])  # (S, N)


def _row(seeds: list[dict], against: list[dict] | None, categories: list[str]) -> dict:
    pairs = sorted(pair for pair in seeds[0]["values"] if pair[0] in categories)
    prompts, row = np.array([prompt for _, prompt, _ in pairs]), {"training_seeds": len(seeds)}
    for figure in seeds[0]["values"][pairs[0]]:
        matrix = _matrix(seeds, pairs, figure)
        row[figure] = crossed_bootstrap(matrix, prompts)
        if against is not None:
            row[f"{figure}_difference"] = crossed_bootstrap(matrix, prompts, _matrix(against, pairs, figure))
    wholes = [cost for cost in seeds[0]["costs"] if all(cost in seed["costs"] for seed in seeds)]
    return row | {cost: float(np.mean([seed["costs"][cost] for seed in seeds])) for cost in wholes}


def _by_category(arms: dict[str, list[dict]], against: str | None, figure: str, categories: list[str]) -> dict:
    result = {}
    for name, seeds in arms.items():
        rows, p_values = {}, {}
        for category in categories:
            pairs = sorted(pair for pair in seeds[0]["values"] if pair[0] == category)
            prompts, matrix = np.array([prompt for _, prompt, _ in pairs]), _matrix(seeds, pairs, figure)
            rows[category] = {"mean": crossed_bootstrap(matrix, prompts)}
            if against not in (None, name):
                other = _matrix(arms[against], pairs, figure)
                rows[category]["difference"] = crossed_bootstrap(matrix, prompts, other)
                p_values[category] = bootstrap_p(matrix, prompts, other)
        for category, p in holm(p_values).items():
            rows[category]["p_holm"] = p
        result[name] = rows
    return result


def arms_table(rows: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows by arm; shares in percent."""
    figures = [key for row in rows.values() for key in row if isinstance(row[key], tuple)]
    costs = [key for row in rows.values() for key in row if isinstance(row[key], float)]
    columns = ["training_seeds", *dict.fromkeys(figures), *dict.fromkeys(costs)]
    cells = [[name, *(_cell(column, row.get(column)) for column in columns)] for name, row in rows.items()]
    return ["arm", *columns], cells


def category_table(figure: str, arms: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a figure by category, each with its difference and p where there is one."""
    categories, cells = list(next(iter(arms.values()))), []
    for name, rows in arms.items():
        cells.append([name])
        for row in rows.values():
            text = _cell(figure, row["mean"])
            if "difference" in row:
                text += f"; difference {_cell(figure, row['difference'])}, p = {row['p_holm']:.3g}"
            cells[-1].append(text)
    return [f"{figure} by category", *categories], cells


def _cell(column: str, value) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        percent = 100 if column.removesuffix("_difference") in LABELS else 1
        mean, low, high = (percent * x for x in value)
        return f"{mean:.3g} ({low:.3g} to {high:.3g})"
    return f"{value:.3g}"


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latex(header: list[str], cells: list[list[str]]) -> str:
    """The same as a LaTeX tabular of the booktabs package."""
    lines = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in (header, *cells)]
    rules = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*rules, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return "".join("\\" + character if character in "&%$#_{}" else character for character in text)
