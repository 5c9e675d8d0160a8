"""The matching score of every step of a drawing, written to files."""

import contextlib
import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dpt.drawing import Drawing
from dpt.images import legible, numbered


def trace_of(job: dict, drawings: dict[str, Drawing]) -> dict:
    """A picture's trace: prompt, seed, and for each arm the values of every step."""
    fields = ("timestep", "score", "length", "relative_length")
    return {"prompt": job["prompt"], "seed": job["seed"]} | {
        arm: {name: [record[name] for record in drawing.trace] for name in fields} for arm, drawing in drawings.items()
    }


def write_traces(outdir: Path, traces: list[dict]) -> None:
    """Writes trace-NNNN.json with all images, and a figure of the first six beside it."""
    for path in numbered(outdir, "trace-{:04d}.json"):
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            json.dump(traces, file, indent=1)
            break
    shown = traces[:6]
    figure = Figure(figsize=(3.2 * len(shown), 2.8), layout="constrained")
    for axis, image in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        for arm in (name for name in ("corrected", "uncorrected") if name in image):
            axis.plot(image[arm]["score"], label=arm)
        axis.set(xlabel="step", ylabel="matching score")
        axis.set_title(
            f"{textwrap.shorten(legible(image['prompt']), 40, placeholder=' ...')} ({image['seed']})",
            fontsize=8,
            parse_math=False,
        )
        axis.legend(fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"scores: {path} and {path.with_suffix('.png').name}")
