"""Files of LoRA in the layouts that people have, read to tensors in diffusers' names.

diffusers' own, kohya's, the attention processors' of old (DiffusionITM's, without a prefix), a PEFT folder, and
lora_diffusion's lists without names (GORS).
"""

import dataclasses
import json
from pathlib import Path

import msgspec
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import nn

from dpt.files import decode, read_json
from dpt.weights import check_state, check_tensor, is_safetensors, read_pickle, read_tensors

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
HALVES = [(f"{before}{down}.weight", f"{before}{up}.weight") for before, down, up in (
    (".", "lora_A", "lora_B"), (".", "lora_down", "lora_up"), ("lora.", "down", "up"), ("_layer.", "down", "up")
)]  # fmt: skip
"""The endings of the names of a LoRA's two matrices."""
PEFT_CONFIG, PEFT_PREFIX, METADATA = "adapter_config.json", "base_model.model.", "lora_adapter_metadata"


class PeftSettings(msgspec.Struct):
    """The settings of a `LoraConfig` that change the picture; the others are for training."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    peft_type: str | None = "LORA"


def read_lora(path: Path, models: dict[str, nn.Module], notice) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Tensors by name, kohya's as they are, all others behind a part's name of `PARTS`; settings of each part.

    Args:
        path: a file, or a folder that holds one.
        models: the parts by name; `unet` and `text_encoder` give names to tensors that have none.
        notice: called with a text where something is left out.

    Raises:
        ValueError: nothing that is known, or a damaged file; it is named.
    """
    file = _choose_file(path, notice)
    if is_safetensors(file):
        state, settings = read_tensors(file), _file_settings(file)
    else:
        content, settings = read_pickle(file), {}
        if isinstance(content, list):
            return _read_lists(file, content, models, notice), {}
        state = check_state(file, content)
    _check_halves(file, state)
    is_peft = any(key.startswith(PEFT_PREFIX) for key in state)
    state = {_prefixed(key.removeprefix(PEFT_PREFIX)): value for key, value in state.items()}
    if is_peft and (file.parent / PEFT_CONFIG).exists():
        settings = _peft_settings(file.parent / PEFT_CONFIG, state)
    elif is_peft:
        notice(f"{PEFT_CONFIG} is not beside {file}: its alpha is taken to be its rank")
    for part, values in settings.items():
        ranks = [value.shape[0] for key, value in state.items() if key.startswith(f"{part}.") and ".lora_A." in key]
        stated = max(values.r, *values.rank_pattern.values(), 0)
        if stated > max(ranks, default=stated):
            raise ValueError(f"lora {file}: its settings say rank {stated}; its tensors have {max(ranks)}")
    return state, {
        part: {name: value for name, value in msgspec.structs.asdict(values).items() if name != "peft_type"}
        for part, values in settings.items()
    }


def _choose_file(path: Path, notice) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"lora {path} is not there")
        if path.name.endswith(".text_encoder.pt"):
            return path.with_name(path.name.replace(".text_encoder.pt", ".pt"))
        return path
    others = ("optimizer", "scheduler", "checkpoint", "random_states", ".text_encoder.pt", ".ti.pt")
    for ending in (".safetensors", ".bin", ".pt"):
        files = sorted(file for file in path.glob(f"*{ending}") if not any(word in file.name for word in others))
        files = [file for file in files if file.stem in ("pytorch_lora_weights", "adapter_model")] or files
        if len(files) > 1:
            notice(f"{path} holds {', '.join(file.name for file in files)}; {files[0].name} is read, name another")
        if files:
            return files[0]
    raise ValueError(f"lora {path} holds no .safetensors, .bin or .pt file")


def _check_halves(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where a matrix of a LoRA is missing, no matrix, or of another rank than its other half."""
    found = 0
    for key, value in state.items():
        for down, up in HALVES:
            ending, other = (down, up) if key.endswith(down) else (up, down)
            if not key.endswith(ending):
                continue
            found += 1
            if value.ndim not in (2, 4):
                raise ValueError(f"lora {file}: tensor {key} has {value.ndim} dimensions instead of 2")
            half = state.get(key.removesuffix(ending) + other)
            if half is None or half.ndim != value.ndim:
                raise ValueError(f"lora {file}: the other half of tensor {key} is missing or misshapen")
            if ending == down and value.shape[0] != half.shape[1]:
                raise ValueError(f"lora {file}: tensor {key} is of rank {value.shape[0]}, its half of {half.shape[1]}")
    if any(key.startswith(("unet:", "text_encoder:")) for key in state):
        raise ValueError(f"lora {file} is lora_diffusion's safetensors, which is not read; pass its .pt files instead")
    if not found:
        raise ValueError(f"lora {file} holds no LoRA for a denoiser or text encoder, but {', '.join([*state][:2])}")


def _prefixed(key: str) -> str:
    """A key with its part before it: DiffusionITM's and PEFT's files leave it out."""
    if key.startswith(("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.")):
        return f"unet.{key}"
    if key.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return f"transformer.{key}"
    if key.startswith(("text_model.", "encoder.layers.")):
        return f"text_encoder.{key}"
    return key


def _file_settings(file: Path) -> dict[str, PeftSettings]:
    """The metadata that diffusers keeps beside the tensors: `LoraConfig`'s fields, each behind its part's name."""
    with safe_open(file, "pt") as tensors:
        raw = (tensors.metadata() or {}).get(METADATA)
    if not raw:
        return {}
    where, parts = f"lora {file}: {METADATA}", {}
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in decode(raw, dict[str, object], where).items():
        part, _, name = key.partition(".")
        if part not in PARTS or name not in known:
            raise ValueError(f"{where}: {key[:60]} is no setting of LoRA; they begin with one of {', '.join(PARTS)}")
        parts.setdefault(part, {})[name] = value
    return {part: decode(json.dumps(values), PeftSettings, f"{where}, {part}") for part, values in parts.items()}


def _peft_settings(path: Path, state: dict[str, torch.Tensor]) -> dict[str, PeftSettings]:
    """A PEFT folder's config, for the part that its tensors are for."""
    settings = read_json(path, PeftSettings)
    if settings.peft_type != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.peft_type!r}; it must be LORA")
    return {part: settings for part in PARTS if any(key.startswith(f"{part}.") for key in state)}


def _read_lists(file: Path, content: list, models: dict[str, nn.Module], notice) -> dict[str, torch.Tensor]:
    """lora_diffusion's .pt: matrices up and down by turns, in the order of the attentions' projections.

    That of the text encoder lies beside it, NAME.text_encoder.pt.
    """
    if "unet" not in models:
        raise ValueError(f"lora {file} is a list of tensors for a U-Net, as GORS has them; this model has none")
    state = _name_list(file, content, "unet", models["unet"], ("Attention",))
    beside = file.with_suffix(".text_encoder.pt")
    if not beside.exists():
        notice(f"{beside} is not there: the U-Net's part alone is loaded")
        return state
    return state | _name_list(
        beside, read_pickle(beside), "text_encoder", models["text_encoder"], ("CLIPAttention", "CLIPSdpaAttention")
    )


def _name_list(file: Path, content: object, part: str, model: nn.Module, classes: tuple[str, ...]) -> dict:
    projections = {
        f"{name}.{child}".removesuffix(".base_layer"): linear
        for name, module in model.named_modules()
        if type(module).__name__ in classes
        for child, linear in module.named_modules()
        if type(linear) is nn.Linear and "lora_" not in child
    }
    if not isinstance(content, list) or len(content) != 2 * len(projections):
        number = len(content) if isinstance(content, list) else "no"
        raise ValueError(
            f"lora {file} is a list of {number} tensors, as GORS has them; this model's {part} has {len(projections)} "
            "attention projections, of two tensors each"
        )
    state = {}
    for k, (name, linear) in enumerate(projections.items()):
        up, down = content[2 * k : 2 * k + 2]
        check_tensor(file, f"{2 * k}", up)
        check_tensor(file, f"{2 * k + 1}", down)
        wanted = (linear.out_features, linear.in_features)
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or (len(up), down.shape[1]) != wanted:
            raise ValueError(
                f"lora {file}: its tensors {2 * k} and {2 * k + 1} are {tuple(up.shape)} and {tuple(down.shape)}; "
                f"{name} is {wanted}"
            )
        state[f"{part}.{name}.lora_A.weight"], state[f"{part}.{name}.lora_B.weight"] = down.float(), up.float()
    return state
