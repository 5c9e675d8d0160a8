"""`evaluate.py itm`: does a checkpoint tell a picture's caption from a hard negative, and a caption's picture from one?

    python evaluate.py itm outputs/shapes-probe --config configs/shapes/probe.yaml --negatives mined edited \\
        --zero_shot --output outputs/evaluation/itm

Accuracy (chance 50 %) on the text side and the image side, at t = 500 and in the mean over --timesteps, the pairs that
are compared sharing noise. Checkpoints of controls may be named along: then the selectivity of the others, over the
best control, is shown too. --zero_shot adds matching by the same model's denoising error, which needs no adapter
(DiffusionITM, Krojer et al. 2023). Writes itm.json, itm.md and the records; samples with a record are not measured
again.
"""

import argparse
from collections.abc import Iterable

import torch

from dpt.backbones.features import denoiser_features
from dpt.backbones.stable_diffusion import StableDiffusion, weights_fingerprint
from dpt.config import load_config
from dpt.data.collate import sample_generator
from dpt.data.sources import validation_samples
from dpt.evaluation import probes
from dpt.evaluation.probes import Measured, Measurement, measurement_of
from dpt.tasks.itm import ImageTextMatching, wins
from dpt.training.settings import TrainConfig
from dpt.training.validation import PAPER_TIMESTEP, Samples, batches_to_measure

ZERO_SHOT = "denoising error"


def run(args: argparse.Namespace) -> dict:
    """The command: see `measure`."""
    return measure(measurement_of(args), args.negatives, zero_shot=args.zero_shot)


def measure(what: Measurement, negatives: Iterable[str] = (), *, zero_shot: bool = False) -> dict:
    """Measures and writes; returns the summary of `probes.summary`.

    Args:
        negatives: kinds of the shapes world, each a set of its own; none means the config's.
        zero_shot: also by denoising error, without an adapter.
    """
    probes.check_output(what, "itm")
    variants = {name: [f"data.negatives={name}"] for name in negatives} or {"": []}
    measured = probes.measure_all(what, "itm", variants)
    if zero_shot:
        measured.append(_zero_shot(what, variants))
    measured = probes.split_by(measured, "kind")
    result = probes.summary(measured, ["text", "image"], what.timesteps)
    return probes.write(what, "itm", result, measured)


def _zero_shot(what: Measurement, variants: dict[str, list[str]]) -> Measured:
    records = {}
    for label, overrides in variants.items():
        config = load_config(TrainConfig, what.config, [*what.set, *overrides])
        sd = probes.load_base(config)

        def compute(config=config, sd=sd):
            sets = validation_samples(config.data, sd, num_samples=what.num_samples, split=what.split)
            size = config.optim.batch_size
            with probes.autocast(config):
                return {"": denoising_matches(sd, sets["itm"], what.timesteps, what.num_samples, size)}

        name, weights = f"itm_zero-shot_{label or 'all'}", weights_fingerprint(*sd.parts.values())
        records[label] = probes.kept(what, name, config, weights, compute)[""]
    return Measured(ZERO_SHOT, "none", records)


@torch.no_grad()
def denoising_matches(
    sd: StableDiffusion, samples: Samples, timesteps: list[int], num_samples: int, batch_size: int
) -> list[dict]:
    """Records of matching by denoising error, like those of `dpt.training.validation.measure`.

    The caption with the lower error of the noise predicted under it wins; between images the error without a
    prompt is subtracted (Krojer et al. 2023). At t = 500 the errors of that noise level decide; at each of
    `timesteps` the sum of the errors at all of them decides.
    """
    records = []
    sizes = {"num_samples": num_samples, "batch_size": batch_size}
    for _, of_batch, batch in batches_to_measure(samples, sd, ImageTextMatching(), **sizes):
        latents = batch.images.to(sd.device).float()  # (B, 2, C, h, w)
        texts = [text for captions in batch.captions for text in captions[:2]]
        texts = sd.condition([*texts, *[""] * len(of_batch)])
        own, other, empty = texts[0 : -len(of_batch) : 2], texts[1 : -len(of_batch) : 2], texts[-len(of_batch) :]
        pairs = ((0, own), (0, other), (1, own), (0, empty), (1, empty))
        errors = {t: _errors(sd, latents, pairs, batch.ids, t) for t in {*timesteps, PAPER_TIMESTEP}}
        together = wins(_ahead(sum(errors[t] for t in timesteps)))
        decided = {t: together for t in timesteps} | {PAPER_TIMESTEP: wins(_ahead(errors[PAPER_TIMESTEP]))}
        for timestep, won in decided.items():
            for sample, (text, image) in zip(of_batch, won.tolist(), strict=True):
                kind = sample.negative_kind
                records.append({"id": sample.id, "timestep": timestep, "text": text, "image": image, "kind": kind})
    return records


def _errors(sd, latents, pairs, ids, timestep) -> torch.Tensor:
    """Mean squared errors of the predicted noise, (B, pairs)."""
    shape, scheduler = latents.shape[2:], sd.scheduler
    noise = [torch.randn(shape, generator=sample_generator(timestep, sample_id, 0, "noise")) for sample_id in ids]
    noise, timesteps = torch.stack(noise).to(sd.device), torch.full((len(ids),), timestep, device=sd.device)
    errors = []
    for image, texts in pairs:
        noisy = scheduler.add_noise(latents[:, image], noise, timesteps)
        _, predicted = denoiser_features(sd.denoiser, (), noisy.to(sd.dtype), timesteps, texts, with_noise_pred=True)
        target = sd.noise_target(latents[:, image], noise, timesteps)
        errors.append((predicted.float() - target).square().mean((1, 2, 3)))
    return torch.stack(errors, dim=1)


def _ahead(errors: torch.Tensor) -> torch.Tensor:
    """The error of the negative minus that of the truth, (B, 2): among captions, among images."""
    own, other_caption, other_image, own_empty, other_empty = errors.unbind(1)
    return torch.stack([other_caption - own, (other_image - other_empty) - (own - own_empty)], dim=1)
