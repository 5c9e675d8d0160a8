"""The artist: prompts and seeds to pictures, with their scores, what choosing kept, and what they cost.

Shapes: B pictures, N candidates of all pictures together, C latent channels, (h, w) latent size.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from diffusers import SchedulerMixin

from dpt.adapter.adapter import Scorer
from dpt.backbones.blocks import is_flux, is_transformer
from dpt.backbones.stable_diffusion import StableDiffusion, advice_against_nan
from dpt.backbones.unet_features import Conditioning
from dpt.choosing import best, candidate_seeds, rounds
from dpt.guidance import guided
from dpt.guidance.attend_and_excite import subject_tokens
from dpt.images import to_images
from dpt.matching_score import ScoreReader
from dpt.sampling import ClassifierFreeGuidance, Denoiser, initial_noise, sample
from dpt.schedulers import join_images, make_scheduler, predicted_clean, select_images, set_timesteps
from dpt.settings import Sampling


@dataclass
class Drawing:
    """A picture and how it came about."""

    image: np.ndarray
    """(H, W, 3) uint8"""
    seed: int
    """of its noise: that of the candidate that was kept"""
    latents: torch.Tensor
    """(C, h, w), that the image was decoded from"""
    trace: list[dict] = field(default_factory=list)
    """a record a step at which the score was read: step, timestep, score, length, relative_length"""
    candidates: list[dict] = field(default_factory=list)
    """where there was a choice, a record a candidate: seed, score (at its last choice), steps (drawn)"""
    corrected_from: float = 0.0
    """where there was a choice, the share of the steps behind which the correction began: `correction_start` of the
    same picture drawn from the kept seed alone"""
    cost: dict[str, float] = field(default_factory=dict)
    """a picture's share of its batch: seconds, whole_passes and truncated_passes of the U-Net for one image each"""


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
    """What is left of candidates when all steps are done."""

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


DenoiserOf = Callable[[Candidates, Sampling, list[dict], range], Denoiser]
"""Maps (candidates, settings of the round, trace, steps at which the score is to be read) to a denoiser."""


def draw_and_choose(
    candidates: Candidates,
    sampling: Sampling,
    denoiser_of: DenoiserOf,
    *,
    batch_size: int | None = None,
    trace: bool = False,
    on_step: Callable[[int, dict | None], None] | None = None,
    on_choice: Callable[[int, np.ndarray, np.ndarray, np.ndarray, torch.Tensor], None] | None = None,
) -> Chosen:
    """Goes all steps, and after some of them keeps the candidates of highest score of each picture.

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
        settings = sampling if alone or sampling.correct_candidates else without_correction(sampling)
        chooses = part.keep < len(candidates.numbers) // len(set(pictures))
        read = range(part.first, part.stop) if trace else range(part.stop - chooses, part.stop)
        done, clean = [], []
        for rows in np.array_split(np.arange(len(candidates.numbers)), _parts(candidates, batch_size)):
            some, log = candidates.select(rows), []
            denoise = denoiser_of(some, settings, log, read)
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


def _noting_clean(denoise: Denoiser, scheduler, at: int, clean: list[torch.Tensor]) -> Denoiser:
    """The denoiser, which also appends the clean latents that its prediction at one step means."""

    def noting(latents, timestep, step):
        noise_pred, latents = denoise(latents, timestep, step)
        if step == at:
            clean.append(predicted_clean(scheduler, noise_pred, timestep, latents))
        return noise_pred, latents

    return noting


def _parts(candidates: Candidates, batch_size: int | None) -> int:
    """How many batches the candidates are drawn in."""
    return 1 if batch_size is None else math.ceil(len(candidates.numbers) / batch_size)


Method = Callable[[ClassifierFreeGuidance, Sampling, list[str], list[int], list[dict]], Denoiser]
"""Maps (guidance, sampling, prompts, seeds, trace) to a denoiser: a guidance method from outside, such as a control."""


class Artist:
    """A model and, where there is one, what reads its matching score."""

    def __init__(self, sd: StableDiffusion, scorer: Scorer | None = None):
        self.sd, self.scorer = sd, scorer

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: Sampling,
        *,
        batch_size: int | None = None,
        trace: bool = False,
        on_step: Callable[[int, dict | None], None] | None = None,
        on_choice: Callable[[int, list[dict]], None] | None = None,
        method: Method | None = None,
    ) -> list[Drawing]:
        """A picture for each prompt and seed.

        It depends on prompt, seed, settings and weights alone. The batch that it is drawn in changes it by the last
        bits of a sum: by a grey level in float32.

        Args:
            batch_size: candidates that are drawn at once; by default all.
            trace: read the score at every step; it costs the adapter's pass, none of the U-Net's.
            on_step: called after each step with its number and the newest record of the trace, over the batch's images.
            on_choice: called at each choice with the number of steps done and a record a candidate: seed, score, kept,
                and image, its predicted clean picture, which costs a pass of the decoder.
            method: takes the place of the method that the settings ask for; it gets the settings of each round.

        Raises:
            ValueError: other than one seed a prompt, a size that the model cannot draw, or a setting that needs an
                adapter where there is none.
            FloatingPointError: a score or latents that are not finite.
        """
        if (sampling.needs_adapter or trace) and self.scorer is None:
            raise ValueError("self-correction, choosing and traces read the matching score: they need an adapter")
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds holds {len(seeds)}; {len(prompts)} prompts need as many")
        sd, began = self.sd, time.perf_counter()
        every = [seed for own in seeds for seed in candidate_seeds(own, sampling.candidates)]  # (N,)
        texts = [prompt for prompt in prompts for _ in range(sampling.candidates)]

        def denoiser_of(some, settings, log, read):
            own = [texts[n] for n in some.numbers], [every[n] for n in some.numbers]
            return self._denoiser(some, settings, *own, log, read, method)

        def tell(step, numbers, scores, kept, clean):
            found = zip(numbers, scores.tolist(), to_images(sd.decode_latents(clean)), strict=True)
            on_choice(
                step,
                [
                    {"seed": every[n], "score": score, "kept": k in kept, "image": image}
                    for k, (n, score, image) in enumerate(found)
                ],
            )

        options = {"batch_size": batch_size, "trace": trace, "on_step": on_step, "on_choice": on_choice and tell}
        with counted_passes(sd.unet) as passes:
            begun = self._begin(texts, every, sampling)
            chosen = draw_and_choose(begun, sampling, denoiser_of, **options)
        if not chosen.left.latents.isfinite().all():
            raise FloatingPointError(f"the latents are not finite: {advice_against_nan(sd)}")
        images = to_images(sd.decode_latents(chosen.left.latents))
        cost = {"seconds": time.perf_counter() - began} | passes
        cost = {name: value / len(prompts) for name, value in cost.items()}
        return [self._drawing(picture, image, chosen, every, sampling, cost) for picture, image in enumerate(images)]

    def _drawing(self, picture: int, image, chosen: Chosen, seeds: list[int], sampling: Sampling, cost) -> Drawing:
        """One picture with all that is to be said of it.

        Args:
            picture: its number; seeds: of all candidates of all pictures.
        """
        kept, several = chosen.left.numbers[picture], sampling.candidates > 1
        corrected_from = sampling.correction_start
        if several and not sampling.correct_candidates:
            corrected_from = max(corrected_from, chosen.at / sampling.num_inference_steps)
        own = range(picture * sampling.candidates, (picture + 1) * sampling.candidates)
        candidates = [{"seed": seeds[n], "score": chosen.scores[n], "steps": chosen.steps[n]} for n in own if several]
        latents = chosen.left.latents[picture]
        return Drawing(image, seeds[kept], latents, chosen.records[kept], candidates, corrected_from, cost)

    def _begin(self, texts: list[str], seeds: list[int], sampling: Sampling) -> Candidates:
        """All candidates before their first step."""
        sd = self.sd
        scheduler = make_scheduler(sd.scheduler, sampling.scheduler, parity=sampling.parity)
        shape = sd.latent_shape(sampling.height, sampling.width)
        set_timesteps(scheduler, sampling.num_inference_steps, sd.device, shape=shape)
        noise = initial_noise(seeds, shape).to(sd.device)
        size = (sampling.height or sd.default_size, sampling.width or sd.default_size)
        conditioning = sd.condition(texts, size=size).with_guidance(sampling.distilled_guidance)
        negative = sd.condition([sampling.negative_prompt] * len(texts), size=size, negative=True)
        negative = negative.with_guidance(sampling.distilled_guidance)
        return Candidates(noise * scheduler.init_noise_sigma, scheduler, conditioning, negative)

    def _denoiser(self, batch, sampling, prompts, seeds, log, read, method) -> Denoiser:
        guidance = ClassifierFreeGuidance(
            self.sd.unet,
            batch.scheduler,
            batch.conditioning,
            batch.negative,
            guidance_scale=sampling.guidance_scale,
            guidance_rescale=sampling.guidance_rescale,
        )
        if method is not None:
            denoise = method(guidance, sampling, prompts, seeds, log)
        else:
            subjects = lambda: [subject_tokens(self.sd, prompt) for prompt in prompts]  # noqa: E731
            denoise = guided(guidance, sampling, scorer=self.scorer, subjects=subjects, trace=log)
        return ScoreReader(denoise, guidance, self.scorer, log, read) if read else denoise


def without_correction(sampling: Sampling) -> Sampling:
    """The same settings without self-correction."""
    return replace(sampling, correction_factor=0.0, correction_norm=None, correct_candidates=False)


def _of_image(record: dict, index: int) -> dict:
    """One image's part of a record over a batch."""
    return {name: value[index] if isinstance(value, list) else value for name, value in record.items()}


@contextlib.contextmanager
def counted_passes(unet):
    """A dict that counts the U-Net's passes while the context lasts, whole and truncated ones, each for one image."""
    passes = {"whole_passes": 0, "truncated_passes": 0}

    def begins(module, inputs, output):
        passes["truncated_passes"] += len(output)

    def ends(module, inputs, output):
        passes["whole_passes"] += len(output)
        passes["truncated_passes"] -= len(output)  # it has begun too

    first, last = "conv_in", "conv_out"
    if is_transformer(unet.config):
        first, last = "x_embedder" if is_flux(unet.config) else "pos_embed", "proj_out"
    handles = [getattr(unet, first).register_forward_hook(begins), getattr(unet, last).register_forward_hook(ends)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
