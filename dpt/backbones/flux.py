"""FLUX.1: a transformer on packed latents, flow matching, a CLIP for the pooled text and T5 for the context.

Shapes: B batch, L text tokens of T5, E context width, P CLIP's pooled width.
"""

from dataclasses import dataclass

import torch
from diffusers import FluxPipeline

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.sd3 import StableDiffusion3
from dpt.sampling_settings import Sampling

DISTILLED_GUIDANCE = 3.5
"""of the models that were distilled from guided ones, as their stock pipeline has it"""


@dataclass
class Flux(StableDiffusion3):
    """The components of a `FluxPipeline` folder, in evaluation mode and without gradients.

    `denoiser` is the transformer. ITM compares with CLIP's pooled text, as the transformer gets it.
    """

    stock_class = FluxPipeline

    pipeline: FluxPipeline
    """the stock pipeline of the same parts, which encodes prompts"""

    has_t5 = True

    @property
    def default_size(self) -> int:
        """Height and width in pixels that the stock pipeline draws, as the transformer has no size of its own."""
        return self.pipeline.default_sample_size * self.vae_scale_factor

    @property
    def cell(self) -> int:
        """Pixels a token, each way."""
        return 2 * self.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        """Channels of a latent before four cells are packed into a token."""
        return self.denoiser.config.in_channels // 4

    @property
    def longest_reader(self):
        """T5's tokenizer."""
        return self.pipeline.tokenizer_2, 512 if self.denoiser.config.guidance_embeds else 256  # as they were made

    @torch.no_grad()
    def _encode(self, prompts: list[str], clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's states and CLIP's pooled text, as the stock pipeline encodes them."""
        if clip_skip is not None:
            raise ValueError(f"clip_skip is {clip_skip}; FLUX reads its context by T5: leave it out")
        _, length = self.longest_reader
        context, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        return context, pooled

    def condition(
        self, prompts: list[str], *, size: tuple[int, int] | None = None, negative: bool = False
    ) -> Conditioning:
        """Adds `pooled_projections` (B, P) to context and pooled text, and for distilled models `guidance` (B,)."""
        conditioning = super().condition(prompts)
        if self.denoiser.config.guidance_embeds:
            conditioning.further["guidance"] = torch.full((len(prompts),), DISTILLED_GUIDANCE, device=self.device)
        return conditioning

    def effective(self, sampling: Sampling) -> dict:
        """The scheduler is the model's own; distilled models draw with `DISTILLED_GUIDANCE` where none is given."""
        given = sampling.distilled_guidance
        if given is None and self.denoiser.config.guidance_embeds:
            given = DISTILLED_GUIDANCE
        return super().effective(sampling) | {"distilled_guidance": given}
