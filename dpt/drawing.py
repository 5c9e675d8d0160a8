"""The artist: draws pictures of prompts and seeds, with their scores, their candidates and their cost.

Shapes: N candidates of all pictures together, C latent channels, (h, w) latent size.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from dpt.adapter.adapter import Scorer
from dpt.backbones.blocks import is_flux, is_transformer
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.offload import offload
from dpt.backbones.stable_diffusion import StableDiffusion, advice_against_nan
from dpt.base_models import DEFAULT_MODEL, OFFLOADS, check_one_lora, recommended
from dpt.bounds import Bounds
from dpt.checkpoint.checkpoint import DPTCheckpoint, leaves_t5_out, load_checkpoint
from dpt.choosing import Candidates, Chosen, draw_and_choose
from dpt.choosing_rules import candidate_seeds
from dpt.device import usable_device
from dpt.guidance import guided
from dpt.guidance.attend_and_excite import subject_tokens
from dpt.images import to_images, to_pixels
from dpt.lora import load_external_lora
from dpt.matching_score import ScoreReader
from dpt.reading import TIMESTEP, boxes_of_phrases, matching_scores, rec_outputs
from dpt.sampling import ClassifierFreeGuidance, Guidance, initial_noise
from dpt.sampling_settings import SEED_LIMIT, Sampling
from dpt.schedulers import make_scheduler, set_timesteps


@dataclass
class Drawing:
    """A picture, with its scores, candidates and cost."""

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
    """a picture's share of its batch: seconds, whole_passes and truncated_passes of the denoiser for one image each"""


Method = Callable[[ClassifierFreeGuidance, Sampling, list[str], list[int], list[dict]], Guidance]
"""Maps (guidance, sampling, prompts, seeds, trace) to a guidance: a method from outside, such as a control."""


class Artist:
    """A model of any family and, where there is one, the adapter that reads its matching score.

    artist = Artist.load("sd35-medium", "outputs/sd35-tune", device="cuda", dtype=torch.bfloat16)
    drawn = artist.draw(["two dogs and a cat"] * 4, [0, 1, 2, 3], artist.sampling.changed(candidates=4))
    Image.fromarray(drawn[0].image).save("dogs.png")
    """

    sampling: Sampling | None = None
    """of a loaded artist: how the model draws with its weights where nothing else is asked for"""
    checkpoint: DPTCheckpoint | None = None
    """of a loaded artist: where its adapter and LoRA are from"""

    def __init__(self, sd: StableDiffusion, scorer: Scorer | None = None):
        self.sd, self.scorer = sd, scorer

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        weights: str | Path | None = None,
        *,
        lora: str | Path | None = None,
        device: torch.device | str = "cpu",
        no_t5: bool = False,
        local_files_only: bool = False,
        controls: Iterable[str] = ("none",),
        **options,
    ) -> "Artist":
        """An artist of a base model, with adapter and LoRA where they are named.

        Args:
            model: a name, local folder, single file or hub id.
            weights: a checkpoint, as `--dpt` takes it; None for no adapter, not even the model's default.
            lora: another method's LoRA, beside an adapter that has none; its layouts are those of
                `dpt.checkpoint.lora_files`.
            controls: which weights are taken; see `DPTCheckpoint.attach`.
            options: further ones of `load_stable_diffusion`, such as dtype, variant and revision.

        Raises:
            ValueError: something that cannot be used; it is named.
        """
        checkpoint = None
        if weights not in (None, "none"):
            checkpoint = load_checkpoint(weights, local_files_only=local_files_only)
            check_one_lora(checkpoint.config, weights, lora)
        sd = load_stable_diffusion(
            model,
            no_t5=no_t5 or leaves_t5_out(checkpoint),
            local_files_only=local_files_only,
            device=usable_device(device and str(device)),
            **options,
        )
        artist = cls(sd, checkpoint.attach(sd, controls=controls) if checkpoint else None)
        artist.checkpoint, artist.sampling = checkpoint, recommended(model, checkpoint and checkpoint.config)
        if lora:
            load_external_lora(sd, Path(lora))
        return artist

    def offload(self, how: str, device: torch.device | str) -> None:
        """Computes on a device, and keeps the parts that are not computing on the CPU, where the model is.

        Args:
            how: "model" or "sequential"; see `dpt.backbones.offload`.
        """
        if how not in OFFLOADS:
            raise ValueError(f"how is {how!r}; it must be {' or '.join(OFFLOADS)}")
        offload(self.sd, how, torch.device(device))
        if self.scorer:
            self.scorer.adapter.to(device)

    def score(self, images: list[np.ndarray], texts: list[str], *, timestep: int = TIMESTEP) -> list[float]:
        """Matching scores of finished pictures (H, W, 3) uint8, of one size, and their texts: larger is better.

        Args:
            timestep: at which the adapter reads the pictures.

        Raises:
            ValueError: no adapter, other than one text a picture, or pictures that the model cannot read.
        """
        pixels = self._readable(images, texts, timestep)
        return matching_scores(self.sd, self.scorer, pixels, texts, timestep=timestep).tolist()

    def find(self, image: np.ndarray, phrase: str, *, count: int = 3, timestep: int = TIMESTEP) -> list[tuple]:
        """Boxes of what a phrase refers to in a finished picture (H, W, 3) uint8, the surest first.

        Args:
            timestep: at which the adapter reads the picture.

        Returns:
            (sureness from 0 to 1, box) each; a box is (centre x, centre y, width, height), as shares of the picture's.

        Raises:
            ValueError: no adapter, or a picture that the model cannot read.
        """
        pixels = self._readable([image], [phrase], timestep)
        return boxes_of_phrases(rec_outputs(self.sd, self.scorer, pixels, [phrase], timestep=timestep))[0][:count]

    def _readable(self, images: list[np.ndarray], texts: list[str], timestep: int) -> torch.Tensor:
        """The pictures' pixels (B, 3, H, W) in [-1, 1]. Raises ValueError where the adapter cannot read them."""
        if self.scorer is None:
            raise ValueError("reading pictures needs an adapter: load one as `weights`")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts) or not len(images):
            raise ValueError(f"texts is {texts!r}; it must be a list of texts, one for each of at least one picture")
        if len(images) != len(texts):
            raise ValueError(f"texts holds {len(texts)}; {len(images)} pictures need as many")
        shapes = {np.shape(image) for image in images}
        shape = next(iter(shapes))
        if len(shapes) > 1 or len(shape) != 3 or shape[2] != 3 or any(image.dtype != np.uint8 for image in images):
            raise ValueError(
                f"images are of the shapes {sorted(shapes)}; they must be uint8 arrays (H, W, 3) of one size"
            )
        self.sd.latent_shape(*shape[:2])
        Bounds(at_least=0, below=self.sd.scheduler.config.num_train_timesteps).check("timestep", timestep, whole=True)
        return to_pixels(images)

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
            trace: read the score at every step; it costs the adapter's pass, none of the denoiser's.
            on_step: called after each step with its number and the newest record of the trace, over the batch's images.
            on_choice: called at each choice with the number of steps done and a record a candidate: seed, score, kept,
                and image, its predicted clean picture, which costs a pass of the decoder.
            method: takes the place of the method that the settings ask for; it gets the settings of each round.

        Raises:
            ValueError: other than one seed a prompt, a size that the model cannot draw, or a setting that needs an
                adapter where there is none.
            FloatingPointError: a score or latents that are not finite.
        """
        prompts, seeds = _checked(prompts, seeds)
        Bounds(at_least=1).check("batch_size", 1 if batch_size is None else batch_size)
        if (sampling.needs_adapter or trace) and self.scorer is None:
            raise ValueError("self-correction, choosing and traces read the matching score: they need an adapter")
        sd, began = self.sd, time.perf_counter()
        every = [seed for own in seeds for seed in candidate_seeds(own, sampling.candidates)]  # (N,)
        texts = [prompt for prompt in prompts for _ in range(sampling.candidates)]

        def guidance_of(some, settings, log, read):
            own = [texts[n] for n in some.numbers], [every[n] for n in some.numbers]
            return self._guidance(some, settings, *own, log, read, method)

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
        with counted_passes(sd.denoiser) as passes:
            begun = self._begin(texts, every, sampling)
            chosen = draw_and_choose(begun, sampling, guidance_of, **options)
        if not chosen.left.latents.isfinite().all():
            raise FloatingPointError(f"the latents are not finite: {advice_against_nan(sd)}")
        images = to_images(sd.decode_latents(chosen.left.latents))
        cost = {"seconds": time.perf_counter() - began} | passes
        cost = {name: value / len(prompts) for name, value in cost.items()}
        return [self._drawing(picture, image, chosen, every, sampling, cost) for picture, image in enumerate(images)]

    def _drawing(self, picture: int, image, chosen: Chosen, seeds: list[int], sampling: Sampling, cost) -> Drawing:
        """One picture with its record.

        Args:
            picture: its number; seeds: of all candidates of all pictures.
        """
        kept, several = chosen.left.numbers[picture], sampling.candidates > 1
        corrected_from = sampling.correction_start
        if several and not sampling.correct_candidates and not sampling.attend_and_excite:
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
        size = sd.picture_size(sampling.height, sampling.width)
        conditioning = sd.condition(texts, size=size).with_guidance(sampling.distilled_guidance)
        negative = sd.condition([sampling.negative_prompt] * len(texts), size=size, negative=True)
        negative = negative.with_guidance(sampling.distilled_guidance)
        return Candidates(noise * scheduler.init_noise_sigma, scheduler, conditioning, negative)

    def _guidance(self, batch, sampling, prompts, seeds, log, read, method) -> Guidance:
        guidance = ClassifierFreeGuidance(
            self.sd.denoiser,
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


def _checked(prompts: list[str], seeds: list[int]) -> tuple[list[str], list[int]]:
    """Prompts and seeds in Python's own types, not numpy's.

    Raises:
        ValueError: no prompts, other than one seed a prompt, or a seed that is none.
    """
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts is {prompts!r}; it must be a list of texts, at least one")
    if isinstance(seeds, Integral):
        raise ValueError(f"seeds is {seeds}; it must be a list of whole numbers, one for each prompt")
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds holds {len(seeds)}; {len(prompts)} prompts need as many")
    if wrong := [seed for seed in seeds if not isinstance(seed, Integral) or not 0 <= seed < SEED_LIMIT]:
        raise ValueError(f"seeds holds {wrong[0]!r}; each must be a whole number from 0 to below 2**62")
    return [str(prompt) for prompt in prompts], [int(seed) for seed in seeds]


@contextlib.contextmanager
def counted_passes(denoiser):
    """A dict that counts the denoiser's passes in the context, whole and truncated ones, each for one image."""
    passes = {"whole_passes": 0, "truncated_passes": 0}

    def begins(module, inputs, output):
        passes["truncated_passes"] += len(output)

    def ends(module, inputs, output):
        passes["whole_passes"] += len(output)
        passes["truncated_passes"] -= len(output)  # it has begun too

    first, last = "conv_in", "conv_out"
    if is_transformer(denoiser.config):
        first, last = "x_embedder" if is_flux(denoiser.config) else "pos_embed", "proj_out"
    handles = [
        getattr(denoiser, first).register_forward_hook(begins),
        getattr(denoiser, last).register_forward_hook(ends),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
