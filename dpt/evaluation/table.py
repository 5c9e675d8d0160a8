"""`evaluate.py table`: arms side by side, with intervals.

    python evaluate.py table outputs/evaluation/base outputs/evaluation/dpt --against base --output outputs/tables

One row an arm: the share of each verdict and the mean of each score, with 95 % bootstrap intervals, the paired
difference to the arm named by --against, and what a picture cost. Folders `arm/0`, `arm/1`, ... are training seeds of
one arm: the bootstrap is crossed over training seeds and prompts, each of which has noise of its own. --by names
figures that are shown by category too, differences with p values that Holm's method corrects for the number of
categories. Writes table.md, table.tex, table.json and, of the first figure, table.png into --output.
"""

import argparse
import json
from pathlib import Path
from typing import NotRequired, TypedDict

import msgspec
import numpy as np
from matplotlib.figure import Figure

from dpt.evaluation.pack import collect
from dpt.files import decode, read_json, write_text
from dpt.metrics import Interval, bootstrap_p, crossed_bootstrap, holm
from dpt.results import check_replaceable, markdown_table
from dpt.shapes.oracle import LABELS

APART = "unseen"  # a category that overall figures leave out
ArmRow = dict[str, int | float | str | Interval]
"""an arm in table.json: counts, costs, whom it is compared with, figures"""


class CategoryRow(TypedDict):
    """A category of an arm in table.json."""

    prompts: int
    mean: Interval
    difference: NotRequired[Interval]
    p_holm: NotRequired[float]


def run(args: argparse.Namespace) -> dict:
    """Writes the tables; see `make_tables`."""
    arms = collect(args.folders)
    return make_tables(arms, against=args.against, categories=args.categories, by=args.by, output=args.output)


def make_tables(
    figures: dict[str, dict],
    *,
    against: str | None,
    by: list[str],
    output: Path,
    categories: list[str] | None = None,
    against_of: dict[str, str] | None = None,
    notes: str = "",
) -> dict:
    """Writes the tables; returns the rows by arm, and those of a category under `<figure> by category`.

    Args:
        figures: of arms as `read_arm` gives them, by name; `arm/0`, `arm/1`, ... are training seeds of one.
        against_of: arms to compare single arms with, instead of `against`.
        notes: Markdown that follows the tables.

    Raises:
        ValueError: arms of different pictures or scores, a name that is not there, or another's files in `output`.
    """
    check_replaceable(output / "table.json", read_tables, *(output / f"table.{end}" for end in ("md", "tex", "png")))
    arms = by_training_seed(figures)
    if against is not None and against not in arms:
        raise ValueError(f"--against is {against!r}; the arms are {', '.join(arms)}")
    check_alike(arms)
    first = next(iter(arms.values()))[0]
    if unknown := set(by) - first["figures"]:
        raise ValueError(f"--by names {sorted(unknown)[0]!r}; the figures are {', '.join(sorted(first['figures']))}")
    known, chosen = categories_of(first, categories)
    pairs = sorted(pair for pair in first["values"] if chosen & set(first["categories"][pair[0]]))
    reference = {name: (against_of or {}).get(name) or against for name in arms}
    result = {"arms": {}}
    for name, seeds in arms.items():
        other = reference[name] if reference[name] != name else None
        result["arms"][name] = _row(seeds, arms.get(other), other, pairs)
    for figure in by:
        result[f"{figure} by category"] = _by_category(arms, reference, figure, sorted(known))
    tables = [arms_table(result["arms"])]
    tables += [category_table(figure, result[f"{figure} by category"]) for figure in by]
    text = "\n".join(markdown_table(*table) for table in tables)
    text += f"\nFigures of an arm are of all categories but `{APART}`.\n" * (not categories and APART in known - chosen)
    text += notes
    for suffix, content in (
        ("json", json.dumps(result, indent=1) + "\n"),
        ("md", text),
        ("tex", "\n".join(latex(*table) for table in tables)),
    ):
        write_text(output / f"table.{suffix}", content)
    plot_arms(result["arms"]).savefig(output / "table.png", dpi=110)
    print(text)
    return result


def categories_of(arm: dict, wanted: list[str] | None) -> tuple[set[str], set[str]]:
    """The categories of an arm's prompts, and those that overall figures are of: `wanted`, or all but `unseen`.

    Raises:
        ValueError: a wanted category that no prompt is of.
    """
    known = {category for found in arm["categories"].values() for category in found}
    chosen = set(wanted or [category for category in known if category != APART] or [APART])
    if unknown := chosen - known:
        raise ValueError(f"--categories names {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    return known, chosen


def read_tables(path: Path) -> dict[str, dict]:
    """The tables that `make_tables` wrote into table.json. Raises ValueError naming file and field."""
    parts = read_json(path, dict[str, msgspec.Raw])
    if "arms" not in parts:
        raise ValueError(f"{path}: object is missing required field arms")
    schemas = {key: dict[str, ArmRow if key == "arms" else dict[str, CategoryRow]] for key in parts}
    tables = {key: decode(part, schemas[key], f"{path}: {key}") for key, part in parts.items()}
    for key, arms in tables.items():
        if not arms:
            raise ValueError(f"{path}: {key} holds no arm")
        if key != "arms" and any(rows.keys() != next(iter(arms.values())).keys() for rows in arms.values()):
            raise ValueError(f"{path}: {key}: arms of different categories; let `table` write it again")
    return tables


def check_alike(arms: dict[str, list[dict]]) -> None:
    """Raises ValueError unless all show the same prompts and seeds and are scored by the same metrics."""
    first, *others = [(name, seed) for name, seeds in arms.items() for seed in seeds]
    for name, seed in others:
        if seed["values"].keys() != first[1]["values"].keys():
            raise ValueError(
                f"{first[0]} and {name} do not show the same prompts and seeds: generate and align both to the end"
            )
        if seed["figures"] != first[1]["figures"]:
            odd = sorted(seed["figures"] ^ first[1]["figures"])[0]
            raise ValueError(f"{first[0]} and {name} are not scored alike, {odd!r} is missing: align both")


def by_training_seed(figures: dict[str, dict]) -> dict[str, list[dict]]:
    """Name -> the figures of each of the arm's training seeds. Raises ValueError where two arms have one name."""
    arms: dict[str, list[dict]] = {}
    for full, arm in figures.items():
        name, _, seed = full.partition("/")
        if name in arms and (not seed or name in figures):
            raise ValueError(f"two arms are named {name!r}; rename a folder")
        arms.setdefault(name, []).append(arm)
    return arms


def _matrix(seeds: list[dict], pairs: list[tuple], figure: str) -> np.ndarray:
    return np.array([[seed["values"][pair][figure] for pair in pairs] for seed in seeds])  # (S, N)


def _row(seeds: list[dict], against: list[dict] | None, name: str | None, pairs: list[tuple]) -> dict:
    prompts = np.array([prompt for prompt, _ in pairs])
    row = {"training_seeds": len(seeds), "prompts": len(set(prompts))}
    if against is not None:
        row["against"] = name
    for figure in sorted(seeds[0]["figures"], key=lambda figure: (figure not in LABELS, figure)):
        matrix = _matrix(seeds, pairs, figure)
        row[figure] = crossed_bootstrap(matrix, prompts)
        if against is not None:
            row[f"{figure}_difference"] = crossed_bootstrap(matrix, prompts, _matrix(against, pairs, figure))
    wholes = [cost for cost in seeds[0]["costs"] if all(cost in seed["costs"] for seed in seeds)]
    return row | {cost: float(np.mean([seed["costs"][cost] for seed in seeds])) for cost in wholes}


def _by_category(arms: dict[str, list[dict]], reference: dict, figure: str, categories: list[str]) -> dict:
    result = {}
    for name, seeds in arms.items():
        rows, p_values = {}, {}
        for category in categories:
            pairs = sorted(pair for pair in seeds[0]["values"] if category in seeds[0]["categories"][pair[0]])
            prompts, matrix = np.array([prompt for prompt, _ in pairs]), _matrix(seeds, pairs, figure)
            rows[category] = {"prompts": len(set(prompts)), "mean": crossed_bootstrap(matrix, prompts)}
            if reference[name] not in (None, name):
                other = _matrix(arms[reference[name]], pairs, figure)
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
    columns = ["training_seeds", "prompts", *dict.fromkeys(figures), *dict.fromkeys(costs)]
    columns += ["against"] * any("against" in row for row in rows.values())
    cells = [[name, *(_cell(column, row.get(column)) for column in columns)] for name, row in rows.items()]
    return ["arm", *columns], cells


def category_table(figure: str, arms: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a figure by category (and its prompts), each with its difference and p where there is one."""
    categories = [f"{category} ({row['prompts']})" for category, row in next(iter(arms.values())).items()]
    cells = []
    for name, rows in arms.items():
        cells.append([name])
        for row in rows.values():
            text = _cell(figure, row["mean"])
            if "difference" in row and "p_holm" in row:
                text += f"; difference {_cell(figure, row['difference'])}, p = {row['p_holm']:.3g}"
            cells[-1].append(text)
    return [f"{figure} by category", *categories], cells


def _cell(column: str, value) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, tuple):
        percent = 100 if column.removesuffix("_difference") in LABELS else 1
        mean, low, high = (percent * x for x in value)
        return f"{mean:.3g} ({low:.3g} to {high:.3g})"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot_arms(rows: dict[str, dict]) -> Figure:
    """The first figure of each arm with its 95 % interval, beside it the paired difference to the arm named there."""
    first = next(key for key, value in next(iter(rows.values())).items() if isinstance(value, tuple))
    percent = 100 if first in LABELS else 1
    drawing = Figure(figsize=(10, 1.2 + 0.3 * len(rows)), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows.values()):
        for axis, key in ((left, first), (right, f"{first}_difference")):
            if key in row:
                mean, low, high = (percent * value for value in row[key])
                axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
        if f"{first}_difference" in row:
            right.annotate(f"to {row['against']}", (1.02, place), xycoords=("axes fraction", "data"), va="center")
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set_xlabel(f"{first}, %" if first in LABELS else first)
    right.set_xlabel("difference, points" if first in LABELS else "difference")
    right.axvline(0, color="gray", linewidth=1)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return drawing


def latex(header: list[str], cells: list[list[str]]) -> str:
    """The same as a LaTeX tabular of the booktabs package."""
    lines = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in (header, *cells)]
    rules = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*rules, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return "".join("\\" + character if character in "&%$#_{}" else character for character in text)
