"""Validation: ITM accuracy and REC precision at fixed noise.

Pictures and texts that are compared share noise and timestep. The reference scores the captions of an image under
different noise.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.data.collate import Batch, Sample, as_latents, collate, encode_batch
from dpt.data.trajectories import RankedPrompts, encode_ranked
from dpt.metrics import bootstrap_interval
from dpt.model import DPT
from dpt.rec_text import RecTextEncoder
from dpt.tasks import all_tasks
from dpt.tasks.ranking import ranking_areas
from dpt.tasks.task import Task
from dpt.training.controls import control_batch, control_inputs
from dpt.training.settings import TrainConfig

PAPER_TIMESTEP = 500
FIGURES = tuple(figure for task in all_tasks() for figure in task.figures)


class Samples(Protocol):
    """Random access to samples; `dpt.shapes.samples` and `dpt.data.coco_samples` give it."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Sample: ...


def evenly_spread(count: int, num_samples: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
    """The k-th of n shares, `shard` being (k, n), of at most `num_samples` indices evenly spread over `count`."""
    return np.linspace(0, count - 1, min(num_samples, count)).round().astype(int)[shard[0] :: shard[1]]


def batches_to_measure(
    samples: Samples,
    sd: StableDiffusion,
    task: Task,
    *,
    num_samples: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[tuple[int, ...], tuple[Sample, ...], Batch]]:
    """Indices in the set, samples and batch of those samples whose `task` can be measured.

    The batch holds latents of the images that the task's metric compares.

    Args:
        num_samples: evenly spread over the set.
        shard: (k, n): this process's share.
    """
    num_images = 1 + max(one.image for one in task.measured)
    chosen = evenly_spread(len(samples), num_samples, shard)
    for start in range(0, len(chosen), batch_size):
        pairs = [(int(index), samples.get(int(index), 0)) for index in chosen[start : start + batch_size]]
        pairs = [(index, sample) for index, sample in pairs if task.takes(sample)]
        if not pairs:
            continue
        indices, of_batch = zip(*pairs, strict=True)
        batch = collate(of_batch)
        batch.images = as_latents(batch.images[:, :num_images], sd)  # once for all timesteps
        yield indices, of_batch, batch


def measure(
    model: DPT,
    sd: StableDiffusion,
    rec_text: RecTextEncoder,
    samples: Samples,
    *,
    task: str,
    timesteps: list[int],
    num_samples: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    control: str = "none",
) -> list[dict]:
    """One record a sample and timestep: the sample's id, its index in the set, and the task's `records`.

    Args:
        task: the name of a task of the model.
        num_samples: evenly spread over the set.
        shard: (k, n): this process's share.
        control: its name; see `dpt.training.controls`.
    """
    model.eval()
    task, records = model.task(task), []
    sizes = {"num_samples": num_samples, "batch_size": batch_size, "shard": shard}
    for indices, of_batch, batch in batches_to_measure(samples, sd, task, **sizes):
        batch = control_batch(control, batch, sd)
        for timestep in timesteps:
            inputs = encode_batch(batch, sd, rec_text, seed=0, timesteps=(timestep, timestep))
            inputs = control_inputs(control, inputs, batch, sd, training=False)
            found = task.records(model.adapter, model.queries(inputs, task.measured), inputs, of_batch)
            records += [
                {"id": sample.id, "timestep": timestep, "index": index} | record
                for index, sample, record in zip(indices, of_batch, found, strict=True)
            ]
    return records


def validate(
    model: DPT,
    sd: StableDiffusion,
    rec_text: RecTextEncoder,
    val_sets: dict[str, Samples],
    ranked: RankedPrompts | None,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Figures of all tasks on the val sets, and of ranking, from all processes.

    Args:
        val_sets: by task, such as `itm` or `rec_refcoco`; a task without one is measured on ITM's.
        ranked: trajectories that are held out.
    """
    settings, records = config.validation, {}
    shard = (accelerator.process_index, accelerator.num_processes)
    for task in model.tasks if val_sets else ():
        for name, samples in _sets_of(task, val_sets).items():
            with accelerator.autocast():
                part = measure(
                    model,
                    sd,
                    rec_text,
                    samples,
                    task=task.name,
                    timesteps=sorted({*settings.timesteps, PAPER_TIMESTEP}),
                    num_samples=settings.num_samples,
                    batch_size=config.optim.batch_size,
                    shard=shard,
                    control=config.control,
                )
            records[name] = gather_object(part)
    figures = summarize(records, mean_over=settings.timesteps)
    if ranked is not None:
        with accelerator.autocast():
            part = measure_ranking(model, sd, ranked, num_samples=settings.num_samples, shard=shard)
        figures |= summarize_ranking(gather_object(part))
    return figures


def _sets_of(task: Task, val_sets: dict[str, Samples]) -> dict[str, Samples]:
    """The val sets that a task is measured on: its own, such as `rec_refcoco`, or else ITM's under its name."""
    own = {name: samples for name, samples in val_sets.items() if name.split("_")[0] == task.name}
    return own or {task.name: val_sets["itm"]}


def figure_names(tasks: Iterable[Task], val_sets: dict[str, Samples], ranked: RankedPrompts | None) -> list[str]:
    """Names of the figures that `validate` gives, without the ends of their intervals."""
    names = []
    for task in tasks if val_sets else ():
        own = _sets_of(task, val_sets)
        names += [f"{name}_{figure}{mean}" for name in own for figure in task.figures for mean in ("", "_mean")]
    return names if ranked is None else [*names, "rank_auc", *(f"rank_auc_step_{k}" for k in ranked.about.steps)]


@torch.no_grad()
def measure_ranking(
    model: DPT, sd: StableDiffusion, prompts: RankedPrompts, *, num_samples: int, shard: tuple[int, int] = (0, 1)
) -> list[dict]:
    """One record a prompt and kept step: the area under the curve within the prompt.

    Args:
        num_samples: prompts, evenly spread over the set.
        shard: (k, n): this process's share.
    """
    model.eval()
    records = []
    for index in evenly_spread(len(prompts), num_samples, shard):
        ranked = [prompts.at(index, k) for k in range(len(prompts.about.steps))]
        inputs = encode_ranked(ranked, sd)
        areas = ranking_areas(model.rank_scores(inputs).unflatten(0, inputs["values"].shape), inputs["values"])
        records += [
            {"id": int(index), "step": step, "auc": area} for step, area in zip(prompts.about.steps, areas, strict=True)
        ]
    return records


def summarize_ranking(records: list[dict]) -> dict[str, float]:
    """`rank_auc` with its 95 % interval over prompts, and `rank_auc_step_K` after K steps."""
    rows = {(record["id"], record["step"]): record["auc"] for record in records}
    ids, values = np.array([key[0] for key in rows]), np.array(list(rows.values()))
    mean, low, high = bootstrap_interval(values, ids)
    figures = {"rank_auc": mean, "rank_auc_low": low, "rank_auc_high": high}
    for step in dict.fromkeys(key[1] for key in rows):
        figures[f"rank_auc_step_{step}"] = float(np.mean([auc for key, auc in rows.items() if key[1] == step]))
    return figures


def figures_of(records: list[dict]) -> list[str]:
    """Names of the figures that records of `measure` hold."""
    return [name for name in (records[0] if records else ()) if name in FIGURES]


def summarize(records: dict[str, list[dict]], *, mean_over: list[int]) -> dict[str, float]:
    """Figures with 95 % intervals (`_low`, `_high`) from records by val set.

    `<set>_<figure>` is the figure at the paper's t = 500, `..._mean` its mean over the timesteps of `mean_over`. A
    sample counts once, however many processes measured it; intervals resample samples.
    """
    figures = {}
    for name, part in records.items():
        rows = {(r["id"], r["timestep"]): r for r in part}
        for column in figures_of(part):
            for suffix, timesteps in (("", [PAPER_TIMESTEP]), ("_mean", mean_over)):
                chosen = [(key[0], row[column]) for key, row in rows.items() if key[1] in timesteps]
                ids, values = zip(*chosen, strict=True)
                mean, low, high = bootstrap_interval(np.array(values, float), np.array(ids))
                figure = f"{name}_{column}{suffix}"
                figures |= {figure: mean, f"{figure}_low": low, f"{figure}_high": high}
    return figures
