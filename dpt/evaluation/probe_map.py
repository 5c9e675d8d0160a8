"""`evaluate.py probe-map`: where, and at which noise, does the U-Net know what is true?

    python evaluate.py probe-map configs/shapes/probe_map.yaml --output outputs/probe-map

Trains an adapter on each of the nine blocks in one run, from one pass of the frozen U-Net a step, and beside each the
controls of --controls; then measures ITM accuracy (mean of both sides, chance 50 %), its selectivity (minus the best
control's) and REC precision, block by block and timestep by timestep. Writes probe_map.json, .md and .png; after a
kill the same command goes on. The config is a training config: model, adapter, data, optim.
"""

import argparse
import json
import math
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.backbones.blocks import parse_feature
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.config import AdapterConfig, load_config, save_config
from dpt.data.collate import as_latents, encode_batch
from dpt.data.loader import micro_batches
from dpt.data.sources import training_samples, validation_samples
from dpt.device import WEIGHT_DTYPES
from dpt.evaluation.flags import SAME_FEATURES
from dpt.evaluation.generate import process_state
from dpt.evaluation.probes import autocast, cell, check_timesteps, load_base
from dpt.files import read_json, write_text
from dpt.metrics import Interval, bootstrap_interval
from dpt.model import DPT
from dpt.rec_text import load_rec_text_encoder
from dpt.results import check_replaceable, figure_beside, markdown_table, page_of, record_section
from dpt.tasks.task import passes_of
from dpt.training.assembly import adapter_config, encode_options
from dpt.training.controls import control_batch, control_inputs, control_unet
from dpt.training.plain_loop import train_stage
from dpt.training.settings import ModelSettings, TrainConfig
from dpt.training.validation import PAPER_TIMESTEP, batches_to_measure

SECTION = "probe map"
DECAY = {"constant": 0.0, "linear": 1.0}
"""schedule -> share of the steps over which the learning rate falls to zero"""
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
        ValueError: a config that cannot be used, a folder begun with another, or another's files in it.
    """
    schema, figures = dict[str, dict[str, dict[str, Cell]]], [args.output / f"probe_map.{end}" for end in ("md", "png")]
    check_replaceable(args.output / "probe_map.json", partial(read_json, schema=schema), *figures)
    if args.record:
        figure_beside(page_of(args.record, SECTION), "probe_map.png")
    config = load_config(TrainConfig, args.config, args.overrides)
    check_settings(config)
    _claim(args, config)
    probes = ProbeMap(config, tuple(args.controls))
    check_timesteps(args.timesteps, probes.sd)
    samples = training_samples(config.data, probes.sd, seed=config.seed)
    optim = config.optim
    steps = optim.steps if optim.epochs is None else math.ceil(optim.epochs * len(samples) / optim.batch_size)
    train_stage(
        "probe_map",
        args.output,
        probes.adapters,
        partial(_losses_at, probes, samples),
        steps=steps,
        lr=optim.lr,
        warmup=optim.warmup_steps,
        decay=DECAY[optim.schedule],
        ema=0.0,
        weight_decay=optim.weight_decay,
        betas=tuple(optim.betas),
        max_grad_norm=optim.max_grad_norm,
        precision=WEIGHT_DTYPES[optim.mixed_precision],
        clip_groups=[list(adapter.parameters()) for adapter in probes.adapters.values()],
        save_every=config.checkpoints.every,
    )
    sets = validation_samples(config.data, probes.sd, num_samples=args.num_samples)
    rec_name = next(name for name in sets if name.startswith("rec_"))
    tasks = {"itm": sets["itm"], "rec": sets[rec_name]}
    result = probes.measure(tasks, list(args.timesteps), num_samples=args.num_samples)
    write_text(args.output / "probe_map.json", json.dumps(result, indent=1) + "\n")
    write_text(args.output / "probe_map.md", markdown(result))
    draw_maps(result, args.output / "probe_map.png")
    print(markdown(result))
    if args.record:
        record(args, result)
    return result


def record(args: argparse.Namespace, result: dict) -> None:
    """Puts the map into its section of a page, its figure beside the page."""
    page = page_of(args.record, SECTION)
    shutil.copy(args.output / "probe_map.png", figure_beside(page, "probe_map.png"))
    command = ["python", "evaluate.py", *args.words]
    text = f"![Blocks and timesteps](probe_map.png)\n\n{markdown(result)}"
    record_section(page, SECTION, shlex.join(command), text)


def check_settings(config: TrainConfig) -> None:
    """Raises ValueError at settings that this training does not take."""
    optim = config.optim
    refused = {
        "control": (config.control, ("none",), "--controls names the controls"),
        "init_from": (config.init_from, (None,), "adapters of all blocks begin untrained"),
        "model.feature": (config.model.feature, (ModelSettings.feature,), "all blocks are probed"),
        "adapter.normalize_features": (config.adapter.normalize_features, (False,), "features are not measured first"),
        "data.trajectories": (config.data.trajectories, (None,), "trajectories have no hard negatives to match"),
        "optim.mixed_precision": (optim.mixed_precision, ("no", "bf16"), "losses are not scaled, as fp16 needs"),
        "optim.schedule": (optim.schedule, tuple(DECAY), "the learning rate falls on a line, or not at all"),
        "optim.gradient_accumulation_steps": (optim.gradient_accumulation_steps, (1,), "a step is one batch"),
    }
    for name, (value, possible, reason) in refused.items():
        if value not in possible:
            raise ValueError(f"{name} is {value}; probe-map takes {' or '.join(map(str, possible))}: {reason}")


def _claim(args: argparse.Namespace, config: TrainConfig) -> None:
    path = args.output / "config.yaml"
    config = replace(config, run_name=" ".join(args.controls) or "none")
    if path.exists() and load_config(TrainConfig, path) != config:
        raise ValueError(f"{args.output} was begun with other settings; choose another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    save_config(config, path)


class ProbeMap(nn.Module):
    """An adapter for each control ("none" is the probe itself) and block."""

    def __init__(self, config: TrainConfig, controls: tuple[str, ...]):
        super().__init__()
        self.config, self.sd = config, load_base(config)
        self.blocks = parse_feature("all", self.sd.denoiser.config)
        self.rec_text = load_rec_text_encoder(
            config.model.rec_text_encoder,
            self.sd,
            with_model=bool(config.loss.weights.contrastive_align),
            local_files_only=config.model.local_files_only,
        )
        self.adapters = nn.ModuleDict()
        self.readers: dict[str, DPT] = {}
        self.bases: dict[str, StableDiffusion] = {}
        for control in ("none", *controls):
            self.bases[control] = replace(self.sd)
            control_unet(control, self.bases[control])
            for block in self.blocks:
                torch.manual_seed(config.seed)  # blocks and controls differ in nothing but what they are given
                self.adapters[f"{control} {block}"] = DiscriminativeAdapter(self._adapter_config(block))
            self.readers[control] = self._reader(control, self.adapters[f"{control} {self.blocks[0]}"], self.blocks)
        self.adapters.to(process_state().device)

    def _adapter_config(self, block: str) -> AdapterConfig:
        return adapter_config(
            replace(self.config, model=replace(self.config.model, feature=block)),
            self.sd.denoiser.config,
            text_dim=self.sd.pooled_width,
            rec_text_dim=self.rec_text.width,
        )

    def _reader(self, control: str, adapter: DiscriminativeAdapter, blocks: tuple[str, ...]) -> DPT:
        denoiser, scheduler = self.bases[control].denoiser, self.sd.scheduler
        return DPT(denoiser, adapter, blocks, scheduler, train_denoiser=False, loss=self.config.loss)

    def _inputs(self, batch, *, training: bool, timesteps: tuple[int, int] | None = None):
        """For each control: the inputs of its adapters, and what the maps of its passes are read from."""
        options = encode_options(self.config, self.sd) if training else {"seed": 0, "timesteps": timesteps}
        batch = replace(batch, images=as_latents(batch.images, self.sd))  # once for all controls
        for control, sd in self.bases.items():
            given = control_batch(control, batch, sd)
            inputs = encode_batch(given, sd, self.rec_text, **options)
            yield control, control_inputs(control, inputs, given, sd, training=training)

    def _each_map(self, batch, passes: list, *, training: bool, timesteps: tuple[int, int] | None = None):
        """(control, block, a DPT of that adapter, its map of all passes, inputs), from as few U-Net passes as go."""
        maps = {}
        for control, inputs in self._inputs(batch, training=training, timesteps=timesteps):
            source = "none" if control in SAME_FEATURES else control
            if source not in maps:
                maps[source] = self.readers[source].features(inputs, passes, with_full=False)[0]
            for block, feature in zip(self.blocks, maps[source], strict=True):
                model = self._reader(control, self.adapters[f"{control} {block}"], (block,))
                yield control, block, model, feature, inputs

    def losses(self, batch, left_out: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """The weighted sum of each adapter's losses, but for those of the tasks that are left out."""
        weights, without = self.config.loss.weights, {"left_out": left_out}
        passes = passes_of(self.readers["none"].active(without))
        return {
            f"loss_{control}_{block}": weights.total(model.losses([feature], None, passes, inputs | without))
            for control, block, model, feature, inputs in self._each_map(batch, passes, training=True)
        }

    def measure(self, tasks: dict, timesteps: list[int], *, num_samples: int) -> dict:
        """Figures on val samples, by control, block and timestep: means with 95 % intervals."""
        self.eval()
        records: dict[tuple, list[dict]] = {}
        sizes = {"num_samples": num_samples, "batch_size": self.config.optim.batch_size}
        for name, samples in tasks.items():
            task = self.readers["none"].task(name)
            passes = list(task.measured)
            for _, of_batch, batch in batches_to_measure(samples, self.sd, task, **sizes):
                for timestep in timesteps:
                    with autocast(self.config):
                        for control, block, model, feature, inputs in self._each_map(
                            batch, passes, training=False, timesteps=(timestep, timestep)
                        ):
                            hs = model.read([feature], passes, inputs["timesteps"])
                            found = task.records(model.adapter, hs, inputs, of_batch)
                            records.setdefault((control, block, timestep, name), []).extend(found)
        return self._summary(records, timesteps)

    def _summary(self, records: dict, timesteps: list[int]) -> dict:
        result: dict = {}
        for control in self.bases:
            for block in self.blocks:
                cells = result.setdefault(control, {}).setdefault(block, {})
                for timestep in timesteps:
                    itm = [(r["text"] + r["image"]) / 2 for r in records[control, block, timestep, "itm"]]
                    rec = [r["precision_at_1"] for r in records[control, block, timestep, "rec"]]
                    cells[str(timestep)] = {
                        "itm": bootstrap_interval(np.array(itm)),
                        "rec": bootstrap_interval(np.array(rec, float)),
                    }
        controls = [control for control in self.bases if control != "none"]
        for block, cells in result["none"].items():
            for timestep, figures in cells.items() if controls else ():
                best = max(result[control][block][timestep]["itm"][0] for control in controls)
                figures["selectivity"] = figures["itm"][0] - best
        return result


def _losses_at(probes: ProbeMap, samples, step: int) -> dict[str, torch.Tensor]:
    optim, left_out = probes.config.optim, () if step % probes.config.loss.itm_every == 0 else ("itm",)
    batches = micro_batches(samples, step, batch_size=optim.batch_size, accumulation=1, seed=probes.config.seed)
    torch.manual_seed(step)  # dropout
    return probes.losses(next(batches), left_out)


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
