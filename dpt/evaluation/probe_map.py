"""`evaluate.py probe-map`: which block, at which noise, tells a true caption from a false one?

    python evaluate.py probe-map configs/shapes/probe_map.yaml --output outputs/probe-map

Trains a probe on each block of the denoiser, and beside each the controls of --controls: ordinary runs of
`train_probe.py`, in <output>/runs/<control>_<block>. Then measures ITM accuracy (mean of both sides, chance 50 %), its
selectivity (minus the best control's) and REC precision, block by block and timestep by timestep. Writes
probe_map.json, .md and .png, of the controls that this call names; after a kill the same command goes on.
"""

import argparse
import gc
import json
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from matplotlib.figure import Figure

from dpt.backbones.blocks import parse_feature
from dpt.checkpoint.checkpoint import checkpoints
from dpt.config import load_config
from dpt.evaluation.generate import process_state
from dpt.evaluation.probes import (
    Measured,
    Measurement,
    cell,
    check_has_val_sets,
    check_timesteps,
    load_base,
    measure_all,
)
from dpt.files import read_json, write_text
from dpt.metrics import Interval, bootstrap_interval
from dpt.results import check_replaceable, figure_beside, markdown_table, page_of, record_section
from dpt.training.run_folder import is_finished, set_damaged_aside
from dpt.training.settings import ModelSettings, TrainConfig, check_finished
from dpt.training.trainer import Trainer
from dpt.training.validation import PAPER_TIMESTEP

SECTION = "probe map"
CONTROL_NAMES = {
    "none": "the probe",
    "constant_text": "a constant vector for the pooled text",
    "empty_prompt": "the empty prompt for the U-Net",
}
PANELS = {
    "itm": "ITM accuracy, %",
    "selectivity": "ITM selectivity, points",
    "rec": "REC precision@1, %",
}


class Cell(TypedDict):
    """A block at a timestep in probe_map.json; selectivity is the probe's own."""

    itm: Interval
    rec: Interval
    selectivity: NotRequired[float]


def run(args: argparse.Namespace) -> dict:
    """Trains what is left to train, measures, draws; returns control -> block -> timestep -> figures.

    Raises:
        ValueError: a config that cannot be used, runs of other settings, or another's files in the folder.
    """
    schema, figures = dict[str, dict[str, dict[str, Cell]]], [args.output / f"probe_map.{end}" for end in ("md", "png")]
    check_replaceable(args.output / "probe_map.json", partial(read_json, schema=schema), *figures)
    if args.record:
        figure_beside(page_of(args.record, SECTION), "probe_map.png")
    config = load_config(TrainConfig, args.config, args.overrides)
    check_settings(config)
    sd = load_base(config)
    timesteps, blocks = check_timesteps(args.timesteps, sd), parse_feature("all", sd.denoiser.config)
    del sd  # each run loads its own
    controls = dict.fromkeys(["none", *args.controls])
    what = Measurement(
        checkpoints=[train(config, args.output / "runs", c, b) for c in controls for b in blocks],
        config=args.config,
        output=args.output,
        set=args.overrides,
        num_samples=args.num_samples,
        timesteps=timesteps,
    )
    result = summary(measure_all(what, "itm", {"": []}), measure_all(what, "rec", {"": []}), args.timesteps)
    write_text(args.output / "probe_map.json", json.dumps(result, indent=1) + "\n")
    write_text(args.output / "probe_map.md", markdown(result))
    draw_maps(result, args.output / "probe_map.png")
    print(markdown(result))
    if args.record:
        record(args, result)
    return result


def train(config: TrainConfig, folder: Path, control: str, block: str) -> Path:
    """Trains the probe of one block under one control, or goes on with it; returns its run folder."""
    name, model = f"{control}_{block}", replace(config.model, feature=block)
    config = replace(config, run_name=name, output_folder=str(folder), control=control, model=model)
    run = folder / name
    set_damaged_aside(run)
    if checkpoints(run):
        check_finished(config, load_config(TrainConfig, run / "config.yaml"))
    if not is_finished(config):
        config.resume = run.exists()
        Trainer(config, "probe").train()
        gc.collect()  # else the model stays until the next collection, beside the next run's
    return run


def record(args: argparse.Namespace, result: dict) -> None:
    """Puts the map into its section of a page, its figure beside the page."""
    page = page_of(args.record, SECTION)
    shutil.copy(args.output / "probe_map.png", figure_beside(page, "probe_map.png"))
    command = ["python", "evaluate.py", *args.words]
    text = f"![Blocks and timesteps](probe_map.png)\n\n{markdown(result)}"
    record_section(page, SECTION, shlex.join(command), text)


def check_settings(config: TrainConfig) -> None:
    """Raises ValueError for settings that the map sets itself."""
    check_has_val_sets(config)
    refused = {
        "control": (config.control, "none", "--controls names the controls"),
        "init_from": (config.init_from, None, "the probes of all blocks begin untrained"),
        "data.trajectories": (config.data.trajectories, None, "trajectories have no hard negatives to match"),
        "model.feature": (config.model.feature, ModelSettings.feature, "all blocks are probed"),
    }
    for name, (value, possible, reason) in refused.items():
        if value != possible:
            raise ValueError(f"{name} is {value}; probe-map takes {possible}: {reason}")
    if process_state().num_processes > 1:
        raise ValueError("probe-map trains in one process: start it with python, not with accelerate launch")


def summary(itm: list[Measured], rec: list[Measured], timesteps: list[int]) -> dict:
    """control -> block -> timestep -> figures, from the records of runs named <control>_<block>."""
    result: dict = {}
    for of_itm, of_rec in zip(itm, rec, strict=True):
        (matches,), boxes = of_itm.records.values(), next(iter(of_rec.records.values()))
        control, block = of_itm.name.rsplit("_", 1)
        cells = result.setdefault(control, {}).setdefault(block, {})
        for timestep in timesteps:
            right = [(r["text"] + r["image"]) / 2 for r in matches if r["timestep"] == timestep]
            hits = [r["precision_at_1"] for r in boxes if r["timestep"] == timestep]
            cells[str(timestep)] = {
                "itm": bootstrap_interval(np.array(right)),
                "rec": bootstrap_interval(np.array(hits, float)),
            }
    controls = [control for control in result if control != "none"]
    for block, cells in result["none"].items():
        for timestep, figures in cells.items() if controls else ():
            best = max(result[control][block][timestep]["itm"][0] for control in controls)
            figures["selectivity"] = figures["itm"][0] - best
    return result


def grids(result: dict) -> dict[str, np.ndarray]:
    """Panel -> (timesteps, blocks) in percent, of the probe itself."""
    blocks = result["none"]
    timesteps = list(next(iter(blocks.values())))
    found = {}
    for panel in PANELS:
        values = [[cells[t].get(panel) for cells in blocks.values()] for t in timesteps]
        if values[0][0] is not None:
            means = [[value[0] if isinstance(value, tuple | list) else value for value in row] for row in values]
            found[panel] = 100 * np.array(means)
    return found


def markdown(result: dict) -> str:
    """A table a panel, blocks down and timesteps across; and one of the probe beside its controls at t = 500."""
    blocks, parts, paper = list(result["none"]), [], str(PAPER_TIMESTEP)
    timesteps = list(result["none"][blocks[0]])
    for panel, grid in grids(result).items():
        cells = [[block, *(f"{value:.1f}" for value in row)] for block, row in zip(blocks, grid.T, strict=True)]
        table = markdown_table(["block", *(f"t = {t}" for t in timesteps)], cells)
        parts.append(f"{PANELS[panel]}, by block:\n\n{table}")
    if paper in timesteps:  # selectivity is a difference of these
        cells = [[block, *(cell(row[block][paper], "itm") for row in result.values())] for block in blocks]
        table = markdown_table(["block", *(CONTROL_NAMES.get(control, control) for control in result)], cells)
        parts.append(f"ITM accuracy at t = {paper}, %, by block:\n\n{table}")
    return "\n".join(parts)


def draw_maps(result: dict, path: Path) -> None:
    """The panels as heat maps with numbers."""
    blocks, found = list(result["none"]), grids(result)
    timesteps = list(result["none"][blocks[0]])
    figure = Figure(figsize=(5.2 * len(found), 3.6), layout="constrained")
    for axis, (panel, grid) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
        image = axis.imshow(grid, cmap="viridis", aspect="auto")
        axis.set(title=PANELS[panel], xticks=range(len(blocks)), yticks=range(len(timesteps)), ylabel="timestep")
        axis.set_xticklabels(blocks, rotation=45)
        axis.set_yticklabels(timesteps)
        middle = (grid.min() + grid.max()) / 2
        for (r, c), value in np.ndenumerate(grid):
            color = "black" if value > middle else "white"
            axis.text(c, r, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=110)
