"""Blocks, widths and numbers of weights of a base model, known before its weights are read.

Imports no diffusers. For named models that are not on this machine the numbers stand here;
`tests/test_full_size.py` compares them with the real classes.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dpt.backbones.blocks import block_names, block_prefix
from dpt.backbones.model_folder import (
    LOADING_ERRORS,
    STEMS,
    TextConfig,
    check_folder,
    choose_variant,
    read_pipeline,
    weight_files,
)
from dpt.base_models import CKPT_FOLDER, FLUX, MODELS, SD_3, SD_XL, TRANSFORMERS, source_of
from dpt.files import read_json
from dpt.weights import read_shapes

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""of the text's tokens, in transformers"""


class Config(dict):
    """A denoiser's config, its keys as attributes too."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass(frozen=True)
class Architecture:
    """The sizes of a base model."""

    config: Config
    """of the denoiser, as far as it differs from its class's defaults or is read by `dpt.backbones.blocks`"""
    pooled_width: int
    """of the pooled text that ITM compares with"""
    weights: int
    """of the denoiser"""
    other_weights: int
    """about: text encoders and autoencoder"""
    lora_widths: dict[str, int]
    """by block, inputs and outputs of all attention projections: a LoRA of rank r has r times as many weights"""


DOWN, UP = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
UNET = {
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": DOWN,
    "up_block_types": UP,
}
TRANSFORMER_3 = {
    "in_channels": 16,
    "num_layers": 18,
    "num_attention_heads": 18,
    "attention_head_dim": 64,
    "patch_size": 2,
    "sample_size": 128,
    "pooled_projection_dim": 2048,
}
TRANSFORMER_FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "pooled_projection_dim": 768,
}
"""defaults of diffusers' classes, as far as they are read"""

_SD2 = {
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SD1 = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
CONFIGS = {
    "sd21-base": _SD2,
    "sd21": _SD2 | {"sample_size": 96},
    "sd14": _SD1,
    "sd15": _SD1,
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sd3-medium": _SD3 | {"pos_embed_max_size": 192},
    "sd35-medium": _SD3 | {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"},
    "flux-dev": {"guidance_embeds": True},
    "flux-schnell": {},
}
"""The config keys in which the denoisers of named models differ from the defaults of their class."""

_SD2_LORA = {"down0": 13056, "down1": 22016, "down2": 39936, "mid": 19968, "up1": 59904, "up2": 33024, "up3": 19584}
_SD1_LORA = {"down0": 12032, "down1": 20992, "down2": 38912, "mid": 19456, "up1": 58368, "up2": 31488, "up3": 18048}
_XL_LORA = {"down1": 52224, "down2": 440320, "mid": 220160, "up0": 660480, "up1": 78336}
_FLUX_LORA = {f"block{i}": 49152 for i in range(19)} | {f"single{i}": 18432 for i in range(38)}
_NUMBERS = {
    "sd21-base": (1024, 865_910_724, 424_000_000, _SD2_LORA),
    "sd21": (1024, 865_910_724, 424_000_000, _SD2_LORA),
    "sd14": (768, 859_520_964, 207_000_000, _SD1_LORA),
    "sd15": (768, 859_520_964, 207_000_000, _SD1_LORA),
    "sdxl": (1280, 2_567_463_684, 902_000_000, _XL_LORA),
    "sd3-medium": (2048, 2_084_951_104, 5_664_000_000, {f"block{i}": 24576 - 3072 * (i == 23) for i in range(24)}),
    "sd35-medium": (
        2048,
        2_469_663_936,
        5_664_000_000,
        {f"block{i}": 24576 + 12288 * (i < 13) - 3072 * (i == 23) for i in range(24)},
    ),
    "flux-dev": (768, 11_901_408_320, 4_969_000_000, _FLUX_LORA),
    "flux-schnell": (768, 11_891_178_560, 4_969_000_000, _FLUX_LORA),
}
"""pooled width, weights of the denoiser and of the others (T5 among them), LoRA's widths"""
T5_WEIGHTS = 4_762_000_000  # about: T5-XXL's encoder


def architecture(model: str, *, no_t5: bool = False) -> Architecture:
    """The architecture of a model by name, folder, single file or hub id. Reads no weights of safetensors files.

    Args:
        no_t5: leave out the T5 of Stable Diffusion 3.

    Raises:
        ValueError: neither on this machine nor a model that has a name, or a folder that is not complete.
    """
    source = source_of(model)
    if Path(source).is_file():
        from dpt.backbones.single_file import configs_of, named_alike  # imports diffusers

        source = configs_of(named_alike(Path(source)))
    if Path(source).is_dir():
        try:
            return _of_folder(Path(source), no_t5)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"model {model!r}: {source} is not a complete Stable Diffusion folder ({reason})"
            ) from error
    known = next((name for name, known in MODELS.items() if source in (name, known.source)), None)
    if known not in CONFIGS:
        raise ValueError(f"model {model!r}: its architecture is not known before it is downloaded")
    defaults = {SD_3: TRANSFORMER_3, FLUX: TRANSFORMER_FLUX}.get(MODELS[known].pipeline, UNET)
    width, weights, others, lora = _NUMBERS[known]
    return Architecture(Config(defaults | CONFIGS[known]), width, weights, others - T5_WEIGHTS * no_t5, lora)


def _of_folder(folder: Path, no_t5: bool) -> Architecture:
    check_folder(folder)
    pipeline = read_pipeline(folder)
    part, defaults = "unet", UNET
    if pipeline in TRANSFORMERS:
        part, defaults = "transformer", TRANSFORMER_FLUX if pipeline == FLUX else TRANSFORMER_3
    config = Config(defaults | read_json(folder / part / "config.json", dict))
    if part == "transformer":
        width = config.pooled_projection_dim
    elif pipeline == SD_XL:
        width = read_json(folder / "text_encoder_2/config.json", TextConfig).projection_dim
    else:
        width = read_json(folder / "text_encoder/config.json", TextConfig).hidden_size
    variant = choose_variant(folder) or ""
    files = {name: weight_files(folder / name).get(variant, []) for name in STEMS}
    left_out = {part, "text_encoder_3"} if no_t5 else {part}
    others = [file for name in STEMS if name not in left_out for file in files[name]]
    if folder == CKPT_FOLDER / "shapes":
        shapes = {name: shape for file in files[part] for name, shape in read_shapes(file).items()}
    else:  # somebody's: what cannot be built is told
        shapes = _shapes_of(config)
    ends = tuple(f"{name}.weight" for name in (*PROJECTIONS, *TEXT_PROJECTIONS))
    widths = {
        block: sum(sum(shape) for name, shape in shapes.items() if name.startswith(prefix) and name.endswith(ends))
        for block, prefix in ((block, block_prefix(block)) for block in block_names(config))
    }
    other_weights = sum(math.prod(shape) for file in others for shape in read_shapes(file).values())
    weights = sum(math.prod(shape) for shape in shapes.values())
    return Architecture(config, width, weights, other_weights, {block: n for block, n in widths.items() if n})


def _shapes_of(config: Config) -> dict[str, list[int]]:
    """Shapes of the tensors of a denoiser of that config."""
    from dpt.backbones.features import denoiser_class  # imports diffusers

    with torch.device("meta"):
        network = denoiser_class(config).from_config(dict(config))
    return {name: list(value.shape) for name, value in network.state_dict().items()}
