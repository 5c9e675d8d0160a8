"""Stable Diffusion 3 and 3.5: a transformer in place of the U-Net, flow matching, two CLIPs and, where it is there, T5.

Shapes: B batch, L text tokens (of CLIP and T5 one behind the other), E context width, P both CLIPs' pooled widths.
"""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import check_size
from dpt.sampling_settings import Sampling

T5_TOKENS = 256
"""that T5 reads in the stock pipeline"""


@dataclass
class StableDiffusion3(StableDiffusion):
    """The components of a `StableDiffusion3Pipeline` folder, in evaluation mode and without gradients.

    `denoiser` is the transformer, `text_encoder` the first CLIP. ITM compares with both CLIPs' pooled texts side by
    side, as the transformer gets them.
    """

    stock_class = StableDiffusion3Pipeline

    pipeline: StableDiffusion3Pipeline
    """the stock pipeline of the same parts, which encodes prompts"""

    @property
    def has_t5(self) -> bool:
        """Whether the context holds T5's states, and not zeros in their place."""
        return self.pipeline.components.get("text_encoder_3") is not None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell, each way."""
        return self.pipeline.vae_scale_factor

    @property
    def cell(self) -> int:
        """Pixels a token, each way."""
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w); sides are multiples of a patch of the transformer. Raises ValueError for others."""
        for name, value in {"H": height, "W": width}.items():
            check_size(name, self.default_size if value is None else value, self.cell)
        return super().latent_shape(height, width)

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled text."""
        return self.denoiser.config.pooled_projection_dim

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """Every network by its name in a pipeline, the transformer last."""
        parts = self.pipeline.components
        encoders = {name: parts.get(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        return {name: part for name, part in encoders.items() if part is not None} | {
            "vae": self.vae,
            "transformer": self.denoiser,
        }

    def stock_pipeline(self) -> StableDiffusion3Pipeline:
        """The pipeline of diffusers of the same parts, with flow matching's Euler."""
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        return self.pipeline

    @property
    def longest_reader(self):
        """T5's tokenizer, where it is there; else CLIP's."""
        return (self.pipeline.tokenizer_3, T5_TOKENS) if self.has_t5 else super().longest_reader

    @torch.no_grad()
    def _encode(self, prompts: list[str], clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock pipeline encodes them."""
        options = {"device": self.device, "do_classifier_free_guidance": False, "clip_skip": clip_skip}
        context, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, **options)
        return context, pooled

    def condition(
        self, prompts: list[str], *, size: tuple[int, int] | None = None, negative: bool = False
    ) -> Conditioning:
        """Adds `pooled_projections` (B, P) to context and pooled text."""
        context, pooled = self.encode_prompts(prompts)
        return Conditioning(context, pooled, {"pooled_projections": pooled})

    def effective(self, sampling: Sampling) -> dict:
        """The scheduler is the model's own."""
        return {"scheduler": "flow"}

    def noise_target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity that the transformer is trained to predict."""
        return noise - latents
