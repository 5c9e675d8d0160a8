"""Checkpoints measured on one set of samples, beside each other: the shared part of `evaluate.py itm` and `rec`.

A probe's *selectivity* is its figure minus that of the best control measured with it (Hewitt & Liang 2019). Controls
are checkpoints trained with `control=...` or `model.feature=latents`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypedDict, TypeVar

import msgspec
import numpy as np
import torch

from dpt.adapter.adapter import Scorer
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.stable_diffusion import StableDiffusion, weights_fingerprint
from dpt.checkpoint.checkpoint import DPTCheckpoint, load_checkpoint
from dpt.config import CONTROLS, load_config
from dpt.data.sources import validation_samples
from dpt.device import WEIGHT_DTYPES
from dpt.evaluation.flags import EARLY_TIMESTEPS
from dpt.evaluation.generate import process_state
from dpt.files import read_json, write_text
from dpt.metrics import Interval, crossed_bootstrap
from dpt.model import DPT
from dpt.rec_text import load_rec_text_encoder
from dpt.results import check_replaceable, markdown_table
from dpt.training.controls import control_unet
from dpt.training.settings import TrainConfig
from dpt.training.validation import FIGURES, PAPER_TIMESTEP, measure

Figures = TypedDict(
    "Figures", {"t500": Interval, "mean": Interval, "t500 against": str, "mean against": str}, total=False
)
Summary = dict[str, dict[str, dict[str, Figures]]]
"""Figures by set, checkpoint and column."""


class ItmRecord(TypedDict):
    """A sample at a timestep, as `dpt.training.validation` measures it: 1 where the truth wins, on either side."""

    id: int | str
    timestep: int
    text: float
    image: float
    kind: str


RecRecord = TypedDict(
    "RecRecord",
    {"id": int | str, "timestep": int, "index": int, "surest": tuple[float, float, float, float, float]}
    | {name: bool for name in FIGURES if "precision" in name},
)
"""a sample at a timestep: its index in its set, the surest box behind its objectness, whether boxes hit"""
RECORDS = {"itm": ItmRecord, "rec": RecRecord}
Record = TypeVar("Record")


class Kept(msgspec.Struct, Generic[Record]):
    """A file of measurements: the records of each set, and the weights, data and samples they are of."""

    identity: dict[str, str | int | list[int]]
    records: dict[str, list[Record]]


@dataclass(frozen=True)
class Measurement:
    """A measurement: its checkpoints, its samples, and the folder of its figures."""

    checkpoints: list[Path]
    config: Path
    """a training config: model, data, precision"""
    output: Path
    set: list[str] = field(default_factory=list)
    """changes of the config"""
    split: str = "val"
    num_samples: int = 500
    timesteps: list[int] = field(default_factory=lambda: [*EARLY_TIMESTEPS])
    """whose mean stands beside the paper's timestep"""


def measurement_of(args: argparse.Namespace) -> Measurement:
    """The measurement that the flags of `itm` and `rec` ask for."""
    return Measurement(**{entry.name: getattr(args, entry.name) for entry in fields(Measurement)})


@dataclass
class Measured:
    """One checkpoint, and for each set a record a sample and timestep."""

    name: str
    control: str
    """none for a probe"""
    records: dict[str, list[dict]]


def check_has_val_sets(config: TrainConfig) -> None:
    """Raises ValueError where a config has no samples that ITM and REC could be measured on."""
    if config.data.kind == "trajectories":
        raise ValueError("data.kind is trajectories, which have neither hard negatives nor boxes: name another")


def load_base(config: TrainConfig) -> StableDiffusion:
    """The config's model, in its precision."""
    return load_stable_diffusion(
        config.model.name,
        revision=config.model.revision,
        no_t5=config.model.no_t5,
        local_files_only=config.model.local_files_only,
        dtype=WEIGHT_DTYPES[config.optim.mixed_precision],
        device=process_state().device,
    )


def autocast(config: TrainConfig) -> torch.autocast:
    """The autocast that training runs under, for measuring."""
    dtype = WEIGHT_DTYPES[config.optim.mixed_precision]
    return torch.autocast(process_state().device.type, dtype, enabled=dtype != torch.float32)


def load_scorer(checkpoint: DPTCheckpoint, config: TrainConfig) -> tuple[Scorer, StableDiffusion]:
    """A checkpoint on the config's model, with the denoiser of its control."""
    sd = load_base(config)
    control_unet(checkpoint.config.control, sd)
    return checkpoint.attach(sd, controls=CONTROLS), sd


def load_probe(checkpoint: DPTCheckpoint, config: TrainConfig) -> tuple[DPT, StableDiffusion]:
    """A checkpoint as the model that is measured, and the model that it stands on."""
    scorer, sd = load_scorer(checkpoint, config)
    model = DPT(
        sd.denoiser,
        scorer.adapter,
        scorer.blocks,
        sd.scheduler,
        train_denoiser=False,
        itm_layer=checkpoint.config.itm_layer,
    )
    return model, sd


def measure_all(what: Measurement, task: str, variants: dict[str, list[str]]) -> list[Measured]:
    """Measures every checkpoint on the val sets of each variant of the config; records on disk are read instead.

    Args:
        variants: label -> overrides of the config.

    Raises:
        ValueError: a checkpoint or config that cannot be used, or two checkpoints of one name.
    """
    configs = {label: load_config(TrainConfig, what.config, [*what.set, *more]) for label, more in variants.items()}
    for config in configs.values():
        check_has_val_sets(config)
    found: dict[str, Measured] = {}
    for path in what.checkpoints:
        name, checkpoint = _name(path), load_checkpoint(path)
        if name in found:
            raise ValueError(f"two checkpoints are named {name!r}; rename a folder")
        control = checkpoint.config.control
        if checkpoint.config.feature == "latents" and control == "none":
            control = "latents"
        found[name] = Measured(name, control, {})
        for label, config in configs.items():
            records = _measure(what, task, name, label, config, checkpoint)
            found[name].records |= {f"{label} {key}".strip(): rows for key, rows in records.items()}
    return list(found.values())


def _name(path: Path) -> str:
    return path.parent.parent.name if path.name.startswith("step_") else path.name


def _measure(what, task, name, label, config, checkpoint) -> dict[str, list[dict]]:
    model, sd = load_probe(checkpoint, config)
    timesteps = check_timesteps(what.timesteps, sd)

    def compute():
        rec_text = load_rec_text_encoder(
            config.model.rec_text_encoder, sd, with_model=False, local_files_only=config.model.local_files_only
        )
        sets = validation_samples(config.data, sd, num_samples=what.num_samples, split=what.split)
        with autocast(config):
            return {
                key.removeprefix(f"{task}_").removeprefix(task): measure(
                    model,
                    sd,
                    rec_text,
                    samples,
                    task=task,
                    timesteps=timesteps,
                    num_samples=what.num_samples,
                    batch_size=config.optim.batch_size,
                    control=checkpoint.config.control,
                )
                for key, samples in sets.items()
                if key.startswith(task)
            }

    weights = weights_fingerprint(*sd.parts.values(), model.adapter)
    return kept(what, f"{task}_{name}_{label or 'all'}", config, weights, compute)


def check_output(what: Measurement, task: str) -> None:
    """Raises ValueError where the output folder holds figures of that name that are not of this command."""
    figures = [what.output / f"{task}.md", *what.output.glob(f"{task}_*.png")]
    check_replaceable(what.output / f"{task}.json", partial(read_json, schema=Summary), *figures)


def check_timesteps(timesteps: list[int], sd: StableDiffusion) -> list[int]:
    """The timesteps and the paper's, in order. Raises ValueError where the model has no such timestep."""
    last = sd.scheduler.config.num_train_timesteps - 1
    for timestep in timesteps:
        if not 0 <= timestep <= last:
            raise ValueError(f"--timesteps holds {timestep}; this model's are 0 to {last}")
    return sorted({*timesteps, PAPER_TIMESTEP})


def kept(what: Measurement, name: str, config: TrainConfig, weights: str, compute: Callable[[], dict]) -> dict:
    """The records that `compute` gives, from disk if they are there for the same weights, data and samples."""
    identity = {
        "weights": weights,
        "data": repr(config.data),
        "precision": config.optim.mixed_precision,
        "split": what.split,
        "num_samples": what.num_samples,
        "timesteps": sorted(what.timesteps),
    }
    path = what.output / "records" / f"{name}_{what.split}.json"
    if path.exists():
        found = read_kept(path, name.partition("_")[0])
        if found.identity == identity:
            return found.records
    records = compute()
    write_text(path, json.dumps({"identity": identity, "records": records}))
    return records


def read_kept(path: Path, task: str) -> Kept:
    """The file of `kept`. Raises ValueError naming file and field, also where a sample lacks a timestep."""
    try:
        found = read_json(path, Kept[RECORDS[task]])
        for name, records in found.records.items():
            pairs = {(record["id"], record["timestep"]) for record in records}
            if len(pairs) < len({pair[0] for pair in pairs}) * len({pair[1] for pair in pairs}):
                raise ValueError(f"{path}: records: {name}: a sample lacks a timestep")
    except ValueError as error:
        raise ValueError(f"{error}; remove the file, and it is measured again") from error
    return found


def summary(measured: list[Measured], columns: list[str], timesteps: list[int]) -> dict:
    """Figures of all checkpoints, and the selectivity of probes.

    Returns:
        set -> name -> column -> "t500" or "mean" -> (mean, low, high); probes measured beside controls have
        `<column> selectivity` as well, with the control's name as its "against".
    """
    result: dict = {}
    for key in measured[0].records:
        rows = {one.name: (one, _by_id(one.records[key])) for one in measured}
        result[key] = {name: {} for name in rows}
        for column in columns:
            for label, chosen in (("t500", [PAPER_TIMESTEP]), ("mean", timesteps)):
                values = {name: _values(found, column, chosen) for name, (_, found) in rows.items()}
                ids = np.arange(len(next(iter(values.values()))))
                for name, row in values.items():
                    result[key][name].setdefault(column, {})[label] = crossed_bootstrap(row[None], ids)
                controls = {name: row for name, row in values.items() if rows[name][0].control != "none"}
                if controls:
                    best = max(controls, key=lambda name: controls[name].mean())
                    for name in values.keys() - controls.keys():
                        figure = crossed_bootstrap(values[name][None], ids, controls[best][None])
                        part = result[key][name].setdefault(f"{column} selectivity", {})
                        part |= {label: figure, f"{label} against": best}
    return result


def _by_id(records: list[dict]) -> dict[int, dict[int, dict]]:
    found: dict[int, dict[int, dict]] = {}
    for record in records:
        found.setdefault(record["id"], {})[record["timestep"]] = record
    return dict(sorted(found.items()))


def _values(found: dict[int, dict[int, dict]], column: str, timesteps: list[int]) -> np.ndarray:
    return np.array([np.mean([rows[t][column] for t in timesteps]) for rows in found.values()])  # (N,)


def markdown(result: dict, measured: list[Measured]) -> str:
    """The summary as tables, one a set, in percent; the column "without" names what a control lacks."""
    controls, parts = {one.name: one.control for one in measured}, []
    for key, rows in result.items():
        (name, *header), cells = laid_out(rows)
        if set(controls.values()) != {"none"}:
            header.insert(0, "without")
            cells = [[row[0], controls[row[0]].replace("none", ""), *row[1:]] for row in cells]
        samples = len({record["id"] for record in measured[0].records[key]})
        parts.append(f"**{key or 'all'}**, {samples} samples\n\n{markdown_table([name, *header], cells)}")
    return "\n".join(parts)


def laid_out(rows: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one set of the summary: a row a checkpoint, each figure at t = 500 and in the mean."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    header = ["checkpoint", *(f"{column}, {label}" for column in columns for label in ("t = 500", "mean"))]
    cells = [
        [name, *(cell(row.get(column, {}), label) for column in columns for label in ("t500", "mean"))]
        for name, row in rows.items()
    ]
    return header, cells


def cell(figures: dict, label: str) -> str:
    """A figure of the summary in percent, empty where there is none."""
    if label not in figures:
        return ""
    mean, low, high = (100 * value for value in figures[label])
    against = f" against {figures[f'{label} against']}" if f"{label} against" in figures else ""
    return f"{mean:.1f} ({low:.1f} to {high:.1f}){against}"


def write(what: Measurement, task: str, result: dict, measured: list[Measured]) -> dict:
    """Writes `<task>.json` and `<task>.md` into the output folder."""
    text = markdown(result, measured)
    write_text(what.output / f"{task}.json", json.dumps(result, indent=1) + "\n")
    write_text(what.output / f"{task}.md", text)
    print(text)
    return result


def split_by(measured: list[Measured], key: str) -> list[Measured]:
    """The checkpoints with further sets `<set>: <value>`, one for each value that the records hold under `key`."""
    parts = []
    for one in measured:
        records = dict(one.records)
        for name, rows in one.records.items():
            for value in sorted({row[key] for row in rows if row.get(key)}):
                records[f"{name or 'all'}: {value}"] = [row for row in rows if row[key] == value]
        parts.append(replace(one, records=records))
    return parts
