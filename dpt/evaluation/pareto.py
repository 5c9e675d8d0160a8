"""`evaluate.py pareto`: correctness against network passes and against seconds, as one figure.

    python evaluate.py pareto outputs/tables/shapes-test-15/s* --ceiling s20 --output docs/pareto.png

A point an arm: the share of correct pictures with its 95 % interval against the passes that a picture takes,
whole and truncated ones counted alike, and against its seconds. --ceiling names an arm drawn from several noise seeds:
the line of best-of-N if the oracle itself chose, N from 1 to the number of seeds. Writes the figure and its numbers
beside it.
"""

import argparse
import json
from functools import partial
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dpt.evaluation.pack import collect
from dpt.evaluation.table import APART
from dpt.files import read_json, write_text
from dpt.metrics import Interval, crossed_bootstrap
from dpt.results import check_figure, check_replaceable


class Point(msgspec.Struct, forbid_unknown_fields=True):
    """The numbers of an arm in the file beside the figure."""

    passes: float
    seconds: float
    correct: Interval


def run(args: argparse.Namespace) -> dict:
    """Draws the figure; returns its numbers: name -> passes and (mean, low, high).

    Raises:
        ValueError: folders without the oracle's verdicts or the passes, or an output that is no figure's name.
    """
    check_figure(args.output)
    beside = args.output.with_suffix(".json")
    check_replaceable(beside, partial(read_json, schema=dict[str, Point]), args.output)
    arms = collect(args.folders)
    if args.ceiling is not None and args.ceiling not in arms:
        raise ValueError(f"--ceiling is {args.ceiling!r}; the arms are {', '.join(arms)}")
    points = {name: point(name, arm) for name, arm in arms.items()}
    if args.ceiling is not None:
        points |= ceiling(args.ceiling, arms[args.ceiling])
    write_text(beside, json.dumps(points, indent=1) + "\n")
    draw_points(points, args.output)
    return points


def _correct(name: str, arm: dict) -> tuple[dict[tuple, float], dict[str, float]]:
    """An arm's verdicts by prompt and image, and what a picture costs."""
    apart = {prompt for prompt, categories in arm["categories"].items() if categories == [APART]}
    values = {key: row.get("correct") for key, row in arm["values"].items() if key[0] not in apart}
    costs = arm["costs"]
    if None in values.values() or not {"whole_passes", "truncated_passes", "seconds"} <= costs.keys():
        raise ValueError(f"{name} lacks the oracle's verdicts, or the passes and seconds that generate records")
    return values, {"passes": costs["whole_passes"] + costs["truncated_passes"], "seconds": costs["seconds"]}


def point(name: str, arm: dict) -> dict:
    """An arm's passes and seconds a picture, and share of correct pictures."""
    values, cost = _correct(name, arm)
    prompts = np.array([prompt for prompt, _ in values])
    return cost | {"correct": crossed_bootstrap(np.array(list(values.values()))[None], prompts)}


def ceiling(name: str, arm: dict) -> dict:
    """Best-of-N if the oracle chose: N times the cost, the share of prompts of which one of N pictures is correct."""
    values, cost = _correct(name, arm)
    groups: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        groups.setdefault(prompt, []).append(value)
    found = {}
    for count in range(1, min(map(len, groups.values())) + 1):
        any_of = [np.mean([max(chosen) for chosen in combinations(group, count)]) for group in groups.values()]
        mean = crossed_bootstrap(np.array(any_of)[None], np.array(list(groups)))
        times = {unit: count * value for unit, value in cost.items()}
        found[f"best of {count} by the oracle"] = times | {"correct": mean}
    return found


def draw_points(points: dict[str, dict], path: Path) -> None:
    """The figure: a point an arm, named at the side in the order of passes, the oracle's choice as a line."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    line = [p for name, p in points.items() if name.endswith("by the oracle")]
    drawn = {name: p for name, p in points.items() if not name.endswith("by the oracle")}
    for axis, unit in zip(axes, ("passes", "seconds"), strict=True):
        if line:
            ends = [p[unit] for p in line], [100 * p["correct"][0] for p in line]
            axis.plot(*ends, "--", color="gray", label="best of N, chosen by the oracle")
        for k, (name, p) in enumerate(sorted(drawn.items(), key=lambda item: item[1]["passes"])):
            mean, low, high = (100 * value for value in p["correct"])
            style = {"color": f"C{k % 10}", "fmt": "osD^v"[k // 10 % 5], "capsize": 3}
            axis.errorbar(p[unit], mean, [[mean - low], [high - mean]], label=f"{name}: {mean:.1f}", **style)
        axis.set(xlabel=f"{unit} a picture", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="correct pictures, %")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, title="from few to many passes"
    )
    figure.savefig(path, dpi=90)
