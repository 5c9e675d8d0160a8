"""The denoising loop, as a pure function of a scheduler, a denoiser and a corrector; guidance and self-correction.

Shapes: B images, C latent channels, (h, w) latent size, L text tokens, E context width, P pooled text width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from dpt.adapter import Scorer, itm_score
from dpt.images import to_images
from dpt.stable_diffusion import StableDiffusion, advice_against_nan
from dpt.unet_features import unet_features

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps (latents, conditional_latents, timestep) to the prediction; the two differ where a correction feeds the
conditional half alone. All tensors are (B, C, h, w)."""
Corrector = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor | None]
"""Maps (latents, timestep, step, number of steps) to corrected latents, or None where there is nothing to correct."""

SEED_LIMIT = 2**62  # seeds of noise are below it, so that seed + k is one of torch's too
CORRECTION_TARGETS = ("conditional", "latent")
CORRECTION_DIRECTIONS = ("gradient", "random")
HALF_GRADIENT_SCALE = 2.0**10  # keeps float16 gradients of the score, about 1e-4, from underflowing


def initial_noise(seeds: list[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal latents (B, *shape), float32 on the CPU: image b depends on seed b alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def classifier_free_guidance(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    *,
    encoder_hidden_states: torch.Tensor,
    negative_encoder_hidden_states: torch.Tensor,
    guidance_scale: float,
) -> Denoiser:
    """The `Denoiser` of prompts, (B, L, E), and negative or empty prompts, (B, L, E); see `guided_noise_pred`."""
    context = encoder_hidden_states
    if guidance_scale > 1:
        context = torch.cat([negative_encoder_hidden_states, encoder_hidden_states])

    def denoise(latents, conditional_latents, timestep):
        return guided_noise_pred(
            unet,
            scheduler,
            latents,
            conditional_latents,
            timestep,
            encoder_hidden_states=context,
            guidance_scale=guidance_scale,
        )

    return denoise


def guided_noise_pred(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    conditional_latents: torch.Tensor,
    timestep: torch.Tensor,
    *,
    encoder_hidden_states: torch.Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    **unet_inputs,
) -> torch.Tensor:
    """Ho & Salimans 2022: eps(z, negative) + guidance_scale * (eps(z, prompt) - eps(z, negative)), (B, C, h, w).

    Args:
        latents, conditional_latents: a `Denoiser`'s.
        encoder_hidden_states: the negative prompts' and then the prompts' context, (2B, L, E); where nothing is guided
            the prompts' alone, (B, L, E).
        guidance_scale: up to 1 nothing is guided, as in diffusers.
        guidance_rescale: share of the result that gets eps(z, prompt)'s standard deviation (Lin et al. 2024, 3.4).
        unet_inputs: further inputs of the U-Net.
    """
    guided = guidance_scale > 1
    inputs = torch.cat([latents, conditional_latents]) if guided else conditional_latents
    model_input = scheduler.scale_model_input(inputs, timestep).to(unet.dtype)
    noise_pred = unet(model_input, timestep, encoder_hidden_states, **unet_inputs).sample.float()
    if not guided:
        return noise_pred
    negative, positive = noise_pred.chunk(2)  # of (2B, C, h, w)
    noise_pred = negative + guidance_scale * (positive - negative)
    if guidance_rescale > 0:
        noise_pred = rescale_noise_cfg(noise_pred, positive, guidance_rescale)
    return noise_pred


def matching_score(
    unet: UNet2DConditionModel,
    scorer: Scorer,
    noisy_latents: torch.Tensor,
    timestep: torch.Tensor,
    *,
    encoder_hidden_states: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    **unet_inputs,
) -> torch.Tensor:
    """The matching score s(z_t, y) of each image, (B,) float32; the arguments are `score_gradient`'s."""
    features, _ = unet_features(
        unet, scorer.blocks, noisy_latents.to(unet.dtype), timestep, encoder_hidden_states, **unet_inputs
    )
    hs = scorer.adapter([feature.float() for feature in features], timestep)
    return itm_score(scorer.adapter.itm_embeddings(hs, scorer.itm_layer), pooled_prompt_embeds.float())


def score_gradient(
    unet: UNet2DConditionModel,
    scorer: Scorer,
    noisy_latents: torch.Tensor,
    timestep: torch.Tensor,
    *,
    encoder_hidden_states: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    **unet_inputs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matching score s(z_t, y) of each image, (B,), and d s / d z_t, (B, C, h, w); both float32.

    The gradient is of the sum of the batch's scores, so each image's is its own. No weight gets a gradient.

    Args:
        noisy_latents: in the variance-preserving space of the U-Net's input, (B, C, h, w).
        encoder_hidden_states: (B, L, E); pooled_prompt_embeds: (B, P).
        unet_inputs: further inputs of the U-Net.
    """
    scale = HALF_GRADIENT_SCALE if unet.dtype == torch.float16 else 1.0
    with torch.enable_grad():
        noisy_latents = noisy_latents.detach().float().requires_grad_()
        score = matching_score(
            unet,
            scorer,
            noisy_latents,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_prompt_embeds=pooled_prompt_embeds,
            **unet_inputs,
        )
        (gradient,) = torch.autograd.grad(score.sum() * scale, noisy_latents)
    return score.detach(), gradient / scale


@dataclass(frozen=True)
class CorrectionSettings:
    """How far, where and when self-correction steps."""

    factor: float = 0.5
    """the paper's eta; the step is factor * gradient"""
    norm: float | None = None
    """instead of `factor`: the step's length as a share of the latent's norm"""
    target: str = "conditional"
    """conditional: corrected latents are the input of the conditional half alone, as in the reference; latent:
    everything goes on from them, as in the paper's figure"""
    start: float = 0.0
    stop: float = 1.0
    """the window, as fractions of the steps: start <= step / steps < stop"""
    on_nan: str = "raise"
    """what a non-finite score or gradient does: raise, or skip the image's correction"""
    direction: str = "gradient"
    """random, as a control: a step as long as the gradient's, in a direction drawn anew at each step"""

    def __post_init__(self):
        if self.target not in CORRECTION_TARGETS:
            raise ValueError(f"correction_target is {self.target!r}; it must be {' or '.join(CORRECTION_TARGETS)}")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                f"correction_start and correction_stop are {self.start} and {self.stop}; "
                "they need 0 <= start <= stop <= 1"
            )
        if self.norm is not None and not 0 <= self.norm < math.inf:
            raise ValueError(f"correction_norm is {self.norm}; it must be a number of at least 0")
        if not math.isfinite(self.factor):
            raise ValueError(f"correction_factor is {self.factor}; it must be a finite number")
        if self.on_nan not in ("raise", "skip"):
            raise ValueError(f"on_nan is {self.on_nan!r}; it must be raise or skip")
        if self.direction not in CORRECTION_DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}; it must be {' or '.join(CORRECTION_DIRECTIONS)}")

    @property
    def active(self) -> bool:
        """Whether any step is corrected."""
        return (self.factor if self.norm is None else self.norm) != 0 and self.start < self.stop


@dataclass
class SelfCorrection:
    """Self-correction (Qu et al. 2024, section 3.4) as a `Corrector`: z_t + factor * d s(z_t, y) / d z_t.

    The step is taken in the variance-preserving space, so that one factor means the same with every scheduler.
    """

    unet: UNet2DConditionModel
    scorer: Scorer
    scheduler: SchedulerMixin
    encoder_hidden_states: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    settings: CorrectionSettings = CorrectionSettings()
    unet_inputs: dict = field(default_factory=dict)
    """further inputs of the U-Net, by name"""
    seeds: list[int] | None = None
    """of the images, for a random direction"""
    observe: bool = False
    """record the score of uncorrected steps too"""
    trace: list[dict] = field(default_factory=list)
    """a record a step: step, timestep, and lists over images of score, length and relative_length of the correction"""

    def __call__(self, latents, timestep, step, num_steps) -> torch.Tensor | None:
        """Corrected latents, (B, C, h, w). Raises FloatingPointError as `on_nan` says."""
        settings = self.settings
        corrects = settings.active and settings.start <= step / num_steps < settings.stop
        if not corrects and not self.observe:
            return None
        noisy_latents = self.scheduler.scale_model_input(latents, timestep)
        score, gradient = score_gradient(
            self.unet,
            self.scorer,
            noisy_latents,
            timestep,
            encoder_hidden_states=self.encoder_hidden_states,
            pooled_prompt_embeds=self.pooled_prompt_embeds,
            **self.unet_inputs,
        )
        finite = gradient.flatten(1).isfinite().all(1) & score.isfinite()  # (B,)
        if not finite.all() and settings.on_nan == "raise":
            precision = "" if self.unet.dtype == torch.float32 else "draw in float32 (--dtype float32), "
            raise FloatingPointError(
                f"the matching score or its gradient is not finite at step {step} (timestep {int(timestep)}): "
                f"{precision}end the correction earlier (--correction_stop), or pass --on_nan skip"
            )
        gradient = torch.where(finite[:, None, None, None], gradient, 0.0)
        latent_norm, gradient_norm = (x.flatten(1).norm(dim=1) for x in (noisy_latents.float(), gradient))
        if settings.direction == "random":
            gradient = self._random_direction(gradient_norm, noisy_latents, step)
        factor = torch.full_like(score, settings.factor if corrects else 0.0)  # (B,)
        if settings.norm is not None and corrects:
            factor = settings.norm * latent_norm / gradient_norm.clamp(min=1e-30)
        lengths = factor.abs() * gradient_norm
        record = {"score": score, "length": lengths, "relative_length": lengths / latent_norm}
        self.trace.append({"step": step, "timestep": float(timestep)} | {k: v.tolist() for k, v in record.items()})
        if not corrects:
            return None
        unscale = 1 / self.scheduler.scale_model_input(torch.ones_like(latents[:1, :1, :1, :1]), timestep)
        return latents + factor[:, None, None, None] * gradient * unscale

    def _random_direction(self, lengths, latents, step) -> torch.Tensor:
        """A vector of the given length (B,) for each image, by its seed and the step."""
        seeds = self.seeds or list(range(len(latents)))
        states = [np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint32)[0] for seed in seeds]
        noise = initial_noise([int(state) for state in states], tuple(latents.shape[1:])).to(latents.device)
        return noise * (lengths / noise.flatten(1).norm(dim=1))[:, None, None, None]


def guided_steps(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    context: torch.Tensor,
    negative_context: torch.Tensor,
    pooled: torch.Tensor | None,
    guidance_scale: float,
    scorer: Scorer | None,
    settings: CorrectionSettings,
    trace: list[dict] | None = None,
    observe: bool = True,
) -> tuple[Denoiser, Corrector | None]:
    """What `sample` needs to draw prompts: classifier-free guidance, and self-correction where it is asked for.

    Args:
        context, negative_context: (B, L, E); pooled: (B, P).
        trace: a list that is filled with the score of every step, corrected or, with `observe`, not.
    """
    denoise = classifier_free_guidance(
        unet,
        scheduler,
        encoder_hidden_states=context,
        negative_encoder_hidden_states=negative_context,
        guidance_scale=guidance_scale,
    )
    observe = observe and trace is not None
    if scorer is None or not (settings.active or observe):
        return denoise, None
    observed = {} if trace is None else {"observe": observe, "trace": trace}
    return denoise, SelfCorrection(unet, scorer, scheduler, context, pooled, settings, **observed)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    *,
    num_inference_steps: int | None = None,
    correct: Corrector | None = None,
    correction_target: str = "conditional",
    parity: bool = False,
    step_options: dict | None = None,
    on_step: Callable[[int, torch.Tensor], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Denoises standard normal `noise` (B, C, h, w) to scaled latents of the same shape, in float32.

    Args:
        num_inference_steps: None goes along the timesteps that the scheduler has.
        correct: moves the latents before each step.
        correction_target: "conditional" or "latent"; see `CorrectionSettings`.
        parity: end as the reference does: its last step runs off the schedule and is discarded.
        step_options: arguments of the scheduler's `step`, such as eta, or the generator of noise drawn at each step.
        on_step: called after each step with its number and the latents; a tensor that it returns takes their place.
        stop: asked before each step; True ends the sampling there.

    Raises:
        ValueError: more steps than the schedule has, or `parity` with anything but DDIM predicting epsilon.
    """
    if parity and not (isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == "epsilon"):
        raise ValueError("parity is the reference's DDIM for models that predict epsilon; this one needs parity=False")
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
    if scheduler.timesteps.max() >= scheduler.config.num_train_timesteps:
        raise ValueError(
            f"the {len(scheduler.timesteps)} timesteps begin at {float(scheduler.timesteps.max()):g}, and the schedule "
            f"has {scheduler.config.num_train_timesteps}: take fewer num_inference_steps; half of these is always safe"
        )
    latents = previous = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        if stop is not None and stop():
            break
        corrected = correct(latents, timestep, step, len(scheduler.timesteps)) if correct is not None else None
        if corrected is None:
            corrected = latents
        elif correction_target == "latent":
            latents = corrected
        noise_pred = denoise(latents, corrected, timestep)
        previous = latents
        if parity:
            latents = reference_ddim_step(scheduler, noise_pred, timestep, latents)
        else:
            latents = scheduler.step(noise_pred, timestep, latents, **(step_options or {})).prev_sample
        if on_step is not None and isinstance(changed := on_step(step, latents), torch.Tensor):
            latents = changed
    return previous if parity else latents


def reference_ddim_step(scheduler, noise_pred, timestep, latents) -> torch.Tensor:
    """The reference's hand-written DDIM step; behind the last timestep its index wraps to the end of the schedule."""
    alphas_cumprod = scheduler.alphas_cumprod.to(latents.device)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha, alpha_prev = alphas_cumprod[timestep], alphas_cumprod[timestep - stride]
    pred_original = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    return alpha_prev.sqrt() * pred_original + (1 - alpha_prev).sqrt() * noise_pred


def draw(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    *,
    negative_prompts: list[str] | None = None,
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    scorer: Scorer | None = None,
    correction: CorrectionSettings | None = None,
    correction_prompts: list[str] | None = None,
    parity: bool = False,
    trace: list[dict] | None = None,
    observe: bool = True,
    corrector: Callable[[list[str], torch.Tensor], Corrector] | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> np.ndarray:
    """One batch of pictures, (B, H, W, 3) uint8: picture b shows prompt b, from the noise of seed b.

    Args:
        scorer: reads the matching score, for `correction` and `trace`.
        correction: none by default.
        correction_prompts: as a control, prompts whose score the correction follows instead of the pictures' own.
        trace: a list that is filled with the score of every step; see `SelfCorrection`.
        observe: without it, of corrected steps alone, which costs nothing.
        corrector: makes another corrector of the prompts and their states (B, L, E), which takes self-correction's
            place and whose latents sampling goes on from.

    Raises:
        ValueError: a size the model cannot draw, or lists that are not as long as `prompts`.
    """
    lists = {"seeds": seeds, "negative_prompts": negative_prompts, "correction_prompts": correction_prompts}
    for name, values in lists.items():
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{name} holds {len(values)}; {len(prompts)} prompts need as many")
    noise = initial_noise(seeds, sd.latent_shape(height, width)).to(sd.device)
    context, pooled = sd.encode_prompts(prompts)
    negative_context, _ = sd.encode_prompts(negative_prompts or [""] * len(prompts))
    settings = correction or CorrectionSettings(factor=0.0)
    denoise, correct = guided_steps(
        sd.unet, sd.scheduler, context, negative_context, pooled, guidance_scale, scorer, settings, trace, observe
    )
    if correct is not None:
        correct.seeds = seeds
    if correct is not None and correction_prompts is not None:
        correct.encoder_hidden_states, correct.pooled_prompt_embeds = sd.encode_prompts(correction_prompts)
    if corrector is not None:
        correct, settings = corrector(prompts, context), CorrectionSettings(target="latent")
    latents = sample(
        denoise,
        sd.scheduler,
        noise,
        num_inference_steps=num_inference_steps,
        correct=correct,
        correction_target=settings.target,
        parity=parity,
        on_step=on_step,
    )
    if not latents.isfinite().all():
        raise FloatingPointError(f"the latents are not finite: {advice_against_nan(sd)}")
    return to_images(sd.decode_latents(latents))
