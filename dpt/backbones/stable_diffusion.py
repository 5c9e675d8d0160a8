"""The frozen parts of a latent-diffusion model: load, encode prompts and images, decode, noise targets.

Shapes: B batch, L text tokens, E context width, P pooled width, C latent channels, (H, W) image, (h, w) latent size.
Whatever a size or a factor is, the model's own config says it.
"""

import contextlib
import difflib
import hashlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import CLIPTextModel, CLIPTokenizer

from dpt.backbones.model_folder import (
    LOADING_ERRORS,
    TextConfig,
    check_folder,
    check_kind,
    check_weights,
    choose_variant,
    weight_files,
    without_marks,
)
from dpt.backbones.unet_features import Conditioning
from dpt.base_models import CKPT_FOLDER, DEFAULT_MODEL, MIRRORS, MODELS, check_size
from dpt.files import read_json
from dpt.weights import read_shapes

_SD2 = {
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
ARCHITECTURES = {
    "sd21-base": _SD2,
    "sd21": _SD2 | {"sample_size": 96},
    "sd14": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
}
"""What the U-Nets of named models differ in from `UNet2DConditionModel`'s defaults; their text encoders are as wide as
`cross_attention_dim`."""
OTHER_PARAMETERS = {"sd21-base": 424_000_000, "sd21": 424_000_000, "sd14": 207_000_000}
"""about: text encoder and autoencoder"""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell, each way."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """Height and width in pixels that the U-Net was made for."""
        return self.unet.config.sample_size * self.vae_scale_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) for an image of the given size in pixels, by default the model's own.

        Raises:
            ValueError: a size that is not a positive multiple of `vae_scale_factor`.
        """
        factor, sides = self.vae_scale_factor, []
        for name, value in {"H": height, "W": width}.items():
            sides.append(check_size(name, self.default_size if value is None else value, factor) // factor)
        return (self.unet.config.in_channels, *sides)

    def expanded(self, prompt: str) -> str:
        """The prompt with a word for each vector of its textual inversions: "<cat>" as "<cat> <cat>_1 <cat>_2"."""
        return TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)

    def encode_prompts(self, prompts: list[str], *, clip_skip: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Context (B, L, E) and pooled state (B, P) of prompts; longer ones are cut at the encoder's L tokens.

        Equal prompts are encoded once. Without gradients, unless the text encoder is in training mode.

        Args:
            clip_skip: layers of the text encoder that the context leaves out, from the last; the pooled state has all.

        Raises:
            ValueError: a `clip_skip` that the text encoder has not.
        """
        num_layers = self.text_encoder.config.num_hidden_layers
        if clip_skip is not None and not 0 <= clip_skip <= num_layers:
            raise ValueError(f"clip_skip is {clip_skip}; the text encoder has {num_layers} layers")
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            [self.expanded(prompt) for prompt in distinct],
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self.device)
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
        rows = [distinct.index(prompt) for prompt in prompts]
        return context[rows], output.pooler_output[rows]

    def condition(
        self, prompts: list[str], *, size: tuple[int, int] | None = None, negative: bool = False
    ) -> Conditioning:
        """The conditioning of prompts, for pictures of a size in pixels, by default the model's own.

        Args:
            negative: whether they are what guidance leads away from; some models have zeros for an empty one.
        """
        return Conditioning(*self.encode_prompts(prompts))

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled text that ITM compares with."""
        return self.text_encoder.config.hidden_size

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """Every network by its name in a pipeline, the U-Net last."""
        return {"text_encoder": self.text_encoder, "vae": self.vae, "unet": self.unet}

    def truncated_part(self, prompt: str) -> str:
        """The end of an `expanded` prompt that the text encoder does not read; "" when it reads all."""
        prompt = self.expanded(prompt)
        tokens = self.tokenizer(
            prompt, truncation=True, max_length=self.tokenizer.model_max_length, return_offsets_mapping=True
        )
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
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) float32 in [0, 1] of scaled latents (B, C, h, w)."""
        if len(latents) > VAE_SLICING_ABOVE:
            self.vae.enable_slicing()
        latents = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def noise_target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the U-Net is trained to predict: the noise, or the velocity, as its scheduler's config says."""
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"prediction_type is {prediction_type!r}; it must be epsilon or v_prediction")


def load_stable_diffusion(
    model: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    notice=print,
) -> StableDiffusion:
    """Loads a base model by name (`MODELS`), local folder or hub id.

    A named model is taken from `ckpt/<name>` where that folder exists. The scheduler becomes DDIM, settings kept.

    Args:
        variant: of the files of weights, such as fp16; by default, of a local folder, whichever is there.

    Raises:
        ValueError: nothing usable there; the message says what to do.
    """
    source = _source(model, notice)
    if revision is not None and Path(source).is_dir():
        raise ValueError(f"revision is {revision!r}; {source} is a local folder, which has none")
    if Path(source).is_dir():
        variant = _checked_variant(model, Path(source), variant, notice)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # what fails is said by the error below
    try:
        with _quiet_fallback(), without_marks(source) as files:
            pipeline = StableDiffusionPipeline.from_pretrained(
                files,
                revision=revision,
                variant=variant,
                local_files_only=local_files_only,
                dtype=dtype,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
        config = pipeline.scheduler.config
        # A config without clip_sample means none; DDIM's own default would clip the latents.
        scheduler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    except Exception as error:
        if isinstance(error, LOADING_ERRORS) or type(error) is Exception:  # as the tokenizers library raises it
            raise ValueError(_missing(model, source, error)) from error
        raise
    check_kind(f"model {model!r}", pipeline.unet.config, pipeline.vae.config)
    for part in ("text_encoder", "vae", "unet"):
        if lacking := [name for name, value in getattr(pipeline, part).named_parameters() if value.is_meta]:
            raise ValueError(_missing(model, source, ValueError(f"{part}: its weights lack {lacking[0]}")))
    vocabulary = pipeline.text_encoder.config.vocab_size
    if len(pipeline.tokenizer) != vocabulary:  # transformers makes an empty tokenizer where its files are missing
        reason = f"its tokenizer has {len(pipeline.tokenizer)} tokens, its text encoder {vocabulary}"
        raise ValueError(_missing(model, source, ValueError(reason)))
    positions = pipeline.text_encoder.config.max_position_embeddings  # without its config, a tokenizer's length is 1e30
    pipeline.tokenizer.model_max_length = min(pipeline.tokenizer.model_max_length, positions)
    parts = {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae, "unet": pipeline.unet}
    for module in parts.values():
        module.to(device).eval().requires_grad_(False)
    return StableDiffusion(name=model, source=str(source), tokenizer=pipeline.tokenizer, scheduler=scheduler, **parts)


def _checked_variant(model: str, folder: Path, variant: str | None, notice) -> str | None:
    """The variant of a local folder's weights, after a look at all that is there. Raises ValueError."""
    try:
        check_folder(folder)
        if variant is None and (variant := choose_variant(folder)):
            notice(f"{model} has weights of the variant {variant} alone: they are taken")
        check_weights(folder, variant)
    except ValueError as error:
        raise ValueError(f"model {model!r}: {error}") from error
    return variant


@contextlib.contextmanager
def _quiet_fallback():
    """Keeps diffusers from calling it an error that a folder holds .bin files and no safetensors, and transformers from
    printing tables of what fails.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("An error occurred while trying to fetch")

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(keep)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        logger.removeFilter(keep)
        transformers.utils.logging.set_verbosity(verbosity)


def architecture(model: str) -> tuple[FrozenDict, int, int]:
    """The U-Net's config, the text encoder's width, and about the other parts' parameters; reads no weights.

    Raises:
        ValueError: neither a local folder nor a model whose architecture is known, or a folder that is not complete.
    """
    source = _source(model, lambda _: None)
    folder = Path(source)
    if folder.is_dir():
        try:
            check_folder(folder)
            unet = read_json(folder / "unet/config.json", dict)
            width = read_json(folder / "text_encoder/config.json", TextConfig).hidden_size
            variant = choose_variant(folder) or ""
            files = [file for part in ("text_encoder", "vae") for file in weight_files(folder / part).get(variant, [])]
            parameters = sum(math.prod(shape) for file in files for shape in read_shapes(file).values())
            return _whole_config(unet), width, parameters
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"model {model!r}: {folder} is not a complete Stable Diffusion folder ({reason})"
            ) from error
    known = next((name for name, known in MODELS.items() if source in (name, known)), None)
    if known is None:
        raise ValueError(f"model {model!r}: its architecture is not known before it is downloaded")
    config = ARCHITECTURES[known]
    return _whole_config(config), config["cross_attention_dim"], OTHER_PARAMETERS[known]


def _whole_config(given: dict) -> FrozenDict:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(given).config


def weights_fingerprint(*modules: torch.nn.Module) -> str:
    """16 hex digits that tell models apart: a hash of every tensor's name, shape and first 16 values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            values = tensor.flatten()[:16].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values)
    return digest.hexdigest()[:16]


def usable_device(name: str) -> torch.device:
    """The device that --device names. Raises ValueError where this machine has none of that name that keeps values."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def advice_against_nan(sd: StableDiffusion) -> str:
    """What to try where latents or scores are not finite."""
    config = sd.scheduler.config
    if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
        return (
            "its scheduler begins at pure noise (rescale_betas_zero_snr), where a prediction_type of epsilon says "
            "nothing: set it to v_prediction, or rescale_betas_zero_snr to false, in scheduler_config.json"
        )
    return ("" if sd.dtype == torch.float32 else "draw in float32 (--dtype float32), or ") + "draw at a lower --scale"


def _source(model: str, notice) -> str:
    """The folder or hub id of a model. Raises ValueError for a single file."""
    if Path(model).is_file():
        raise ValueError(
            f"model {model!r} is a single file; make it a folder once, as docs/drawing.md shows, and pass --model "
            "FOLDER: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if model in MODELS and (MODELS[model] is None or (CKPT_FOLDER / model).is_dir()):
        return str(CKPT_FOLDER / model)
    model = MODELS.get(model) or model
    if model in MIRRORS and not Path(model).exists():
        notice(f"{model} is no longer on the hub; using its mirror {MIRRORS[model]}")
        model = MIRRORS[model]
    return model


def _broken_part(folder: Path) -> str:
    """The first component of a folder whose config is of no model, or not of its weights'; "" where none is found."""
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        try:
            with torch.device("meta"):
                expected = kind.from_config(read_json(folder / part / "config.json", dict)).state_dict()
        except LOADING_ERRORS:
            return f"{part}/config.json: "
        for file in weight_files(folder / part).get("", []):
            shapes = read_shapes(file)
            if any(list(tensor.shape) != shapes.get(name, list(tensor.shape)) for name, tensor in expected.items()):
                return f"{part}: "
    return ""


def _missing(model: str, source: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    if model == "shapes":
        return (
            f"the embedded model is missing: {source} should be part of the repository; restore it with git ({reason})"
        )
    mirrors = ", ".join(sorted(set(MIRRORS.values())))
    advice = f"(SD 2.1 is mirrored as {mirrors}), or draw without any weights: --model shapes"
    if Path(source).is_dir():
        reason = _broken_part(Path(source)) + reason
        return (
            f"model {model!r}: {source} is not a complete Stable Diffusion folder ({reason}); fetch what is missing "
            + advice
        )
    close = difflib.get_close_matches(model, MODELS, n=1)
    if close and model not in MODELS:
        return f"model {model!r} is neither a name, a local folder nor on the hub ({reason}); did you mean {close[0]}?"
    folder = CKPT_FOLDER / model if model in MODELS else "a local folder"
    return (
        f"model {model!r} cannot be loaded from {source} ({reason}). Download it (SD 2.1 is mirrored as {mirrors}), "
        f"put its files into {folder}, pass --model FOLDER, or draw without any weights: --model shapes"
    )
