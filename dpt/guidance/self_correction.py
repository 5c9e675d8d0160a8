"""Self-correction (Qu et al. 2024, section 3.4): before a step, a move along the gradient of the matching score.

z_t + factor * d s(z_t, y) / d z_t. The move is made in the variance-preserving space, so that one length means the
same with every scheduler. What it moves is the setting `correction_target`:

- conditional: the input of the conditional half of classifier-free guidance alone, as in the reference.
- latent: the latent itself, from which sampling goes on, as in the paper's figure.
- noise: the noise prediction, by which the predicted clean latent moves as far as `latent` moves it while the
  prediction stays: classifier guidance (Dhariwal & Nichol 2021, algorithm 2), eps - move / sqrt(1 - alpha_bar). Its
  gradient comes from the conditional half of the pass that is needed anyway.

Shapes: B images, C latent channels, (h, w) latent size.
"""

import torch

from dpt.adapter.adapter import Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features
from dpt.backbones.flow import FlowScheduler
from dpt.matching_score import gradient_of, score_gradient, score_of_features
from dpt.sampling import ClassifierFreeGuidance
from dpt.sampling_settings import Sampling


class SelfCorrection:
    """Self-correction as a `Guidance` around classifier-free guidance.

    Args:
        guidance: of the images' prompts.
        sampling: its factor or norm, target, window, and `on_nan`.
        trace: gets a record of every corrected step: step, timestep, and lists over images of score, length and
            relative_length (to the latent's norm) of the correction.
        conditioning: whose matching score is followed; by default the prompts' own.
    """

    def __init__(
        self,
        guidance: ClassifierFreeGuidance,
        scorer: Scorer,
        sampling: Sampling,
        trace: list[dict] | None = None,
        conditioning: Conditioning | None = None,
    ):
        self.guidance, self.scorer, self.sampling = guidance, scorer, sampling
        self.trace = [] if trace is None else trace
        self.own_conditioning = conditioning

    @property
    def conditioning(self) -> Conditioning:
        """Whose matching score is followed."""
        return self.guidance.conditioning if self.own_conditioning is None else self.own_conditioning

    def __call__(self, latents, timestep, step):
        """The noise prediction and the latents to step from. Raises FloatingPointError as `on_nan` says."""
        guidance, sampling = self.guidance, self.sampling
        if not sampling.is_corrected(step, len(guidance.scheduler.timesteps)):
            return guidance(latents, timestep, step)
        noisy_latents = guidance.scheduler.scale_model_input(latents, timestep)
        if sampling.correction_target == "noise":
            return self._move_prediction(latents, noisy_latents, timestep, step), latents
        score, gradient = score_gradient(
            guidance.denoiser, self.scorer, noisy_latents, timestep, self.conditioning, **guidance.unet_inputs
        )
        move = self.move(score, gradient, noisy_latents, timestep, step)
        corrected = latents + move * (1 / self._scale(latents, timestep))
        if sampling.correction_target == "latent":
            return guidance(corrected, timestep, step)
        return guidance(latents, timestep, step, conditional=corrected)

    def move(self, score, gradient, noisy_latents, timestep, step) -> torch.Tensor:
        """The step along the gradient (B, C, h, w), which it records with the scores (B,)."""
        finite = gradient.flatten(1).isfinite().all(1) & score.isfinite()  # (B,)
        if not finite.all() and self.sampling.on_nan == "raise":
            precision = "" if self.guidance.denoiser.dtype == torch.float32 else "draw in float32 (--dtype float32), "
            raise FloatingPointError(
                f"the matching score or its gradient is not finite at step {step} (timestep {int(timestep)}): "
                f"{precision}end the correction earlier (--correction_stop), or pass --on_nan skip"
            )
        gradient = torch.where(finite[:, None, None, None], gradient, 0.0)
        latent_norm, gradient_norm = (x.flatten(1).norm(dim=1) for x in (noisy_latents.float(), gradient))
        factor = torch.full_like(score, self.sampling.correction_factor)  # (B,)
        if self.sampling.correction_norm is not None:
            factor = self.sampling.correction_norm * latent_norm / gradient_norm.clamp(min=1e-30)
        lengths = factor.abs() * gradient_norm
        record = {"score": score, "length": lengths, "relative_length": lengths / latent_norm}
        self.trace.append({"step": step, "timestep": float(timestep)} | {k: v.tolist() for k, v in record.items()})
        return factor[:, None, None, None] * self.direction(gradient, gradient_norm, step)

    def direction(self, gradient: torch.Tensor, gradient_norm: torch.Tensor, step: int) -> torch.Tensor:
        """The direction that the factor multiplies: the gradient. A control overrides it."""
        return gradient

    def _scale(self, latents, timestep) -> torch.Tensor:
        """The factor by which the scheduler makes latents the denoiser's input."""
        return self.guidance.scheduler.scale_model_input(torch.ones_like(latents[:1, :1, :1, :1]), timestep)

    def _move_prediction(self, latents, noisy_latents, timestep, step) -> torch.Tensor:
        guidance, denoiser = self.guidance, self.guidance.denoiser
        with torch.enable_grad():  # up to the probed block: nothing behind it keeps activations
            noisy_latents = noisy_latents.detach().float().requires_grad_()
            features, positive = denoiser_features(
                denoiser,
                self.scorer.blocks,
                noisy_latents.to(denoiser.dtype),
                timestep,
                guidance.conditioning,
                with_noise_pred=True,
                gradients_up_to_features=True,
                **guidance.unet_inputs,
            )
            score = score_of_features(self.scorer, features, timestep, self.conditioning.pooled_prompt_embeds)
            gradient = gradient_of(score, noisy_latents, denoiser.dtype)
        noise_pred = positive.detach().float()
        if guidance.guidance_scale > 1:
            noise_pred = guidance.combine(guidance.predict(latents, timestep, guidance.negative), noise_pred)
        move = self.move(score.detach(), gradient, noisy_latents.detach(), timestep, step)
        alpha = self._alpha(latents, timestep)
        if alpha == 0:  # pure noise, of which no clean latent can be predicted
            return noise_pred
        sigma = (1 - alpha**2).sqrt()
        if isinstance(guidance.scheduler, FlowScheduler):  # eps - x_0: both move
            return noise_pred - move * (alpha + sigma) / (alpha * sigma)
        if guidance.scheduler.config.prediction_type == "v_prediction":  # alpha eps - sigma x_0: both move
            return noise_pred - move / (alpha * sigma)
        return noise_pred - move / sigma

    def _alpha(self, latents, timestep) -> torch.Tensor:
        """sqrt(alpha_bar) at the timestep: the scale itself of schedulers whose latents grow with the noise."""
        if isinstance(self.guidance.scheduler, FlowScheduler):
            return self.guidance.scheduler.alpha(timestep)
        scale = self._scale(latents, timestep)
        if (scale != 1).all():
            return scale
        return self.guidance.scheduler.alphas_cumprod.to(latents.device)[timestep.long()].sqrt()
