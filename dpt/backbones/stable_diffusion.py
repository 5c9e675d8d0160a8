"""The frozen parts of a latent-diffusion model: load, encode prompts and images, decode, noise targets.

Shapes: B batch, L text tokens, E context width, P pooled width, C latent channels, (H, W) image, (h, w) latent size.
All sizes and factors come from the model's own config.
"""

import hashlib
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import BatchEncoding, CLIPTextModel, CLIPTokenizer

from dpt.backbones.conditioning import Conditioning
from dpt.base_models import check_size
from dpt.sampling_settings import Sampling

VAE_SLICING_ABOVE = 4  # images encoded or decoded at once


@dataclass
class StableDiffusion:
    """The components of a `StableDiffusionPipeline` folder, in evaluation mode and without gradients.

    `name` is what the user called the model, `source` the folder or hub id it came from.
    """

    name: str
    source: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    denoiser: UNet2DConditionModel
    scheduler: DDIMScheduler

    stock_class = StableDiffusionPipeline
    """the pipeline of diffusers of the same parts"""
    has_t5 = False
    execution_device = None
    """where it computes, if that is not where its weights lie (`dpt.backbones.offload`)"""

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.denoiser.device if self.execution_device is None else self.execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell, each way."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """Height and width in pixels that the denoiser was made for."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; None stands for the model's own size."""
        return (height or self.default_size, width or self.default_size)

    @property
    def latent_channels(self) -> int:
        """C of a latent."""
        return self.denoiser.config.in_channels

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) for an image of the given size in pixels, by default the model's own.

        Raises:
            ValueError: a size that is not a positive multiple of `vae_scale_factor`.
        """
        factor, sides = self.vae_scale_factor, []
        for name, value in {"H": height, "W": width}.items():
            sides.append(check_size(name, self.default_size if value is None else value, factor) // factor)
        return (self.latent_channels, *sides)

    def expanded(self, prompt: str) -> str:
        """The prompt with a word for each vector of its textual inversions: "<cat>" as "<cat> <cat>_1 <cat>_2"."""
        return expanded(self.tokenizer, prompt)

    def encode_prompts(self, prompts: list[str], *, clip_skip: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Context (B, L, E) and pooled text (B, P) of prompts; longer ones are cut at the encoders' L tokens.

        Equal prompts are encoded once. Without gradients, unless the text encoder of Stable Diffusion 1 and 2 is in
        training mode.

        Args:
            clip_skip: layers of CLIP that the context leaves out, from the last that it has; the pooled text has all.

        Raises:
            ValueError: a `clip_skip` beyond the text encoder's layers, or any for FLUX, whose context is not CLIP's.
        """
        distinct = list(dict.fromkeys(prompts))
        context, pooled = self._encode(distinct, clip_skip)
        rows = [distinct.index(prompt) for prompt in prompts]
        return context[rows], pooled[rows]

    def _encode(self, prompts: list[str], clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        num_layers = self.text_encoder.config.num_hidden_layers
        if clip_skip is not None and not 0 <= clip_skip <= num_layers:
            raise ValueError(f"clip_skip is {clip_skip}; the text encoder has {num_layers} layers")
        tokens = tokenize(self.tokenizer, prompts).to(self.device)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder.training):
            output = self.text_encoder(
                tokens.input_ids,
                attention_mask=tokens.attention_mask if uses_mask else None,
                output_hidden_states=clip_skip is not None,
            )
            context = output.last_hidden_state
            if clip_skip is not None:
                context = self.text_encoder.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return context, output.pooler_output

    def condition(
        self, prompts: list[str], *, size: tuple[int, int] | None = None, negative: bool = False
    ) -> Conditioning:
        """The conditioning of prompts, for pictures of a size in pixels, by default the model's own.

        Args:
            negative: whether these are negative prompts; some models take zeros for an empty one.
        """
        return Conditioning(*self.encode_prompts(prompts))

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled text that ITM compares with."""
        return self.text_encoder.config.hidden_size

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """Every network by its name in a pipeline, the denoiser last."""
        return {"text_encoder": self.text_encoder, "vae": self.vae, "unet": self.denoiser}

    def stock_pipeline(self) -> DiffusionPipeline:
        """The pipeline of diffusers of the same parts, with a scheduler of its own: DDIM, or flow matching's Euler."""
        others = {"tokenizer": self.tokenizer, "scheduler": DDIMScheduler.from_config(self.scheduler.config)}
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**self.parts, **others, **absent)

    @property
    def longest_reader(self) -> tuple[CLIPTokenizer, int]:
        """The tokenizer of the text encoder that reads most of a prompt, and how many tokens it reads."""
        return self.tokenizer, self.tokenizer.model_max_length

    def truncated_part(self, prompt: str) -> str:
        """The end of an `expanded` prompt that the text encoder does not read; "" when it reads all."""
        prompt, (tokenizer, length) = self.expanded(prompt), self.longest_reader
        tokens = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
        read = max(end for _, end in tokens["offset_mapping"])
        return prompt[read:].strip()

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Scaled latents (B, C, h, w) float32 of pixels (B, 3, H, W) in [-1, 1].

        With a CPU `generator` the latents are sampled from the posterior; without one they are its mean.
        """
        encoded = [
            self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist.parameters
            for part in pixels.split(VAE_SLICING_ABOVE)
        ]
        posterior = DiagonalGaussianDistribution(torch.cat(encoded).float())
        latents = posterior.mean
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            latents = latents + posterior.std * noise
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) float32 in [0, 1] of scaled latents (B, C, h, w)."""
        if len(latents) > VAE_SLICING_ABOVE:
            self.vae.enable_slicing()
        latents = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        latents = latents + (self.vae.config.shift_factor or 0)
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def effective(self, sampling: Sampling) -> dict:
        """Settings of `Sampling` that are fixed for this family, whatever is asked for."""
        return {}

    def noise_target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of the denoiser's training: the noise or the velocity, as its scheduler's config says."""
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"prediction_type is {prediction_type!r}; it must be epsilon or v_prediction")


def expanded(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """See `StableDiffusion.expanded`."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> BatchEncoding:
    """Tokens of prompts, padded or cut to the encoder's length."""
    return tokenizer(
        [expanded(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )


def weights_fingerprint(*modules: torch.nn.Module) -> str:
    """16 hex digits that tell models apart: a hash of every tensor's name, shape and first 16 values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            values = tensor.flatten()[:16].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values)
    return digest.hexdigest()[:16]


def advice_against_nan(sd: StableDiffusion) -> str:
    """Advice, as text, for latents or scores that are not finite."""
    config = sd.scheduler.config
    if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
        return (
            "its scheduler begins at pure noise (rescale_betas_zero_snr), where a prediction_type of epsilon says "
            "nothing: set it to v_prediction, or rescale_betas_zero_snr to false, in scheduler_config.json"
        )
    return ("" if sd.dtype == torch.float32 else "draw in float32 (--dtype float32), or ") + "draw at a lower --scale"
