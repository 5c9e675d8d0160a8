"""What is measured while training: ITM accuracy and REC precision at fixed noise.

What is compared shares noise and timestep (the reference scores the captions of an image under different noise).
"""

from typing import Protocol

import numpy as np
import torch

from dpt.controls import control_batch, control_inputs
from dpt.data.collate import Sample, as_latents, collate, encode_batch
from dpt.metrics import bootstrap_interval, rec_hits
from dpt.model import DPT
from dpt.rec_text import RecTextEncoder
from dpt.stable_diffusion import StableDiffusion

PAPER_TIMESTEP = 500
KS = (1, 5, 10)


class Samples(Protocol):
    """Random access to samples; `dpt.shapes.samples` and `dpt.data.samples` give it."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Sample: ...


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
    """One record a sample and timestep, with the sample's id.

    For `itm` it says whether the positive beats the hard-negative text, and image; for `rec` whether one of the k
    surest boxes hits, by IoU and by generalised IoU.

    Args:
        task: itm or rec.
        num_samples: evenly spread over the set.
        shard: (k, n): this process's share.
        control: what the model is deprived of; see `dpt.controls`.
    """
    model.eval()
    chosen = np.linspace(0, len(samples) - 1, min(num_samples, len(samples))).round().astype(int)[shard[0] :: shard[1]]
    records = []
    for start in range(0, len(chosen), batch_size):
        batch = [samples.get(int(i), 0) for i in chosen[start : start + batch_size]]
        if task == "rec":
            batch = [sample for sample in batch if len(sample.boxes)]
        if not batch:
            continue
        joined = collate(batch)
        needed = joined.images[:, : 2 if task == "itm" else 1]  # random images are compared with nothing
        joined.images = as_latents(needed, sd)  # once for all timesteps
        joined = control_batch(control, joined, sd)
        for timestep in timesteps:
            inputs = encode_batch(joined, sd, rec_text, seed=0, timesteps=(timestep, timestep))
            inputs = control_inputs(control, inputs, joined, sd, training=False)
            scores, outputs = model.evaluate(inputs, itm=task == "itm", rec=task == "rec")
            found = _itm_records(scores) if task == "itm" else _rec_records(outputs, batch)
            records += [{"id": s.id, "timestep": timestep} | r for s, r in zip(batch, found, strict=True)]
    return records


def _itm_records(scores: torch.Tensor) -> list[dict]:
    ahead = scores[:, :1] - scores[:, 1:]
    won = (ahead > 0) + 0.5 * (ahead == 0)  # who can't tell is right half of the time
    return [{"text": text, "image": image} for text, image in won.tolist()]


def _rec_records(outputs: dict, batch: list[Sample]) -> list[dict]:
    logits, boxes = outputs["pred_logits"].float().cpu(), outputs["pred_boxes"].float().cpu()
    truth = torch.stack([sample.boxes[0] for sample in batch])
    records = [{} for _ in batch]
    for name, generalized in (("precision", False), ("giou_precision", True)):
        for record, row in zip(records, rec_hits(logits, boxes, truth, ks=KS, generalized=generalized), strict=True):
            record |= {f"{name}_at_{k}": hit for k, hit in zip(KS, row.tolist(), strict=True)}
    return records


def summarize(records: dict[str, list[dict]], *, mean_over: list[int]) -> dict[str, float]:
    """Figures with 95 % intervals (`_low`, `_high`) from records by val set.

    `<set>_<figure>` is the figure at the paper's t = 500, `..._mean` its mean over the timesteps of `mean_over`. A
    sample counts once, however many processes measured it; intervals resample samples.
    """
    figures = {}
    for name, part in records.items():
        rows = {(r["id"], r["timestep"]): r for r in part}
        for column in list(part[0])[2:] if part else ():
            for suffix, timesteps in (("", [PAPER_TIMESTEP]), ("_mean", mean_over)):
                chosen = [(key[0], row[column]) for key, row in rows.items() if key[1] in timesteps]
                ids, values = zip(*chosen, strict=True)
                mean, low, high = bootstrap_interval(np.array(values, float), np.array(ids))
                figure = f"{name}_{column}{suffix}"
                figures |= {figure: mean, f"{figure}_low": low, f"{figure}_high": high}
    return figures
