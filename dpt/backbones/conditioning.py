"""The encoded prompts, as the denoiser and the adapter take them. `StableDiffusion.condition` makes them.

Shapes: B images, L text tokens, E context width, P pooled width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts for the denoiser and the adapter; the first dimension of every tensor runs over images."""

    encoder_hidden_states: torch.Tensor
    """(B, L, E)"""
    pooled_prompt_embeds: torch.Tensor | None = None
    """(B, P), what ITM compares with"""
    further: dict[str, torch.Tensor] = field(default_factory=dict)
    """a model's further inputs by name, such as SDXL's `time_ids`"""

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def map(self, change) -> "Conditioning":
        """A copy in which a function has changed each tensor."""
        pooled = None if self.pooled_prompt_embeds is None else change(self.pooled_prompt_embeds)
        further = {name: change(value) for name, value in self.further.items()}
        return Conditioning(change(self.encoder_hidden_states), pooled, further)

    def __getitem__(self, indices) -> "Conditioning":
        """The conditioning of some of the images, chosen by a list, a tensor or a slice of indices."""
        return self.map(lambda value: value[indices])

    def with_guidance(self, scale: float | None) -> "Conditioning":
        """A copy with another guidance scale, which distilled models take as an input; None changes nothing.

        Raises:
            ValueError: a scale for a model that takes none.
        """
        if scale is None:
            return self
        if "guidance" not in self.further:
            raise ValueError(
                f"distilled_guidance is {scale:g}; this model takes none as an input: it is for FLUX.1-dev"
            )
        further = self.further | {"guidance": torch.full_like(self.further["guidance"], scale)}
        return Conditioning(self.encoder_hidden_states, self.pooled_prompt_embeds, further)

    @staticmethod
    def join(parts: Iterable["Conditioning"]) -> "Conditioning":
        """The conditioning of the images of several batches together."""
        parts = list(parts)
        pooled = [part.pooled_prompt_embeds for part in parts]
        return Conditioning(
            torch.cat([part.encoder_hidden_states for part in parts]),
            None if any(value is None for value in pooled) else torch.cat(pooled),
            {name: torch.cat([part.further[name] for part in parts]) for name in parts[0].further},
        )
