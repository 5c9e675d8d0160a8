"""Loads base models from local folders, single files and the hub."""

import contextlib
import logging
import textwrap
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import model_info
from transformers import CLIPTextConfig

from dpt.backbones.flow import FlowScheduler, FluxScheduler
from dpt.backbones.flux import Flux
from dpt.backbones.model_folder import (
    LOADING_ERRORS,
    check_folder,
    check_kind,
    check_weights,
    choose_variant,
    read_pipeline,
    weight_files,
    without_marks,
)
from dpt.backbones.sd3 import StableDiffusion3
from dpt.backbones.sdxl import StableDiffusionXL
from dpt.backbones.single_file import configs_of, load_single_file, named_alike
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import (
    CKPT_FOLDER,
    DEFAULT_MODEL,
    FLUX,
    MIRRORS,
    MODELS,
    SD_3,
    SD_XL,
    TRANSFORMERS,
    check_no_t5,
    check_versions,
    pipeline_of,
    source_of,
)
from dpt.files import read_json
from dpt.weights import read_shapes


def load_stable_diffusion(
    model: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    variant: str | None = None,
    no_t5: bool = False,
    local_files_only: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    notice=print,
) -> StableDiffusion:
    """Loads a base model by name (`MODELS`), local folder, single file or hub id.

    A named model is taken from `ckpt/<name>` where that folder exists. The scheduler becomes DDIM, settings kept.

    Args:
        variant: of the weights' files, such as fp16; by default the one that a local folder has.
        no_t5: leave out the T5 of Stable Diffusion 3.

    Raises:
        ValueError: nothing usable there; the message says the remedy.
    """
    source = source_of(model, notice)
    check_versions(model, revision=revision, variant=variant)
    if no_t5:
        check_no_t5(model)
    if Path(source).is_dir():
        variant = _checked_variant(model, Path(source), variant, notice)
    where = {"revision": revision, "local_files_only": local_files_only}
    try:
        with _quiet(), without_marks(source) as files:
            if Path(source).is_file():
                pipeline, kind = _of_single_file(model, Path(source), where, dtype=dtype, notice=notice)
            else:
                kind = read_pipeline(Path(source)) if Path(source).is_dir() else _hub_pipeline(source, **where)
                pipeline = _stock_pipeline(Path(source), files, kind, no_t5, variant=variant, dtype=dtype, **where)
        scheduler = _scheduler(pipeline.scheduler.config, kind)
    except Exception as error:
        if (
            isinstance(error, (*LOADING_ERRORS, SingleFileComponentError)) or type(error) is Exception
        ):  # as the tokenizers library raises it
            raise ValueError(_missing(model, source, error)) from error
        raise
    if kind not in TRANSFORMERS:
        check_kind(f"model {model!r}", pipeline.unet.config, pipeline.vae.config, is_xl=kind == SD_XL)
    if lacking := _lacking(pipeline):
        raise ValueError(_missing(model, source, ValueError(lacking)))
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(device).eval().requires_grad_(False)
    if dtype == torch.float16 and kind == SD_XL and pipeline.vae.config.force_upcast:
        pipeline.vae.float()  # its activations are beyond float16; madebyollin/sdxl-vae-fp16-fix has none such
    common = {"name": model, "source": source, "scheduler": scheduler}
    return _of_pipeline(pipeline, kind, common)


def _of_single_file(model: str, file: Path, where: dict, *, dtype: torch.dtype, notice) -> tuple:
    """The pipeline of a single file, and the class that the named model names which it is taken for."""
    alike = named_alike(file)
    configs = configs_of(alike)
    notice(f"{model} is taken for a model like {alike}; its configs are those of {configs}")
    if not Path(configs).is_dir():
        _hub_pipeline(configs, **where)  # says at once where they cannot be had
    kind = MODELS[alike].pipeline
    options = {"dtype": dtype, "local_files_only": where["local_files_only"]}
    return load_single_file(file, configs, is_xl=kind == SD_XL, **options), kind


def _scheduler(config, kind: str | None):
    """DDIM, or flow matching's own Euler, with a folder's settings."""
    if kind in TRANSFORMERS:
        return (FluxScheduler if kind == FLUX else FlowScheduler).from_config(config)
    # A config without clip_sample means none; DDIM's own default would clip the latents.
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))


def _of_pipeline(pipeline: DiffusionPipeline, kind: str | None, common: dict) -> StableDiffusion:
    """The model of a loaded pipeline, by its family."""
    common |= {"tokenizer": pipeline.tokenizer, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    if kind in TRANSFORMERS:
        return (Flux if kind == FLUX else StableDiffusion3)(**common, denoiser=pipeline.transformer, pipeline=pipeline)
    common["denoiser"] = pipeline.unet
    if kind != SD_XL:
        return StableDiffusion(**common)
    second = {"tokenizer_2": pipeline.tokenizer_2, "text_encoder_2": pipeline.text_encoder_2}
    return StableDiffusionXL(**common, **second, zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt)


def _hub_pipeline(source: str, *, revision: str | None, local_files_only: bool) -> str | None:
    """The class that a hub id's `model_index.json` names, of the cache where it is there.

    Raises:
        OSError: it cannot be had; without a network at once.
    """
    with contextlib.suppress(OSError):
        return DiffusionPipeline.load_config(source, revision=revision, local_files_only=True).get("_class_name")
    if not local_files_only:
        try:
            model_info(source, revision=revision)  # where reading a file would try again for half a minute
        except Exception as error:  # of the hub's or of the network's library
            raise OSError(f"{source}: {' '.join(str(error).split())}") from error
    index = DiffusionPipeline.load_config(source, revision=revision, local_files_only=local_files_only)
    return index.get("_class_name")


def _stock_pipeline(source: Path, files, kind: str | None, no_t5: bool, **options) -> DiffusionPipeline:
    """The pipeline of diffusers of that class; Stable Diffusion 1's and 2's where it is another."""
    options |= {"feature_extractor": None, "image_encoder": None}
    if kind == FLUX:
        return FluxPipeline.from_pretrained(files, **options)
    if kind == SD_3:
        if no_t5 or (source.is_dir() and not (source / "text_encoder_3").is_dir()):
            options |= {"text_encoder_3": None, "tokenizer_3": None}
        return StableDiffusion3Pipeline.from_pretrained(files, **options)
    if kind == SD_XL:
        return StableDiffusionXLPipeline.from_pretrained(files, add_watermarker=False, **options)
    options |= {"safety_checker": None, "requires_safety_checker": False}
    return StableDiffusionPipeline.from_pretrained(files, **options)


def _lacking(pipeline: DiffusionPipeline) -> str:
    """In words, what the parts of a loaded pipeline lack; "" for nothing. Gives tokenizers their length."""
    networks = {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    for part, module in networks.items():
        if lacking := [name for name, value in module.named_parameters() if value.is_meta]:
            return f"{part}: its weights lack {lacking[0]}"
    for number in ("", "_2", "_3"):
        tokenizer = pipeline.components.get(f"tokenizer{number}")
        if tokenizer is None:
            continue
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one where its files are missing
            return f"its tokenizer{number} has no words"
        config = pipeline.components[f"text_encoder{number}"].config
        if not isinstance(config, CLIPTextConfig):  # T5 has words that no text needs
            continue
        if len(tokenizer) != config.vocab_size:
            return f"its tokenizer{number} has {len(tokenizer)} tokens, its text encoder{number} {config.vocab_size}"
        # without its config, a tokenizer's length is 1e30
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return ""


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
def _quiet():
    """Keeps diffusers and transformers from progress bars and tables of what fails, which the error says, and diffusers
    from calling it an error that a folder holds .bin files and no safetensors.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("An error occurred while trying to fetch")

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(keep)
    logs = diffusers.utils.logging, transformers.utils.logging
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        logger.removeFilter(keep)
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)


def _broken_part(folder: Path) -> str:
    """The first component of a folder whose config is of no model, or not of its weights'; "" where none is found."""
    others = {SD_3: ("transformer", SD3Transformer2DModel), FLUX: ("transformer", FluxTransformer2DModel)}
    denoiser = others.get(read_pipeline(folder), ("unet", UNet2DConditionModel))
    for part, kind in (denoiser, ("vae", AutoencoderKL)):
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
    reason = textwrap.shorten(str(error), 240, placeholder=" ...")
    if model == "shapes":
        return (
            f"the embedded model is missing: {source} should be part of the repository; restore it with git ({reason})"
        )
    mirrors = ", ".join(sorted({mirror for old, mirror in MIRRORS.items() if "stable-diffusion-2" in old}))
    of_sd2 = "" if pipeline_of(model) in (SD_XL, *TRANSFORMERS) else f" (SD 2.1 is mirrored as {mirrors})"
    others = f"{of_sd2}, or draw without any weights: --model shapes"
    if Path(source).is_dir():
        reason = f"{_broken_part(Path(source))}{reason}); fetch what is missing{others}"
        return f"model {model!r}: {source} is not a complete Stable Diffusion folder ({reason}"
    if Path(source).is_file():
        name = named_alike(Path(source))
        if Path(configs_of(name)).is_dir():
            return f"model {model!r} is not a complete model like {name} ({reason})"
        return (
            f"model {model!r}: its weights need the configs of {name}, which cannot be had ({reason}); put those of "
            f"{MODELS[name].source} without the weights into {CKPT_FOLDER / name}, or go online once"
        )
    if source.startswith(("stabilityai/stable-diffusion-3", "black-forest-labs/FLUX.1-dev")):
        reason += f"; it needs its licence accepted at https://huggingface.co/{source} and `hf auth login`"
    folder = CKPT_FOLDER / model if model in MODELS else "a local folder"
    return (
        f"model {model!r} cannot be loaded from {source} ({reason}). Download it, put its files into {folder}, pass "
        f"--model FOLDER{others}"
    )
