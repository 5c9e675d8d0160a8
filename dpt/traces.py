"""The matching score of every step of a drawing, written to files."""

import contextlib
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from dpt.images import legible, numbered


def image_traces(batch: list[dict], arm_traces: dict[str, list[dict]]) -> list[dict]:
    """A batch's traces, image by image: prompt, seed, and for each arm the values of every step."""
    fields = ("score", "length", "relative_length")
    return [
        {"prompt": job["prompt"], "seed": job["seed"]}
        | {
            arm: {"timestep": [r["timestep"] for r in steps]} | {f: [r[f][b] for r in steps] for f in fields}
            for arm, steps in arm_traces.items()
        }
        for b, job in enumerate(batch)
    ]


def write_traces(outdir: Path, traces: list[dict]) -> None:
    """trace-NNNN.json with all images, and then a figure of the first six beside it."""
    for path in numbered(outdir, "trace-{:04d}.json"):
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            json.dump(traces, file, indent=1)
            break
    figure, axes = plt.subplots(1, min(len(traces), 6), figsize=(3.2 * min(len(traces), 6), 2.8), layout="constrained")
    for axis, image in zip(np.atleast_1d(axes), traces, strict=False):
        for arm in ("corrected", "uncorrected"):
            axis.plot(image[arm]["score"], label=arm)
        axis.set(xlabel="step", ylabel="matching score")
        axis.set_title(f"{legible(image['prompt'])[:32]} ({image['seed']})", fontsize=8, parse_math=False)
        axis.legend(fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    print(f"scores: {path} and {path.with_suffix('.png').name}")
