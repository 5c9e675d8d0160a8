"""Checks of base models' folders: configs and heads of weights' files, before anything is built or loaded."""

import codecs
import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from msgspec import Meta, Struct, field

from dpt.base_models import FLUX, SD_3, SD_XL
from dpt.files import read_bytes, read_json, write_bytes
from dpt.weights import read_shapes

Size = Annotated[int, Meta(ge=1, le=65_536)]
Few = Annotated[int, Meta(ge=1, le=128)]
Factor = Annotated[float, Meta(gt=0, le=1000)]
Share = Annotated[float, Meta(gt=0, lt=1)]
Blocks = Annotated[list[str], Meta(min_length=1, max_length=16)]
Widths = Annotated[list[Size], Meta(min_length=1, max_length=16)]

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CLASSES_XL = CLASSES | {"text_encoder_2": "CLIPTextModelWithProjection"}
CLASSES_SD3 = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"} | {
    part: "CLIPTextModelWithProjection" for part in ("text_encoder", "text_encoder_2")
}
CLASSES_FLUX = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
}
FAMILIES = {
    SD_XL: ("Stable Diffusion XL", CLASSES_XL),
    SD_3: ("Stable Diffusion 3", CLASSES_SD3),
    FLUX: ("FLUX", CLASSES_FLUX),
}
"""kind of a `model_index.json` -> its name, and the classes of its parts; others are Stable Diffusion 1 and 2"""
STEMS = {part: ("diffusion_pytorch_model",) * 2 for part in ("unet", "transformer", "vae")}
STEMS |= {f"text_encoder{number}": ("model", "pytorch_model") for number in ("", "_2", "_3")}
"""how the names of weights begin, as safetensors and as .bin"""
LOADING_ERRORS = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, StrictDataclassError)
"""Errors of diffusers and transformers at a folder whose files do not fit each other."""
SUPPORTED = "supported is Stable Diffusion 1, 2 or XL that draws from text alone, Stable Diffusion 3, and FLUX.1"


class UNetConfig(Struct):
    block_out_channels: Widths
    sample_size: Size
    cross_attention_dim: Size | Widths
    down_block_types: Blocks = field(default_factory=lambda: ["CrossAttnDownBlock2D"])
    up_block_types: Blocks = field(default_factory=lambda: ["CrossAttnUpBlock2D"])
    mid_block_type: str | None = None
    in_channels: Size = 4
    out_channels: Size = 4
    layers_per_block: Few | list[Few] = 2
    transformer_layers_per_block: Few | list[Few | list[Few]] = 1
    attention_head_dim: Size | list[Size] = 8
    num_attention_heads: Size | list[Size] | None = None
    norm_num_groups: Size | None = 32
    norm_eps: Factor = 1e-5
    act_fn: str = "silu"
    mid_block_scale_factor: Factor = 1
    resnet_out_scale_factor: Factor = 1
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    center_input_sample: bool = False
    upcast_attention: bool = False
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    class_embed_type: str | None = None
    num_class_embeds: int | None = None


class VaeConfig(Struct):
    block_out_channels: Widths
    latent_channels: Size = 4
    in_channels: Size = 3
    out_channels: Size = 3
    layers_per_block: Few = 1
    norm_num_groups: Size = 32
    scaling_factor: Factor = 0.18215


class TextConfig(Struct):
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Few
    num_attention_heads: Size
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)]
    max_position_embeddings: Size = 77
    projection_dim: Size = 512
    eos_token_id: Annotated[int, Meta(ge=0)] = 49_407


class SchedulerConfig(Struct):
    num_train_timesteps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    beta_start: Share = 0.0001
    beta_end: Share = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[Share] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: Annotated[int, Meta(ge=0, le=1000)] = 0
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False


class TokenizerConfig(Struct):
    model_max_length: Annotated[float, Meta(ge=1)] | None = None


CONFIGS = {
    "unet/config.json": UNetConfig,
    "vae/config.json": VaeConfig,
    "text_encoder/config.json": TextConfig,
    "text_encoder_2/config.json": TextConfig,
    "scheduler/scheduler_config.json": SchedulerConfig,
    "tokenizer/tokenizer_config.json": TokenizerConfig,
    "tokenizer_2/tokenizer_config.json": TokenizerConfig,
}


def read_index(folder: Path) -> dict[str, object]:
    """A folder's `model_index.json`; empty where there is none. Raises ValueError where it names no class as text."""
    path = folder / "model_index.json"
    index = read_json(path, dict[str, object]) if path.exists() else {}
    if not isinstance(kind := index.get("_class_name"), str | None):
        raise ValueError(f"{path}: _class_name is {kind!r}; it must be the name of a pipeline of diffusers")
    return index


def read_pipeline(folder: Path) -> str | None:
    """The pipeline of diffusers that a folder's `model_index.json` names; None where it names none."""
    return read_index(folder).get("_class_name")


def _configs(folder: Path) -> dict:
    """The configs of a folder that are there, read; T5's is left to transformers."""
    t5 = "text_encoder_2/config.json" if read_pipeline(folder) == FLUX else None
    return {
        part: read_json(folder / part, kind)
        for part, kind in CONFIGS.items()
        if (folder / part).exists() and part != t5
    }


def check_folder(folder: Path) -> None:
    """Looks through the configs that are there.

    Raises:
        ValueError: another kind of model, or a value that cannot be; file and field are named.
    """
    index = read_index(folder)
    kind = index.get("_class_name")
    if index:
        family, wanted_parts = FAMILIES.get(kind, ("", CLASSES))
        if kind is not None and not family and ("unet" not in index or "text_encoder_2" in index):
            raise ValueError(f"{folder} is of {kind}; {SUPPORTED}")
        if kind == SD_XL and index.get("text_encoder", [None]) == [None, None]:
            raise ValueError(f"{folder} is Stable Diffusion XL's refiner, which has no text_encoder; {SUPPORTED}")
        for part, wanted in wanted_parts.items():
            if family and not (folder / part).is_dir():
                raise ValueError(f"{folder} lacks the folder {part} of {family}")
            if part in index and index[part] not in (["diffusers", wanted], ["transformers", wanted]):
                raise ValueError(f"{folder}: its {part} is {str(index[part])[:60]}, not {wanted}; {SUPPORTED}")
        scheduler = index.get("scheduler", ["diffusers"])
        if not isinstance(scheduler, list) or scheduler[:1] != ["diffusers"]:
            raise ValueError(f"{folder}: its scheduler is {str(scheduler)[:60]}, none of diffusers'")
    configs = _configs(folder)
    unet, vae, text, text_2 = (configs.get(f"{part}/config.json") for part in CLASSES_XL)
    if unet is not None:
        check_kind(folder, unet, vae or VaeConfig(block_out_channels=[1]), is_xl=kind == SD_XL)
        widths = [unet.cross_attention_dim] if isinstance(unet.cross_attention_dim, int) else unet.cross_attention_dim
        sizes = [encoder.hidden_size for encoder in (text, text_2) if encoder is not None]
        if text is not None and {*widths} != {sum(sizes)}:
            raise ValueError(
                f"{folder}: unet/config.json has the cross_attention_dim {unet.cross_attention_dim}, "
                f"text_encoder/config.json the hidden_size {' + '.join(map(str, sizes))}; they must agree"
            )


def check_kind(name: object, unet, vae, *, is_xl: bool) -> None:
    """Raises ValueError where configs are of a U-Net that takes more than latents, a timestep and a text.

    Args:
        is_xl: of a folder of Stable Diffusion XL, whose U-Net takes the pooled text and the picture's size too.
    """
    if unet.in_channels != vae.latent_channels:
        kind = {9: "inpainting", 5: "depth-to-image", 8: "image editing", 7: "upscaling"}.get(unet.in_channels, "other")
        raise ValueError(
            f"{name} is a model for {kind} use: its U-Net takes {unet.in_channels} channels, its latents have "
            f"{vae.latent_channels}; {SUPPORTED}"
        )
    for setting in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        if (value := getattr(unet, setting)) is not None and not (is_xl and value == "text_time"):
            raise ValueError(f"{name}: its U-Net has the {setting} {value}, as Stable Diffusion XL has; {SUPPORTED}")


def check_weights(folder: Path, variant: str | None) -> None:
    """Looks through the heads of the files of weights that would be loaded.

    Raises:
        ValueError: a file that is cut off, a git-lfs pointer, or that lacks tensors of the text encoder.
    """
    for part in STEMS:
        files, shapes = weight_files(folder / part), {}
        for file in files.get(variant or "", files.get("", [])):
            shapes |= read_shapes(file)
        if not part.startswith("text_encoder") or not shapes:  # diffusers compares the others'
            continue
        is_t5 = part == "text_encoder_3" or (part == "text_encoder_2" and read_pipeline(folder) == FLUX)
        _check_text_encoder(folder / part, shapes, is_t5=is_t5)  # transformers makes up what is missing


def _check_text_encoder(folder: Path, shapes: dict[str, list[int]], *, is_t5: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if not is_t5:
        read_json(folder / "config.json", TextConfig)
    try:
        given = read_json(folder / "config.json", dict)
        config = T5Config.from_dict(given) if is_t5 else CLIPTextConfig.from_dict(given)
        with_projection = CLIPTextModelWithProjection if folder.name == "text_encoder_2" else CLIPTextModel
        kind = T5EncoderModel if is_t5 else with_projection
        with torch.device("meta"):
            expected = kind(config).state_dict()
        if is_t5:  # the same words under two names, of which a file has one
            expected.pop("encoder.embed_tokens.weight", None)
            shapes = {"shared.weight": shapes.get("encoder.embed_tokens.weight")} | shapes
    except LOADING_ERRORS as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    found = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    for name, tensor in expected.items():
        if found.get(name.removeprefix("text_model.")) != list(tensor.shape):
            has = found.get(name.removeprefix("text_model."), "no")
            raise ValueError(f"{folder}: its weights have {has} {name}, its config.json {list(tensor.shape)}")


def weight_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a component's weights by variant, "" for those without one; safetensors where there are any."""
    found: dict[str, list[Path]] = {}
    for stem, ending in zip(STEMS[folder.name], (".safetensors", ".bin"), strict=True):
        fresh: dict[str, list[Path]] = {}
        for file in sorted(folder.glob(f"{stem}*{ending}")):
            middle = re.sub(r"-\d+-of-\d+", "", file.name.removeprefix(stem).removesuffix(ending))
            if not middle or middle.startswith("."):
                fresh.setdefault(middle.removeprefix("."), []).append(file)
        found = fresh | found
    return found


def choose_variant(folder: Path) -> str | None:
    """The variant, such as fp16, of a folder where a component's weights without one are missing; else None."""
    for part in STEMS:
        files = weight_files(folder / part)
        if files and "" not in files:
            return "fp16" if "fp16" in files else next(iter(files))
    return None


@contextlib.contextmanager
def without_marks(source: str):
    """A hub id or folder as it is; a folder whose JSON files begin with byte-order marks, which diffusers cannot read,
    as one of links to its files and of those without marks."""
    marked = {path for path in Path(source).rglob("*.json") if path.is_file() and _has_mark(path)}
    if not marked:
        yield source
        return

    def link(source, target):
        if Path(source) in marked:
            write_bytes(target, read_bytes(source))
        else:
            os.symlink(Path(source).resolve(), target)

    with tempfile.TemporaryDirectory() as links:
        yield Path(shutil.copytree(source, links, copy_function=link, dirs_exist_ok=True))


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8
