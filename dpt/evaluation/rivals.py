"""What one would otherwise use: Attend-and-Excite (Chefer et al. 2023), as a corrector of `dpt.sampling.sample`.

Before a step the latent moves so that every subject token is attended to somewhere: down the gradient of
1 - (the largest smoothed cross-attention of the most neglected token). Best-of-N, higher guidance and others' LoRA are
settings of an arm.

Shapes: B batch, C latent channels, (h, w) latent size, L text tokens, R positions of an attention map.
"""

import contextlib
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from dpt.sampling import HALF_GRADIENT_SCALE
from dpt.shapes.scenes import SHAPES
from dpt.stable_diffusion import StableDiffusion, known_name

FUNCTION_WORDS = """a an the of on in at to and or with by for from is are be it its this that there one two three four
    five some left right above below over under top bottom next near beside behind front photo picture image"""
SCALE_FACTOR = 20.0
SHARPNESS = 100  # what attention is multiplied by before its softmax over tokens
SIGMA = 0.5


@dataclass
class AttendAndExcite:
    """A `Corrector` whose result sampling goes on from (correction_target "latent").

    Args:
        token_indices: of each prompt's subjects, positions in `encoder_hidden_states`.
        resolution: side of the attention maps that are read; the paper's is a quarter of the latent's.
    """

    unet: UNet2DConditionModel
    encoder_hidden_states: torch.Tensor
    token_indices: list[list[int]]
    resolution: int
    scale_factor: float = SCALE_FACTOR
    """length of the first step, as a multiple of the gradient; later ones are shorter"""
    altered_share: float = 0.5
    """of the steps, from the first, in which the latent moves (the paper: 25 of 50)"""
    thresholds: dict[float, float] = field(default_factory=lambda: {0.0: 0.05, 0.2: 0.5, 0.4: 0.8})
    """share of the steps -> attention that every subject must reach there"""
    max_refinements: int = 20

    def __call__(self, latents: torch.Tensor, timestep, step: int, num_steps: int) -> torch.Tensor | None:
        """Moved latents, (B, C, h, w), or None where nothing is due."""
        refined = {round(share * num_steps): threshold for share, threshold in self.thresholds.items()}
        alters = step < self.altered_share * num_steps
        if not alters and step not in refined:
            return None
        size = self.scale_factor * (1 - 0.5 * step / max(1, num_steps - 1)) ** 0.5
        if step in refined:
            latents = self._refine(latents, timestep, size, 1 - refined[step])
        if alters:
            _, gradient = self.loss_gradient(latents, timestep)
            latents = latents - size * gradient
        return latents

    def _refine(self, latents, timestep, size, target):
        latents, everything = latents.clone(), torch.arange(len(latents), device=latents.device)
        loss, _ = self.loss_gradient(latents, timestep)
        rows = everything[loss > target]  # only what is still lacking is looked at, so none pays for another
        for _ in range(self.max_refinements):
            if not len(rows):
                break
            loss, gradient = self.loss_gradient(latents[rows], timestep, rows.tolist())
            latents[rows] -= size * gradient
            rows = rows[loss > target]
        return latents

    @torch.enable_grad()
    def loss_gradient(
        self, latents: torch.Tensor, timestep, rows: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B,) in [0, 1] and their gradient in the latents, (B, C, h, w).

        Args:
            rows: which prompts the latents are of; by default all.
        """
        rows = list(range(len(latents))) if rows is None else rows
        scale = HALF_GRADIENT_SCALE if self.unet.dtype == torch.float16 else 1.0
        latents = latents.detach().requires_grad_(True)
        with stored_attention(self.unet, self.resolution) as maps:
            self.unet(latents.to(self.unet.dtype), timestep, encoder_hidden_states=self.encoder_hidden_states[rows])
        attention = torch.cat(maps, dim=1).float().mean(1)  # (B, R, L), over layers and heads
        attention = (SHARPNESS * attention[:, :, 1:-1]).softmax(-1)
        losses = []
        for own, row in zip(attention, rows, strict=True):
            indices = [index - 1 for index in self.token_indices[row]]
            chosen = own[:, indices].T.unflatten(1, (self.resolution, -1))  # (N, r, r)
            losses.append((1 - smooth(chosen).amax((1, 2))).clamp(min=0).max() if indices else own.sum() * 0)
        losses = torch.stack(losses)
        (gradient,) = torch.autograd.grad(losses.sum() * scale, latents)
        return losses.detach(), gradient / scale


def smooth(maps: torch.Tensor) -> torch.Tensor:
    """3 x 3 Gaussian smoothing of maps (N, r, r), the border mirrored."""
    distance = torch.tensor([-1.0, 0.0, 1.0], device=maps.device)
    line = torch.exp(-((distance / (2 * SIGMA)) ** 2))  # as the released code has it, not exp(-x^2 / 2 sigma^2)
    kernel = (line[:, None] * line) / (line.sum() ** 2)
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None].to(maps.dtype))[:, 0]


class StoringProcessor:
    """A cross-attention processor that keeps its probabilities, (B, heads, R, L), where they have R positions.

    Args:
        met: gets the numbers of positions that came by, whether kept or not.
    """

    def __init__(self, maps: list[torch.Tensor], positions: int, met: set[int]):
        self.maps, self.positions, self.met = maps, positions, met

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, **kwargs):
        parts = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        query, key, value = map(attn.head_to_batch_dim, parts)
        probabilities = attn.get_attention_scores(query, key)  # (B * heads, R, L), upcast where the model wants it
        self.met.add(hidden_states.shape[1])
        if hidden_states.shape[1] == self.positions:
            self.maps.append(probabilities.unflatten(0, (len(hidden_states), -1)))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


@contextlib.contextmanager
def stored_attention(unet: UNet2DConditionModel, resolution: int):
    """The list that fills with the U-Net's cross-attention maps of that side while the context lasts.

    Raises:
        ValueError: no map of that side; said when the context ends.
    """
    before, maps, met = unet.attn_processors, [], set()
    stores = {
        name: StoringProcessor(maps, resolution**2, met) if name.endswith("attn2.processor") else processor
        for name, processor in before.items()
    }
    unet.set_attn_processor(stores)
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)
    if not maps:
        sides = ", ".join(f"{side**0.5:g}" for side in sorted(met))
        raise ValueError(f"attention_resolution is {resolution}; the U-Net's cross-attention has the sides {sides}")


def subject_tokens(sd: StableDiffusion, prompt: str) -> list[int]:
    """Positions of the prompt's subjects: the shapes model's shapes, elsewhere all but function words."""
    prompt = sd.expanded(prompt)  # as it is encoded
    words = list(re.finditer(r"\w+", prompt.lower()))
    subjects = []
    if known_name(sd.name) == "shapes":
        subjects = [w for w in words if w[0].removesuffix("es") in SHAPES or w[0].removesuffix("s") in SHAPES]
    subjects = subjects or [word for word in words if word[0] not in FUNCTION_WORDS.split()]
    encoding = sd.tokenizer(prompt, truncation=True, max_length=sd.tokenizer.model_max_length)
    positions = [encoding.char_to_token(word.end() - 1) for word in subjects]
    return [position for position in positions if position is not None]
