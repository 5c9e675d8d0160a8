"""Noise schedules by name, the reference's among them, and their state when images leave a batch."""

import copy

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from dpt.backbones.flow import FlowScheduler
from dpt.base_models import check_flow

CLASSES = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}


class ReferenceDDIMScheduler(DDIMScheduler):
    """DDIM as the reference steps: by hand, and off the schedule after the last timestep, whose result it discards.

    So the last step returns the latents that it was given.
    """

    discarded: torch.Tensor | None = None
    """the result of the last step, off the schedule"""

    def step(self, model_output, timestep, sample, **kwargs) -> DDIMSchedulerOutput:
        """One step; the arguments are `DDIMScheduler.step`'s, of which `eta` must be 0."""
        alphas_cumprod = self.alphas_cumprod.to(sample.device)
        stride = self.config.num_train_timesteps // self.num_inference_steps
        alpha, alpha_prev = alphas_cumprod[timestep], alphas_cumprod[timestep - stride]
        pred_original = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        prev_sample = alpha_prev.sqrt() * pred_original + (1 - alpha_prev).sqrt() * model_output
        if timestep == self.timesteps[-1]:
            self.discarded, prev_sample = prev_sample, sample
        return DDIMSchedulerOutput(prev_sample=prev_sample)


def make_scheduler(base: SchedulerMixin, name: str, *, parity: bool = False) -> SchedulerMixin:
    """A new scheduler by name, with the noise levels of a model's scheduler.

    Raises:
        ValueError: `parity` with a model that does not predict epsilon, or what flow matching has not.
    """
    if isinstance(base, FlowScheduler):
        check_flow(parity=parity, scheduler=name)
        return copy.deepcopy(base)
    if parity and base.config.prediction_type != "epsilon":
        raise ValueError("parity is the reference's DDIM for models that predict epsilon; this one needs parity=False")
    kind = ReferenceDDIMScheduler if parity else CLASSES[name]
    return copy.deepcopy(base) if kind is type(base) else kind.from_config(base.config)


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int | None, device, *, shape=None, **given) -> None:
    """Sets the schedule's timesteps.

    Args:
        shape: of the latents, (C, h, w), by which flow matching may choose its noise levels.
        given: `timesteps` or `sigmas`, where the scheduler takes them.

    Raises:
        ValueError: more steps than the schedule has.
    """
    if isinstance(scheduler, FlowScheduler):  # begins at 1000
        scheduler.set_timesteps(num_inference_steps, device, shape=shape, **given)
        return
    if given:
        scheduler.set_timesteps(device=device, **given)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    if scheduler.timesteps.max() >= scheduler.config.num_train_timesteps:
        raise ValueError(
            f"the {len(scheduler.timesteps)} timesteps begin at {float(scheduler.timesteps.max()):g}, and the schedule "
            f"has {scheduler.config.num_train_timesteps}: take fewer num_inference_steps; half of these is always safe"
        )


def predicted_clean(scheduler: SchedulerMixin, noise_pred, timestep, latents: torch.Tensor) -> torch.Tensor:
    """The clean latents that a prediction implies, (B, C, h, w). The scheduler stays as it is.

    From a scheduler that names none (dpm++), the half-drawn latents after its step.
    """
    stepped = copy.deepcopy(scheduler).step(noise_pred, timestep, latents)
    return stepped.get("pred_original_sample", stepped.prev_sample)


def select_images(scheduler: SchedulerMixin, latents: torch.Tensor, indices: torch.Tensor) -> None:
    """Keeps some images of the batch (B, C, h, w) in the state of a scheduler that remembers earlier steps."""

    def of_images(value) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == latents.shape

    for name, value in vars(scheduler).items():
        if of_images(value):
            setattr(scheduler, name, value[indices])
        elif isinstance(value, list) and any(map(of_images, value)):
            setattr(scheduler, name, [x[indices] if of_images(x) else x for x in value])


def join_images(parts: list[tuple[SchedulerMixin, torch.Tensor]]) -> SchedulerMixin:
    """The first of several schedulers that stand at one step, with the state of all their images.

    Args:
        parts: schedulers and their latents (B_k, C, h, w).
    """
    joined, (_, latents) = parts[0][0], parts[0]

    def of_images(value) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == latents.shape

    for name, value in list(vars(joined).items()):
        others = [getattr(scheduler, name) for scheduler, _ in parts]
        if of_images(value):
            setattr(joined, name, torch.cat(others))
        elif isinstance(value, list) and any(map(of_images, value)):
            columns = zip(*others, strict=True)
            setattr(joined, name, [torch.cat(xs) if of_images(xs[0]) else xs[0] for xs in columns])
    return joined
