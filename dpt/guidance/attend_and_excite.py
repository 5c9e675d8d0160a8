"""Attend-and-Excite (Chefer et al. 2023): the usual method against neglected subjects, to compare with.

Before a step the latent moves so that every subject token is attended to somewhere: down the gradient of
1 - (the largest smoothed cross-attention of the most neglected token).

Shapes: B batch, C latent channels, (h, w) latent size, L text tokens, R positions of an attention map.
"""

import contextlib
import re

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from dpt.backbones.blocks import is_transformer
from dpt.backbones.features import denoiser_features
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.matching_score import gradient_of
from dpt.sampling import ClassifierFreeGuidance
from dpt.sampling_settings import Sampling
from dpt.worlds import is_subject

FUNCTION_WORDS = """a an the of on in at to and or with by for from is are be it its this that there one two three four
    five some left right above below over under top bottom next near beside behind front photo picture image"""
SCALE_FACTOR = 20.0
ALTERED_SHARE = 0.5  # of the steps, from the first, in which the latent moves (the paper: 25 of 50)
THRESHOLDS = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}  # share of the steps -> attention that every subject must reach there
MAX_REFINEMENTS = 20
SHARPNESS = 100  # what attention is multiplied by before its softmax over tokens
SIGMA = 0.5


class AttendAndExcite:
    """Attend-and-Excite as a `Guidance` around classifier-free guidance.

    Args:
        token_indices: of each prompt's subjects, positions in `encoder_hidden_states`.
        sampling: `attention_resolution`, the side of the attention maps that are read, by default a quarter of the
            latent's as in the paper; `attention_step`, the length of the first step as a multiple of the gradient,
            later ones are shorter.

    Raises:
        ValueError: a model without a U-Net.
    """

    def __init__(self, guidance: ClassifierFreeGuidance, token_indices: list[list[int]], sampling: Sampling):
        if is_transformer(guidance.denoiser.config):
            raise ValueError(
                "Attend-and-Excite reads the attention of a U-Net, and this model is a transformer: leave it out"
            )
        self.guidance, self.token_indices, self.sampling = guidance, token_indices, sampling

    def __call__(self, latents, timestep, step):
        """The noise prediction and the moved latents."""
        return self.guidance(self.moved(latents, timestep, step), timestep, step)

    def moved(self, latents: torch.Tensor, timestep, step: int) -> torch.Tensor:
        """The latents that sampling goes on from, (B, C, h, w); unchanged at steps without a move.

        They move in the scale of the U-Net's input, so that a step means the same with every scheduler.
        """
        scheduler, before = self.guidance.scheduler, latents
        scale = scheduler.scale_model_input(torch.ones_like(latents[:1, :1, :1, :1]), timestep)
        num_steps, latents = len(scheduler.timesteps), scheduler.scale_model_input(latents, timestep)
        refined = {round(share * num_steps): threshold for share, threshold in THRESHOLDS.items()}
        step_size = SCALE_FACTOR if self.sampling.attention_step is None else self.sampling.attention_step
        size = step_size * (1 - 0.5 * step / max(1, num_steps - 1)) ** 0.5
        if step in refined:
            latents = self._refine(latents, timestep, size, 1 - refined[step])
        if step < ALTERED_SHARE * num_steps:
            _, gradient = self.loss_gradient(latents, timestep)
            latents = latents - size * gradient
        elif step not in refined:
            return before
        return latents / scale

    def _refine(self, latents, timestep, size, target):
        latents, everything = latents.clone(), torch.arange(len(latents), device=latents.device)
        loss, _ = self.loss_gradient(latents, timestep)
        rows = everything[loss > target]  # only what is still lacking is looked at, so none pays for another
        for _ in range(MAX_REFINEMENTS):
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
        rows, (height, width) = list(range(len(latents))) if rows is None else rows, latents.shape[-2:]
        if height != width:
            raise ValueError(f"H and W are in the ratio {height} to {width}; Attend-and-Excite needs equal ones")
        guidance, resolution = self.guidance, self.sampling.attention_resolution or width // 4
        latents = latents.detach().requires_grad_(True)
        with stored_attention(guidance.denoiser, resolution) as maps:
            noisy_latents, texts = latents.to(guidance.denoiser.dtype), guidance.conditioning[rows]
            options = {"with_noise_pred": True} | guidance.unet_inputs
            denoiser_features(guidance.denoiser, (), noisy_latents, timestep, texts, **options)
        attention = torch.cat(maps, dim=1).float().mean(1)  # (B, R, L), over layers and heads
        attention = (SHARPNESS * attention[:, :, 1:-1]).softmax(-1)
        losses = []
        for own, row in zip(attention, rows, strict=True):
            indices = [index - 1 for index in self.token_indices[row]]
            chosen = own[:, indices].T.unflatten(1, (resolution, -1))  # (N, r, r)
            losses.append((1 - smooth(chosen).amax((1, 2))).clamp(min=0).max() if indices else own.sum() * 0)
        losses = torch.stack(losses)
        return losses.detach(), gradient_of(losses, latents, guidance.denoiser.dtype)


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
    """Positions of the prompt's subjects: the words known to be some, or else all but function words."""
    prompt = sd.expanded(prompt)  # as it is encoded
    words = list(re.finditer(r"\w+", prompt.lower()))
    subjects = [word for word in words if is_subject(sd.name, word[0])]
    subjects = subjects or [word for word in words if word[0] not in FUNCTION_WORDS.split()]
    encoding = sd.tokenizer(prompt, truncation=True, max_length=sd.tokenizer.model_max_length)
    positions = [encoding.char_to_token(word.end() - 1) for word in subjects]
    return [position for position in positions if position is not None]
