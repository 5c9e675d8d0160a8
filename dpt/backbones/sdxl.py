"""Stable Diffusion XL: two text encoders, a pooled text and the picture's size among the U-Net's inputs.

Shapes: B batch, L text tokens, E context width (of both encoders together), P width of the second one's projection.
"""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.stable_diffusion import StableDiffusion, tokenize


@dataclass
class StableDiffusionXL(StableDiffusion):
    """The components of a `StableDiffusionXLPipeline` folder, in evaluation mode and without gradients.

    ITM compares with the second text encoder's projection, which is contrastive as that of Stable Diffusion's is.
    """

    stock_class = StableDiffusionXLPipeline

    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection
    zeros_for_empty_prompt: bool = True
    """whether guidance leads away from zeros, and not from the empty prompt's states, as the folder says"""

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled text."""
        return self.text_encoder_2.config.projection_dim

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """Every network by its name in a pipeline, the U-Net last."""
        *others, denoiser = super().parts.items()
        return dict([*others, ("text_encoder_2", self.text_encoder_2), denoiser])

    def stock_pipeline(self) -> StableDiffusionXLPipeline:
        """The pipeline of diffusers of the same parts, with DDIM."""
        tokenizers = {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer_2}
        scheduler, zeros = DDIMScheduler.from_config(self.scheduler.config), self.zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
        return StableDiffusionXLPipeline(**self.parts, **tokenizers, scheduler=scheduler, **options)

    @torch.no_grad()
    def _encode(self, prompts: list[str], clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The second-last layer of both encoders, and the projection of the second one."""
        encoders = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        fewest = min(encoder.config.num_hidden_layers for _, encoder in encoders)
        if clip_skip is not None and not 0 <= clip_skip < fewest:
            raise ValueError(
                f"clip_skip is {clip_skip}; the text encoders have {fewest} layers, and the last is left out"
            )
        states = []
        for tokenizer, encoder in encoders:
            tokens = tokenize(tokenizer, prompts).to(self.device)
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-(2 + (clip_skip or 0))])
        return torch.cat(states, dim=-1), output.text_embeds

    def condition(
        self, prompts: list[str], *, size: tuple[int, int] | None = None, negative: bool = False
    ) -> Conditioning:
        """Adds `text_embeds` (B, P) and `time_ids` (B, 6) to context and pooled text.

        The time ids say that the pictures have that size without resizing or cropping.
        """
        context, pooled = self.encode_prompts(prompts)
        if negative and self.zeros_for_empty_prompt:
            written = torch.tensor([bool(prompt) for prompt in prompts], device=context.device)
            context, pooled = context * written[:, None, None], pooled * written[:, None]
        height, width = size or (self.default_size, self.default_size)
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=pooled.device, dtype=pooled.dtype)
        return Conditioning(context, pooled, {"text_embeds": pooled, "time_ids": time_ids.repeat(len(prompts), 1)})
