"""Curves of a metrics file."""

import json
from pathlib import Path
from typing import Annotated

import msgspec
from matplotlib.figure import Figure

from dpt.files import read_json_lines, replacing, write_text

_APART = ("step", "seconds", "grad_norm", "lr", "samples_per_second", "peak_memory_mb", "skipped_steps")


Number = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    """The records of a metrics file: figures by name, of a step each.

    Raises:
        ValueError: a line is no record of a step; file, line and field are named.
    """
    records = read_json_lines(path, dict[str, Number])
    for n, record in enumerate(records, 1):
        if "step" not in record:
            raise ValueError(f"{path}, record {n}: object is missing required field step")
    return records


def drop_metrics_after(path: Path, step: int) -> None:
    """Removes the records after the step that a killed run goes on from, and a line that was cut off.

    Raises:
        ValueError: a file that is no metrics file; it stays as it is.
    """
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def plot_curves(metrics_path: Path, figure_path: Path) -> None:
    """Draws losses, and shares in [0, 1] with their intervals, against the step.

    A figure whose name holds "loss", or "total", is a loss; `x_low` and `x_high` are the interval of x.
    """
    records = read_metrics(metrics_path)
    names = [n for n in dict.fromkeys(n for r in records for n in r) if n not in _APART]
    names = [n for n in names if not n.endswith(("_low", "_high")) and "giou_precision" not in n]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in names:
        points = [r for r in records if name in r]
        steps, values = [r["step"] for r in points], [r[name] for r in points]
        sparse = len(points) < 60
        axis = axes[0] if "loss" in name or name == "total" else axes[1]
        (line,) = axis.plot(steps, values, "o-" if sparse else "-", lw=1.5 if sparse else 0.7, ms=3, label=name)
        if all(f"{name}_low" in r for r in points):
            bounds = [[r[f"{name}_{side}"] for r in points] for side in ("low", "high")]
            axis.fill_between(steps, *bounds, color=line.get_color(), alpha=0.15)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[1].set(xlabel="step", ylabel="share", ylim=(0, 1))
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=6)
    with replacing(figure_path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
