"""Candidates: half-drawn pictures that are narrowed down by their matching scores while they are drawn.

Shapes: N candidates of all pictures together, C latent channels, (h, w) latent size.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin

from dpt.backbones.conditioning import Conditioning
from dpt.choosing_rules import best, rounds
from dpt.sampling import Guidance, sample
from dpt.sampling_settings import Sampling
from dpt.schedulers import join_images, predicted_clean, select_images


@dataclass
class Candidates:
    """Half-drawn pictures that stand at one step."""

    latents: torch.Tensor
    """(N, C, h, w)"""
    scheduler: SchedulerMixin
    """with its timesteps set, and the state of these images"""
    conditioning: Conditioning
    negative: Conditioning
    numbers: np.ndarray = None
    """which of all candidates they are, (N,)"""

    def __post_init__(self):
        if self.numbers is None:
            self.numbers = np.arange(len(self.latents))

    def select(self, indices: np.ndarray) -> "Candidates":
        """Some of them, with a scheduler of their own."""
        rows, scheduler = torch.from_numpy(indices).to(self.latents.device), copy.deepcopy(self.scheduler)
        select_images(scheduler, self.latents, rows)
        texts = self.conditioning[rows], self.negative[rows]
        return Candidates(self.latents[rows], scheduler, *texts, self.numbers[indices])

    @staticmethod
    def join(parts: "list[Candidates]") -> "Candidates":
        """Several batches as one."""
        return Candidates(
            torch.cat([part.latents for part in parts]),
            join_images([(part.scheduler, part.latents) for part in parts]),
            Conditioning.join([part.conditioning for part in parts]),
            Conditioning.join([part.negative for part in parts]),
            np.concatenate([part.numbers for part in parts]),
        )


@dataclass
class Chosen:
    """The candidates that are left when all steps are done."""

    left: Candidates
    """one a picture, in the pictures' order"""
    records: list[list[dict]]
    """of each candidate, a record a step at which its score was read"""
    steps: list[int]
    """that each candidate was drawn"""
    scores: list[float | None]
    """of each candidate, by which it was chosen or dropped at the last choice that it took part in"""
    at: int
    """the step behind which one candidate a picture was left"""


GuidanceOf = Callable[[Candidates, Sampling, list[dict], range], Guidance]
"""Maps (candidates, settings of the round, trace, steps at which the score is to be read) to a guidance."""


def draw_and_choose(
    candidates: Candidates,
    sampling: Sampling,
    guidance_of: GuidanceOf,
    *,
    batch_size: int | None = None,
    trace: bool = False,
    on_step: Callable[[int, dict | None], None] | None = None,
    on_choice: Callable[[int, np.ndarray, np.ndarray, np.ndarray, torch.Tensor], None] | None = None,
) -> Chosen:
    """Runs all steps; after some of them, keeps the candidates of highest score of each picture.

    Args:
        candidates: at their first step, those of a picture in a row: `sampling.candidates` for each.
        batch_size: candidates that are drawn at once; by default all.
        trace: read the score at every step, not only where it decides.
        on_step: called after each step with its number and the newest record of the trace.
        on_choice: called at each choice with the number of steps done, the candidates' numbers (N,), their scores (N,),
            indices of those that go on, and the clean latents (N, C, h, w) that their last predictions mean.

    Raises:
        FloatingPointError: a score or latents that are not finite.
    """
    count = len(candidates.numbers)
    pictures = np.repeat(np.arange(count // sampling.candidates), sampling.candidates)
    records, steps, decided, chosen_at = [[] for _ in range(count)], [0] * count, [None] * count, 0
    for part in rounds(len(candidates.scheduler.timesteps), sampling.candidates, sampling.choose_at):
        alone = len(candidates.numbers) == len(set(pictures))
        settings = sampling if alone or sampling.correct_candidates else sampling.without_correction()
        chooses = part.keep < len(candidates.numbers) // len(set(pictures))
        read = range(part.first, part.stop) if trace else range(part.stop - chooses, part.stop)
        done, clean = [], []
        for rows in np.array_split(np.arange(len(candidates.numbers)), _parts(candidates, batch_size)):
            some, log = candidates.select(rows), []
            denoise = guidance_of(some, settings, log, read)
            if chooses and on_choice:
                denoise = _noting_clean(denoise, some.scheduler, part.stop - 1, clean)
            tell = on_step and (lambda step, _, log=log: on_step(step, log[-1] if log else None))
            path = range(part.first, part.stop)
            some.latents = sample(denoise, some.scheduler, some.latents, steps=path, on_step=tell)
            for k, number in enumerate(some.numbers):
                records[number] += [_of_image(record, k) for record in log]
                steps[number] = part.stop
            done.append(some)
        candidates = Candidates.join(done)
        if chooses:
            scores = np.array([records[n][-1]["score"] for n in candidates.numbers])
            if sampling.on_nan == "raise" and not np.isfinite(scores).all():
                raise FloatingPointError(
                    f"the matching score after step {part.stop} is not finite: draw in float32 (--dtype float32), or "
                    "pass --on_nan skip"
                )
            for number, score in zip(candidates.numbers, scores.tolist(), strict=True):
                decided[number] = score
            kept = best(scores, pictures[candidates.numbers], part.keep)
            if on_choice:
                on_choice(part.stop, candidates.numbers, scores, kept, torch.cat(clean))
            candidates, chosen_at = candidates.select(kept), part.stop
    return Chosen(candidates, records, steps, decided, chosen_at)


def _noting_clean(denoise: Guidance, scheduler, at: int, clean: list[torch.Tensor]) -> Guidance:
    """The guidance, which also appends the clean latents that its prediction at one step means."""

    def noting(latents, timestep, step):
        noise_pred, latents = denoise(latents, timestep, step)
        if step == at:
            clean.append(predicted_clean(scheduler, noise_pred, timestep, latents))
        return noise_pred, latents

    return noting


def _parts(candidates: Candidates, batch_size: int | None) -> int:
    """The number of batches that the candidates are drawn in."""
    return 1 if batch_size is None else math.ceil(len(candidates.numbers) / batch_size)


def _of_image(record: dict, index: int) -> dict:
    """One image's part of a record over a batch."""
    return {name: value[index] if isinstance(value, list) else value for name, value in record.items()}
