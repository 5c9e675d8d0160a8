"""What is measured while training: ITM accuracy and REC precision at fixed noise.

What is compared shares noise and timestep (the reference scores the captions of an image under different noise).
"""

from typing import Protocol

import numpy as np
import torch

from dpt.controls import control_batch, control_inputs
from dpt.data.collate import Sample, as_latents, collate, encode_batch
from dpt.data.trajectories import RankedPrompts, encode_ranked
from dpt.metrics import area_within_prompts, bootstrap_interval, objectness, rec_hits
from dpt.model import DPT
from dpt.rec_text import RecTextEncoder
from dpt.stable_diffusion import StableDiffusion

PAPER_TIMESTEP = 500
KS = (1, 5, 10)
FIGURES = ("text", "image", *(f"{name}_at_{k}" for name in ("precision", "giou_precision") for k in KS))


class Samples(Protocol):
    """Random access to samples; `dpt.shapes.samples` and `dpt.data.coco_samples` give it."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Sample: ...


def evenly_spread(count: int, num_samples: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
    """The k-th of n shares of at most so many indices, evenly spread over `count`; `shard` is (k, n)."""
    return np.linspace(0, count - 1, min(num_samples, count)).round().astype(int)[shard[0] :: shard[1]]


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
    """One record a sample and timestep, with the sample's id and its index in the set.

    For `itm` it says whether the positive beats the hard-negative text, and image, and the negative's kind; for `rec`
    whether one of the k surest boxes hits, by IoU and by generalised IoU, and the surest: its objectness and cxcywh.

    Args:
        task: itm or rec.
        num_samples: evenly spread over the set.
        shard: (k, n): this process's share.
        control: what the model is deprived of; see `dpt.controls`.
    """
    model.eval()
    chosen, records = evenly_spread(len(samples), num_samples, shard), []
    for start in range(0, len(chosen), batch_size):
        pairs = [(int(index), samples.get(int(index), 0)) for index in chosen[start : start + batch_size]]
        if task == "rec":
            pairs = [(index, sample) for index, sample in pairs if len(sample.boxes)]
        if not pairs:
            continue
        indices, batch = zip(*pairs, strict=True)
        joined = collate(batch)
        needed = joined.images[:, : 2 if task == "itm" else 1]  # random images are compared with nothing
        joined.images = as_latents(needed, sd)  # once for all timesteps
        joined = control_batch(control, joined, sd)
        for timestep in timesteps:
            inputs = encode_batch(joined, sd, rec_text, seed=0, timesteps=(timestep, timestep))
            inputs = control_inputs(control, inputs, joined, sd, training=False)
            scores, outputs = model.evaluate(inputs, itm=task == "itm", rec=task == "rec")
            found = itm_records(scores, batch) if task == "itm" else rec_records(outputs, batch)
            records += [
                {"id": sample.id, "timestep": timestep, "index": index} | record
                for index, sample, record in zip(indices, batch, found, strict=True)
            ]
    return records


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
        scores = model.rank_scores(inputs).unflatten(0, inputs["values"].shape).double().cpu().numpy()
        areas = area_within_prompts(scores, inputs["values"].double().cpu().numpy())
        records += [
            {"id": int(index), "step": step, "auc": float(area)}
            for step, area in zip(prompts.about.steps, areas, strict=True)
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


def itm_records(scores: torch.Tensor, batch: tuple[Sample, ...]) -> list[dict]:
    """Of matching scores (B, 3), as `DPT.evaluate` gives them: whether the truth wins, and the negative's kind."""
    won = wins(scores[:, :1] - scores[:, 1:])
    return [
        {"text": text, "image": image, "kind": sample.negative_kind}
        for (text, image), sample in zip(won.tolist(), batch, strict=True)
    ]


def wins(ahead: torch.Tensor) -> torch.Tensor:
    """1 where the truth is ahead, 0 where it is behind; who can't tell is right half of the time."""
    return (ahead > 0) + 0.5 * (ahead == 0)


def rec_records(outputs: dict, batch: tuple[Sample, ...]) -> list[dict]:
    """Of REC outputs: whether one of the k surest boxes hits, and the surest."""
    logits, boxes = outputs["pred_logits"].float().cpu(), outputs["pred_boxes"].float().cpu()
    truth = torch.stack([sample.boxes[0] for sample in batch])
    records = [{} for _ in batch]
    for name, generalized in (("precision", False), ("giou_precision", True)):
        for record, row in zip(records, rec_hits(logits, boxes, truth, ks=KS, generalized=generalized), strict=True):
            record |= {f"{name}_at_{k}": hit for k, hit in zip(KS, row.tolist(), strict=True)}
    for record, sureness, found in zip(records, objectness(logits), boxes, strict=True):
        best = sureness.argmax()
        record["surest"] = [round(value, 3) for value in (sureness[best].item(), *found[best].tolist())]
    return records


def figures_of(records: list[dict]) -> list[str]:
    """The names of what records of `measure` say in numbers."""
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
