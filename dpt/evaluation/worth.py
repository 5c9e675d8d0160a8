"""`evaluate.py worth`: do verifiers that tell right pictures from wrong ones also make more pictures right?

    python evaluate.py worth outputs/choose-verifiers --arms outputs/tables/verifiers/* --against base \
        --output outputs/worth.png

The folder is one of `evaluate.py choose` with several adapters. Each adapter's area under the curve within prompts is
taken on every other prompt, and the points that choosing by it gains on the prompts between, so that no picture counts
for both. An arm of `generate` that draws with the adapter gives the points that following its gradient gains. For
either gain: the slope over adapters, points for 0.1 of area, with a 95 % interval that resamples adapters, the
correlation, and how often a permutation of the adapters has one as far from 0. Writes the figure and its numbers.

Accuracies that `evaluate.py itm` and `rec` measured, of checkpoints named as the arms, are asked the same: do they
predict the gains?
"""

import argparse
import json
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from dpt.choosing_rules import rounds, stop_of
from dpt.evaluation.arms import folder_name, read_settings
from dpt.evaluation.choose import CFG, PREDICTED, Candidate, simulate
from dpt.evaluation.pack import collect
from dpt.evaluation.probes import Summary
from dpt.files import read_json, read_json_lines, write_text
from dpt.metrics import area_within_prompts, bootstrap_interval
from dpt.results import check_figure, check_replaceable

LEAST_VERIFIERS = 5
ACCURACIES = {"text", "image", "precision_at_1"}
"""columns of `itm` and `rec` that may predict gains"""


class Worth(msgspec.Struct, forbid_unknown_fields=True):
    """The file beside the figure."""

    verifiers: dict[str, dict[str, list[float] | dict[str, float]]]
    """adapter -> area and gains in points, each with the ends of the 95 % interval over prompts; and `accuracies`"""
    fits: dict[str, dict[str, float | list[float]]]
    """gain -> slope (points for 0.1 of area), its interval, correlation, p; "gain by accuracy" -> the same"""


def run(args: argparse.Namespace) -> dict:
    """Writes the figure and its numbers; returns the fits.

    Raises:
        ValueError: files that cannot be used, or too few adapters.
    """
    check_figure(args.output)
    beside = args.output.with_suffix(".json")
    check_replaceable(beside, partial(read_json, schema=Worth), args.output)
    candidates = read_json_lines(args.folder / "candidates.jsonl", Candidate)
    verifiers = areas_and_choices(candidates, args.candidates, args.choose_at)
    if args.arms:
        gains = gradient_gains(args.arms, args.against)
        if unknown := gains.keys() - verifiers.keys():
            raise ValueError(f"--arms draws with {min(unknown)}; {args.folder} has {', '.join(verifiers)}")
        for name, gain in gains.items():
            verifiers[name]["gradient"] = gain
    fits = {}
    for gain in ("choosing", "gradient"):
        if points := [(row["area"][0], row[gain][0]) for row in verifiers.values() if gain in row]:
            fits[gain] = fit(*np.array(points).T)
    by_area = dict(fits)
    if args.measured and not args.arms:
        raise ValueError("--measured is of checkpoints named as the arms: name these with --arms")
    if args.measured:
        for name, accuracies in measured_at_500(args.measured, adapters_of(args.arms)).items():
            verifiers[name]["accuracies"] = accuracies
        fits |= fits_of_accuracies(verifiers)
    numbers = {"verifiers": verifiers, "fits": fits}
    write_text(beside, json.dumps(numbers, indent=1) + "\n")
    draw(verifiers, by_area, args.output)
    return fits


def areas_and_choices(candidates: list[Candidate], count: int, choose_at: float) -> dict[str, dict]:
    """Of each adapter the area on the even prompts, and the gain of choosing one of `count` on the odd ones.

    Raises:
        ValueError: too few adapters, or prompts that have fewer candidates than others.
    """
    if not candidates:
        raise ValueError("there are no candidates: let `evaluate.py choose` draw some")
    rows: dict[str, list[Candidate]] = {}
    for one in sorted(candidates, key=lambda c: c.category):
        rows.setdefault(one.prompt, []).append(one)
    names = [name for name in candidates[0].scores if name not in (CFG, PREDICTED)]
    num_steps = len(candidates[0].scores[names[0]]) if names else 0
    if len(names) < LEAST_VERIFIERS:
        raise ValueError(f"{len(names)} adapters were asked; a line through them needs at least {LEAST_VERIFIERS}")
    most = max(map(len, rows.values()))
    if short := [prompt for prompt, row in rows.items() if len(row) < most]:
        raise ValueError(f"{short[0]!r} has fewer candidates than others: let `evaluate.py choose` finish")
    if most < count:
        raise ValueError(f"--candidates is {count}; the prompts have {most}")
    values = np.array([[c.value for c in row] for row in rows.values()])  # (P, N)
    whole = values[1::2, : values.shape[1] // count * count].mean(1)
    found = {}
    for name in names:
        scores = np.array([[c.scores[name] for c in row] for row in rows.values()], float)  # (P, N, steps)
        areas = area_within_prompts(scores[::2, :, stop_of(choose_at, num_steps) - 1], values[::2])
        kept = simulate(scores[1::2], values[1::2], count, rounds(num_steps, count, (choose_at,)))
        gain = 100 * (kept.mean(1) - whole)
        found[name] = {"area": list(bootstrap_interval(areas)), "choosing": list(bootstrap_interval(gain))}
    return found


def gradient_gains(folders: list[Path], against: str) -> dict[str, list[float]]:
    """By adapter, the points of correct pictures that an arm has above another on the same prompts and seeds."""
    arms = collect(folders)
    if against not in arms:
        raise ValueError(f"--against is {against!r}; the arms are {', '.join(arms)}")
    base, found, adapters = arms.pop(against)["values"], {}, adapters_of(folders)
    for name, arm in arms.items():
        if arm["values"].keys() != base.keys():
            raise ValueError(f"{name} and {against} show other prompts or seeds")
        if not all("correct" in row for row in [*arm["values"].values(), *base.values()]):
            raise ValueError(f"{name} or {against} lacks verdicts: let `evaluate.py align --metrics oracle` judge them")
        by_prompt: dict[str, list[float]] = {}
        for key, row in arm["values"].items():
            by_prompt.setdefault(key[0], []).append(100 * (row["correct"] - base[key]["correct"]))
        found[adapters[name]] = list(bootstrap_interval([np.mean(gains) for gains in by_prompt.values()]))
    return found


def adapters_of(folders: list[Path]) -> dict[str, str | None]:
    """Name of an arm -> the adapter that it draws with.

    Raises:
        ValueError: a path that is no arm's folder.
    """
    return {folder_name(folder): read_settings(folder).get("dpt") for folder in folders}


def measured_at_500(files: list[Path], adapters: dict[str, str]) -> dict[str, dict[str, float]]:
    """Accuracies at the paper's timestep by adapter, from files of `evaluate.py itm` and `rec`.

    Args:
        adapters: name of an arm -> the adapter that it draws with.

    Raises:
        ValueError: a file that cannot be read, or an arm of which it has nothing.
    """
    found: dict[str, dict[str, float]] = {}
    for path in files:
        for samples, rows in read_json(path, Summary).items():
            if ":" in samples:  # a kind of negative alone
                continue
            for name, adapter in adapters.items():
                if adapter is None:  # the model alone
                    continue
                if name not in rows:
                    raise ValueError(f"{path} has nothing of {name}; measure checkpoints under the names of the arms")
                for column in sorted(ACCURACIES & rows[name].keys()):
                    found.setdefault(adapter, {})[f"{samples} {column}"] = rows[name][column]["t500"][0]
    return found


def fits_of_accuracies(verifiers: dict[str, dict]) -> dict[str, dict]:
    """The fit of every gain to every accuracy, over the adapters that have both."""
    rows, found = [row for row in verifiers.values() if "accuracies" in row], {}
    for name in sorted({name for row in rows for name in row["accuracies"]}):
        for gain in ("choosing", "gradient"):
            points = [
                (row["accuracies"][name], row[gain][0]) for row in rows if gain in row and name in row["accuracies"]
            ]
            if len(points) >= LEAST_VERIFIERS:
                found[f"{gain} by {name}"] = fit(*np.array(points).T)
    return found


def fit(areas: np.ndarray, gains: np.ndarray) -> dict:
    """The line through adapters, (V,) each: its slope for 0.1 of area, the interval, correlation and p."""

    def slope(x, y):
        return 0.1 * stats.linregress(x, y).slope if np.ptp(x) else 0.0  # a resample of one adapter alone has none

    def correlation(x, axis):
        return stats.zscore(x, axis=axis) @ stats.zscore(gains) / len(gains)

    rng = np.random.default_rng(0)
    interval = stats.bootstrap((areas, gains), slope, paired=True, method="percentile", n_resamples=2000, rng=rng)
    null = stats.permutation_test((areas,), correlation, permutation_type="pairings", n_resamples=10_000, rng=rng)
    return {
        "slope": float(slope(areas, gains)),
        "interval": [float(x) for x in interval.confidence_interval],
        "correlation": float(null.statistic),
        "p": float(null.pvalue),
        "verifiers": len(areas),
    }


def draw(verifiers: dict[str, dict], fits: dict[str, dict], path: Path) -> None:
    """The figure: a point an adapter with the intervals of either figure, and the line through them."""
    figure = Figure(figsize=(5 * len(fits), 4.5), layout="constrained")
    for axis, (gain, found) in zip(
        np.atleast_1d(figure.subplots(1, len(fits), sharex=True)), fits.items(), strict=True
    ):
        rows = np.array([[row["area"], row[gain]] for row in verifiers.values() if gain in row])  # (V, 2, 3)
        (x, x_low, x_high), (y, y_low, y_high) = rows.transpose(1, 2, 0)
        bars = {"xerr": [x - x_low, x_high - x], "yerr": [y - y_low, y_high - y]}
        axis.errorbar(x, y, **bars, fmt="o", ms=4, elinewidth=0.5, alpha=0.7)
        ends = np.array([x.min(), x.max()])
        axis.plot(ends, y.mean() + 10 * found["slope"] * (ends - x.mean()), color="black", lw=1)
        low, high = found["interval"]
        title = f"{found['slope']:.1f} points for 0.1 ({low:.1f} to {high:.1f}), r = {found['correlation']:.2f}"
        axis.set(xlabel="area under the curve within prompts", ylabel=f"points gained by {gain}", title=title)
        axis.axhline(0, color="grey", lw=0.8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
