"""Models in one file, as the original code of Stable Diffusion 1, 2 and XL writes them, through diffusers' converters.

The file holds weights alone. Configs, tokenizers and the scheduler come from the named model of the same kind: from
ckpt/<name> where its `model_index.json` is, else from the hub's cache or the hub.
"""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from dpt.backbones.model_folder import SUPPORTED
from dpt.base_models import CKPT_FOLDER, MODELS
from dpt.weights import is_safetensors, read_pickle, read_shapes

KINDS = {"v1": "sd15", "v2": "sd21-base", "xl_base": "sdxl"}
"""diffusers' name of a kind of file -> the named model of that kind"""


def named_alike(file: Path) -> str:
    """The named model that a file is of the kind of; reads no values of safetensors.

    Of Stable Diffusion 2, whose two sizes do not differ in their tensors, one with 768 in its name is `sd21`.

    Raises:
        ValueError: a file that cannot be read, or of another kind.
    """
    if is_safetensors(file):
        shapes = read_shapes(file)
    else:
        state = read_pickle(file)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        shapes = {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}
    kind = infer_diffusers_model_type({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if kind not in KINDS or not any(name.startswith("model.diffusion_model.") for name in shapes):
        found = "no whole model" if kind == "v1" else f"a model of the kind {kind}"
        raise ValueError(f"model {str(file)!r} holds {found}; {SUPPORTED}, in one file 1, 2 and XL")
    return "sd21" if kind == "v2" and re.search(r"(?<!\d)768(?!\d)", file.stem) else KINDS[kind]


def configs_of(name: str) -> str:
    """The place of a named model's configs: its folder in ckpt, or its hub id."""
    folder = CKPT_FOLDER / name
    return str(folder) if (folder / "model_index.json").is_file() else MODELS[name].source


def load_single_file(file: Path, configs: str, *, is_xl: bool, dtype: torch.dtype, **options) -> DiffusionPipeline:
    """The pipeline of diffusers with a file's weights.

    Args:
        configs: as `configs_of` says.
        options: further arguments of `from_single_file`.
    """
    options |= {"config": configs, "torch_dtype": dtype, "feature_extractor": None, "image_encoder": None}
    if is_xl:
        return StableDiffusionXLPipeline.from_single_file(str(file), add_watermarker=False, **options)
    return StableDiffusionPipeline.from_single_file(str(file), safety_checker=None, **options)
