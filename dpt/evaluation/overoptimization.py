"""`evaluate.py overoptimization`: how far does following a score make more pictures correct?

    python evaluate.py experiment configs/tables/shapes_overoptimization.yaml
    python evaluate.py overoptimization outputs/overoptimization/shapes-val-10/* --output outputs/overoptimization.png

The folders are arms that follow the gradient of adapters' scores by several lengths (`correction_norm`). Of each
adapter the shortest length is the zero point: make it so short that it changes nothing. The figure shows, by adapter,
points of correct pictures that a length gains against the rise of the score at the last corrected step, in standard
deviations of the zero point's scores (Gao et al. 2023, "Scaling laws for reward model overoptimization", figure 1).
"""

import argparse
import json
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from dpt.bounds import Bounds
from dpt.evaluation.arms import read_settings
from dpt.evaluation.pack import read_arm
from dpt.files import read_json, write_text
from dpt.images import read_metadata
from dpt.metrics import bootstrap_interval
from dpt.results import check_figure, check_replaceable

LENGTHS = Bounds(above=0, at_most=1e3)


class Length(msgspec.Struct, forbid_unknown_fields=True):
    """An adapter, followed by one length."""

    length: float
    """share of the latent's norm"""
    score: float
    """its rise, in standard deviations"""
    correct: list[float]
    """points gained: mean, low and high end of the 95 % interval over prompts"""
    malformed: float
    """points"""


def run(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Writes the figure and its numbers; returns them: adapter -> its lengths.

    Raises:
        ValueError: folders that cannot be used.
    """
    check_figure(args.output)
    beside = args.output.with_suffix(".json")
    check_replaceable(beside, partial(read_json, schema=dict[str, list[Length]]), args.output)
    lengths: dict[str, dict[float, Path]] = {}
    alike: dict[str, dict] = {}  # the other settings of an adapter's arms
    for folder in args.folders:
        settings = read_settings(folder)
        length = settings.get("correction_norm")
        if not length or length not in LENGTHS:
            raise ValueError(f"{folder} is of no correction_norm; name arms that follow a score by a length")
        adapter = settings.get("dpt")
        row = lengths.setdefault(adapter, {})
        others = {name: value for name, value in settings.items() if name not in ("correction_norm", "weights")}
        if alike.setdefault(adapter, others) != others:
            raise ValueError(f"{folder} differs from the other arms of its adapter in more than correction_norm")
        if length in row:
            raise ValueError(f"{folder} and {row[length]} follow one adapter by one length")
        row[length] = folder
    found = {adapter: measured(row) for adapter, row in lengths.items()}
    numbers = msgspec.to_builtins(found)
    write_text(beside, json.dumps(numbers, indent=1) + "\n")
    draw(found, args.output)
    return numbers


def measured(folders: dict[float, Path]) -> list[Length]:
    """The lengths of one adapter above its shortest.

    Raises:
        ValueError: a single length, or folders of other pictures than the shortest's.
    """
    if len(folders) < 2:
        raise ValueError(f"{next(iter(folders.values()))} stands alone: its adapter needs a shorter length beside it")
    shortest, *others = sorted(folders)
    zero, before = last_scores(folders[shortest]), read_arm(folders[shortest])["values"]
    spread, rows = np.std(list(zero.values())), []
    if not spread:
        raise ValueError(f"{folders[shortest]} shows pictures of one score alone; draw more")
    for length in others:
        scores, values = last_scores(folders[length]), read_arm(folders[length])["values"]
        if lacking := {"correct", "malformed"} - set.intersection(
            *(set(row) for row in [*values.values(), *before.values()])
        ):
            raise ValueError(
                f"{folders[length]} has no figure {min(lacking)!r}: let `evaluate.py align --metrics oracle` judge it"
            )
        if values.keys() != before.keys():
            raise ValueError(f"{folders[length]} and {folders[shortest]} show other prompts or seeds")
        gains: dict[str, list[float]] = {}
        for key, row in values.items():
            gains.setdefault(key[0], []).append(100 * (row["correct"] - before[key]["correct"]))
        rise = np.mean([scores[key] - zero[key] for key in zero]) / spread
        malformed = 100 * np.mean([values[key]["malformed"] - before[key]["malformed"] for key in before])
        correct = list(bootstrap_interval([np.mean(own) for own in gains.values()]))
        rows.append(Length(length, float(rise), correct, float(malformed)))
    return rows


def last_scores(folder: Path) -> dict[tuple[str, int], float]:
    """By (prompt, seed), the score at the last corrected step."""
    found = {}
    for record in read_metadata(folder):
        if not record.get("scores"):
            raise ValueError(f"{folder} holds a picture of {record['prompt']!r} without scores of corrected steps")
        found[record["prompt"], record["seed"]] = record["scores"][-1]
    return found


def draw(found: dict[str, list[Length]], path: Path) -> None:
    """The figure: a line an adapter, from no length to its longest."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for adapter, rows in found.items():
        x = np.array([0, *(row.score for row in rows)])
        y, low, high = np.array([(0, 0, 0), *(row.correct for row in rows)]).T
        axis.errorbar(x, y, yerr=[y - low, high - y], fmt="o-", ms=4, elinewidth=0.5, label=adapter)
        for row in rows:
            axis.annotate(f"{row.length:g}", (row.score, row.correct[0]), xytext=(3, 4), textcoords="offset points")
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(xlabel="rise of the score, standard deviations", ylabel="points of correct pictures gained")
    axis.grid(alpha=0.3)
    axis.legend(title="length: share of the latent's norm")
    figure.savefig(path, dpi=110)
