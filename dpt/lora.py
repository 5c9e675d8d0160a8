"""LoRA on the denoiser's attention, through PEFT; tensors travel in diffusers' names (`<module>.lora_{A,B}.weight`)."""

import contextlib
import logging
import re
import warnings
from pathlib import Path

import torch
from diffusers import (
    FluxPipeline,
    ModelMixin,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextModel, T5EncoderModel

from dpt.backbones.architecture import PROJECTIONS, TEXT_PROJECTIONS
from dpt.backbones.blocks import LATENTS, block_prefix, parse_feature
from dpt.backbones.flux import Flux
from dpt.backbones.model_folder import LOADING_ERRORS
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.checkpoint.lora_files import PARTS, read_lora

ADAPTER_NAME = "dpt"
_RELEASED = re.compile(r"unet\.(?P<attention>.+)\.processor\.to_(?P<name>q|k|v|out)_lora\.(?P<part>down|up)\.weight")


def lora_key(released_key: str) -> str | None:
    """diffusers' name of a tensor of the old attention-processor layout; None for any other name."""
    match = _RELEASED.fullmatch(released_key)
    if not match:
        return None
    module = "to_out.0" if match["name"] == "out" else f"to_{match['name']}"
    return f"{match['attention']}.{module}.lora_{'A' if match['part'] == 'down' else 'B'}.weight"


def lora_metadata(state: dict[str, torch.Tensor], alpha: float) -> dict:
    """PEFT settings of LoRA tensors of one rank, as diffusers keeps them beside the tensors."""
    rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    return {"r": rank, "lora_alpha": alpha, "target_modules": sorted({key.rsplit(".lora_", 1)[0] for key in state})}


def check_lora(denoiser: ModelMixin, state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where a LoRA, in diffusers' names, is for a module or width that the denoiser does not have."""
    modules = dict(denoiser.named_modules())
    for key, tensor in state.items():
        path = key.rsplit(".lora_", 1)[0]
        module = modules.get(path)
        if module is None:
            raise ValueError(f"LoRA tensor {key}: this model has no module {path}")
        module, is_down = getattr(module, "base_layer", module), ".lora_A." in key
        wanted, found = (module.in_features, tensor.shape[1]) if is_down else (module.out_features, tensor.shape[0])
        if wanted != found:
            raise ValueError(f"LoRA tensor {key} is for width {found}; this denoiser's {path} has {wanted}")


def load_lora(denoiser: ModelMixin, state: dict[str, torch.Tensor], *, alpha: float) -> None:
    """Attaches LoRA tensors as the PEFT adapter "dpt" in place of one already there; all of it is frozen.

    Args:
        state: diffusers' names, without a prefix; all of one rank.
        alpha: the update is scaled by alpha / rank.

    Raises:
        ValueError: a module or a width that the denoiser does not have.
    """
    check_lora(denoiser, state)
    remove_lora(denoiser)
    prefixed = {f"unet.{key}": value for key, value in state.items()}
    metadata = {f"unet.{key}": value for key, value in lora_metadata(state, alpha).items()}
    denoiser.load_lora_adapter(prefixed, prefix="unet", adapter_name=ADAPTER_NAME, metadata=metadata)
    denoiser.requires_grad_(False)


def load_external_lora(sd: StableDiffusion, path: Path, notice=print) -> None:
    """Attaches another method's LoRA, of any layout that `lora_files` reads, to denoiser and text encoders, frozen.

    Args:
        path: a file, or a folder that holds one.
        notice: called with one line of what diffusers and PEFT warn of, such as tensors that fit nothing.

    Raises:
        ValueError: nothing readable there, or nothing that fits this model.
    """
    stock, notes, parts = sd.stock_class, [], {part: sd.parts.get(part) for part in PARTS}
    models = {part: model for part, model in parts.items() if model and not isinstance(model, T5EncoderModel)}
    for model in models.values():
        remove_lora(model)
    state, settings = read_lora(path, models, notes.append)
    options = {FluxPipeline: {"return_alphas": True}, StableDiffusionXLPipeline: {"unet_config": sd.denoiser.config}}
    try:
        with collected_warnings(notes):
            found = stock.lora_state_dict(state, **options.get(stock, {}))
            state, alphas = found if isinstance(found, tuple) else (found, None)
            if not isinstance(sd, Flux) and any(".single_transformer_blocks." in key for key in state):
                raise ValueError("it is for FLUX")
            for part, model in models.items():
                own = {key: value for key, value in state.items() if key.startswith(f"{part}.")}
                if not own:
                    continue
                metadata = settings.get(part)
                if metadata is not None:
                    targets = sorted({key.removeprefix(f"{part}.").split(".lora_")[0] for key in own})
                    metadata = {f"{part}.{k}": v for k, v in (metadata | {"target_modules": targets}).items()}
                kind, given = part.removesuffix("_2"), {"adapter_name": ADAPTER_NAME, "metadata": metadata}
                if kind == "text_encoder":
                    given["prefix"] = part
                if stock is not StableDiffusion3Pipeline or kind == "text_encoder":
                    given["network_alphas"] = alphas
                getattr(stock, f"load_lora_into_{kind}")(own, **{kind: model}, **given)
                model.eval().requires_grad_(False)
    except (*LOADING_ERRORS, re.error) as error:  # of libraries, by any content
        raise ValueError(f"lora {path} does not fit this model: {' '.join(str(error).split())[:200]}") from error
    if not any(ADAPTER_NAME in getattr(model, "peft_config", {}) for model in models.values()):
        kinds = sorted({key.split(".")[0] for key in state if key.split(".")[0] in PARTS})
        raise ValueError(f"lora {path} is for {' and '.join(kinds) or 'nothing'}; this model has {', '.join(models)}")
    if strangers := sorted({key.split(".")[0] for key in state} - {*models}):
        notes.append(f"its tensors for {', '.join(strangers)[:80]} are left out, which this model has not")
    if notes:
        notice(f"note: lora {path}: {' '.join('; '.join(notes).split())[:400]}")


@contextlib.contextmanager
def collected_warnings(messages: list[str]):
    """Collects warnings of diffusers, transformers and PEFT in the list while the context lasts; none is printed."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.handlers[:] = [handler]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        messages += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    finally:
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers


def remove_lora(model: ModelMixin | CLIPTextModel) -> None:
    """Detaches the PEFT adapter "dpt", if there is one."""
    if ADAPTER_NAME in (getattr(model, "peft_config", None) or {}):
        (model.delete_adapters if isinstance(model, ModelMixin) else model.delete_adapter)(ADAPTER_NAME)


def add_lora(denoiser: ModelMixin, *, rank: int, alpha: float, blocks: tuple[str, ...] = ()) -> None:
    """Adds a fresh, trainable LoRA (its update starts at zero) to every attention projection, in float32.

    Args:
        blocks: restricts it to these blocks of the denoiser (see `dpt.backbones.blocks`); none means all.

    Raises:
        ValueError: blocks without attention, or that the denoiser does not have.
    """
    for block in blocks:
        if parse_feature(block, denoiser.config, "lora.blocks") != (block,) or block == LATENTS:
            raise ValueError(f"lora.blocks is {list(blocks)}; {block!r} is no single block")
    prefixes = tuple(map(block_prefix, blocks)) or ("",)  # with which every name begins
    projections = (*PROJECTIONS, *TEXT_PROJECTIONS)
    targets = [n for n, _ in denoiser.named_modules() if n.endswith(projections) and n.startswith(prefixes)]
    if not targets:
        raise ValueError(f"lora.blocks is {list(blocks)}; there is no attention in them: name others")
    remove_lora(denoiser)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def lora_state(denoiser: ModelMixin) -> dict[str, torch.Tensor]:
    """The tensors of the PEFT adapter "dpt", in diffusers' names; empty where there is none."""
    if ADAPTER_NAME not in getattr(denoiser, "peft_config", {}):
        return {}
    return get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
