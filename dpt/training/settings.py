"""Settings of a training run, and the checks of those that must agree. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from dpt.backbones.blocks import block_channels, parse_feature
from dpt.base_models import check_no_t5
from dpt.bounds import bounded, check_bounds, one_of
from dpt.config import (
    CONTROLS,
    MOST_RANK,
    AdapterConfig,
    AdapterSettings,
    DPTConfig,
    LossSettings,
    differences,
    flatten,
)
from dpt.data.settings import DataSettings, check_data


@dataclass
class ModelSettings:
    """The base model and what of it is probed."""

    name: str = "sd21-base"
    """a name of `dpt.base_models`, a local folder, a single file or a hub id"""
    revision: str | None = None
    no_t5: bool = False
    """leave out the T5 of Stable Diffusion 3"""
    local_files_only: bool = False
    feature: str = "up1"
    """down0..3, mid, up0..3, of transformers block0.. and single0..; several joined by "+", or all; latents: the noisy
    latents themselves, as a control"""
    rec_text_encoder: str = "roberta-base"
    """roberta-base, a folder, or clip: the base model's own"""
    gradient_checkpointing: bool = False


@dataclass
class LoraSettings:
    """LoRA on to_q, to_k, to_v and to_out of every attention, of transformers on the text's too (tune only)."""

    rank: int = bounded(4, at_least=1, at_most=MOST_RANK)
    alpha: float | None = bounded(None, above=0)
    """by default the rank: scale 1"""
    blocks: list[str] = field(default_factory=list)
    """restricts LoRA to these blocks (down0..3, mid, up0..3); empty: all"""
    only: bool = False
    """train LoRA alone; the adapter stays as `init_from` has it"""


@dataclass
class NoiseSettings:
    """Which noise levels are trained on."""

    first_timestep: int = bounded(0, at_least=0)
    last_timestep: int | None = bounded(None, at_least=0)
    """both inclusive; by default the whole schedule; equal ones fix the timestep"""
    offset: float = bounded(0.0, at_least=0)


@dataclass
class OptimSettings:
    """AdamW and its schedule."""

    lr: float = bounded(1e-4, at_least=0)
    betas: list[float] = bounded([0.9, 0.999], at_least=0, below=1)
    weight_decay: float = bounded(1e-2, at_least=0)
    max_grad_norm: float = bounded(1.0, above=0)
    schedule: str = one_of("constant", "constant", "linear", "cosine")
    """constant, linear or cosine (to zero at the last step)"""
    schedule_length: str = one_of("steps", "steps", "reference")
    """reference: over steps x accumulation, stepped once a process and step, as there: with 8 accumulated a cosine ends
    at .96, .85, .50, 0 of its start on 1, 2, 4, 8 processes"""
    warmup_steps: int = bounded(0, at_least=0)
    batch_size: int = bounded(48, at_least=1, at_most=4096)
    """samples a device in one forward pass"""
    gradient_accumulation_steps: int = bounded(1, at_least=1, at_most=4096)
    steps: int = bounded(60_000, at_least=1, at_most=10**9)
    """updates of the weights"""
    epochs: float | None = bounded(None, above=0, at_most=10**6)
    """passes over the data, instead of `steps`"""
    mixed_precision: str = one_of("no", "no", "fp16", "bf16")


@dataclass
class CheckpointSettings:
    every: int = bounded(1000, at_least=1)
    keep: int = bounded(3, at_least=1)
    """older ones are removed"""


@dataclass
class ValidationSettings:
    """ITM accuracy and REC precision on the val split."""

    every: int = bounded(500, at_least=1)
    num_samples: int = bounded(200, at_least=1, at_most=1_000_000)
    """of each list, evenly spread"""
    timesteps: list[int] = bounded([100, 300, 500, 700, 900], at_least=0)
    """noise levels of the means; figures at 500, the paper's, stand beside them"""
    best: str | None = None
    """a figure, such as rank_auc, by whose highest value weights are kept in the run folder's `best`"""
    patience: int | None = bounded(None, at_least=1)
    """stop after so many validations without a new best"""


@dataclass
class SampleSettings:
    """Pictures drawn while training, always of the same prompts and seeds."""

    every: int = bounded(0, at_least=-1)
    """0: at the last step only; -1: never"""
    prompts: list[str] = field(
        default_factory=lambda: ["a red circle left of a blue square", "two green stars", "a small black cross"]
    )
    num_images: int = bounded(2, at_least=1, at_most=64)
    """a prompt, plain and with self-correction each"""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 65)
    num_inference_steps: int | None = bounded(None, at_least=1, at_most=500)
    guidance_scale: float | None = bounded(None, at_least=0, below=1000)
    correction_factor: float | None = bounded(None, at_least=0, at_most=1e6)
    """by default what is recommended for the base model"""


@dataclass
class TrainConfig:
    """One run of either stage."""

    run_name: str = "run"
    output_folder: str = "outputs"
    resume: bool = False
    """go on with an existing run of this name"""
    seed: int = bounded(42, at_least=0, at_most=2**32 - 1)
    init_from: str | None = None
    """a checkpoint whose adapter (logit_scale included) and LoRA training starts from; tune needs one, or "new" for an
    untrained adapter"""
    on_nan: str = one_of("raise", "raise", "skip")
    """a non-finite loss: raise, or skip the step and count it"""
    control: str = one_of("none", *CONTROLS)
    """a part that is taken away, to see what an accuracy is worth: see `CONTROLS`, and model.feature=latents"""
    log_every: int = bounded(10, at_least=1)
    tracker: str | None = None
    """a tracker of accelerate, such as tensorboard or wandb, beside metrics.jsonl"""
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self):
        check_bounds(self)
        if not self.run_name.strip():
            raise ValueError("run_name is empty; it names the run's folder")
        if ".." in Path(self.run_name).parts or Path(self.run_name).is_absolute():
            raise ValueError(
                f"run_name is {self.run_name!r}; it must name a folder in output_folder ({self.output_folder})"
            )
        check_data(self.data)
        _check_losses(self)
        if len(self.optim.betas) != 2:
            raise ValueError(f"optim.betas is {self.optim.betas}; it must be two numbers")
        if self.validation.patience and not self.validation.best:
            raise ValueError("validation.patience is set; it counts from the best value of validation.best: name that")
        if not self.validation.timesteps:
            raise ValueError("validation.timesteps is []; it must name at least one")
        if self.samples.every >= 0 and not self.samples.prompts:
            raise ValueError(
                f"samples.every is {self.samples.every} and samples.prompts are 0; pictures need prompts, -1 draws none"
            )
        first, last = self.noise.first_timestep, self.noise.last_timestep
        if last is not None and last < first:
            raise ValueError(
                f"noise.first_timestep and noise.last_timestep are {first} and {last}; they need 0 <= first <= last"
            )


def _check_losses(config: TrainConfig) -> None:
    """Raises ValueError where nothing would be trained or denoised."""
    loss, weights = config.loss, config.loss.weights
    ranks = config.data.trajectories is not None and weights.rank
    if weights.reward and not config.lora.only:
        raise ValueError(
            "loss.weights.reward is set; an adapter that is trained would please itself: set lora.only=true"
        )
    if weights.reward and (config.data.kind == "trajectories" or config.control != "none"):
        wrong = f"control is {config.control!r}" if config.control != "none" else "data.kind is 'trajectories'"
        raise ValueError(f"{wrong}; loss.weights.reward draws pictures of the captions of samples: set one of them")
    if weights.reward and config.model.gradient_checkpointing:
        raise ValueError(
            "model.gradient_checkpointing is true; loss.weights.reward reads the score without LoRA: set one"
        )
    if not (weights.itm or weights.rec or ranks or ((weights.denoise or weights.reward) and config.lora.only)):
        raise ValueError(
            "loss.weights are all 0 but denoise's; nothing would train the adapter (lora.only trains LoRA alone)"
        )
    if config.data.kind == "trajectories" and not ranks:
        raise ValueError("data.kind is 'trajectories' and loss.weights.rank is 0; nothing would be trained")
    if config.data.trajectories is not None and config.control != "none":
        raise ValueError(f"control is {config.control!r}; controls are of the paper's losses, not of trajectories")
    if loss.denoise_negatives and not weights.denoise:
        raise ValueError("loss.denoise_negatives is true and loss.weights.denoise is 0; nothing would be denoised")
    if loss.denoise_negatives and config.data.kind != "shapes":
        raise ValueError("loss.denoise_negatives is true; negatives of coco come without captions of their own")


def adapter_config(config: TrainConfig, unet_config, *, text_dim: int, rec_text_dim: int) -> AdapterConfig:
    """The sizes of the configured adapter for a denoiser of that config and text encoders of those widths."""
    blocks = parse_feature(config.model.feature, unet_config)
    return AdapterConfig(
        in_channels=[block_channels(block, unet_config) for block in blocks],
        fuse=config.model.feature == "all",
        text_dim=text_dim,
        rec_text_dim=rec_text_dim,
        **vars(config.adapter),
    )


def check_start(config: TrainConfig, wanted: AdapterConfig, found: DPTConfig, source: str) -> None:
    """Raises ValueError where weights to start from are of another control, feature or adapter; what differs is named.

    Args:
        wanted: the adapter that the config asks for; found: what the weights in `source` say of themselves.
    """
    if found.control != config.control:
        raise ValueError(f"{source} is of control {found.control}; control is {config.control}")
    if found.feature != config.model.feature:
        raise ValueError(f"{source} reads {found.feature}; model.feature is {config.model.feature}")
    there = vars(found.adapter) | {"dropout": wanted.dropout}
    if differing := [
        f"{name} {there[name]} (here {value})" for name, value in vars(wanted).items() if there[name] != value
    ]:
        raise ValueError(f"{source} holds another adapter: {', '.join(differing)}")


JOINT_BATCH = ("optim.batch_size", "optim.gradient_accumulation_steps")
"""settings that may change when a run goes on, where its samples a step do not"""
FREE_ON_RESUME = (
    *("resume", "output_folder", "on_nan", "log_every", "tracker"),
    *("checkpoints.", "validation.", "samples.", "optim.steps", "optim.epochs", *JOINT_BATCH),
    *("data.num_workers", "data.cache_folder", "data.root", "model.local_files_only"),
)
"""keys, or beginnings of keys, that may change when a run goes on"""


def check_stage(config: TrainConfig, stage: str, num_train_timesteps: int, *, goes_on: bool = False) -> None:
    """Raises ValueError where settings do not go with the stage, or with the model's number of timesteps.

    Args:
        goes_on: whether the run goes on from a checkpoint of its own, and so needs no `init_from`.
    """
    if config.model.no_t5:
        check_no_t5(config.model.name)
    if stage == "tune" and config.init_from is None and not goes_on:
        raise ValueError(
            "init_from is missing: tune starts from a probe, init_from=outputs/PROBE; init_from=new "
            "starts with an untrained adapter"
        )
    if config.lora.only and (stage == "probe" or (config.init_from in (None, "new") and not goes_on)):
        raise ValueError("lora.only is true; it is for tune, and needs an adapter: init_from=CHECKPOINT")
    only_tune = {
        "lora": (config.lora, LoraSettings()),
        "loss.snr_gamma": (config.loss.snr_gamma, None),
        "loss.denoise_negatives": (config.loss.denoise_negatives, False),
    }
    for name, (value, default) in only_tune.items():
        if stage == "probe" and value != default:
            raise ValueError(f"{name} is set; a probe trains no LoRA and denoises nothing, it is for tune")
    if stage == "probe" and config.model.gradient_checkpointing:
        raise ValueError("model.gradient_checkpointing is true; probe keeps nothing of the denoiser that it could save")
    final = num_train_timesteps - 1
    given = {"noise.first_timestep": config.noise.first_timestep, "noise.last_timestep": config.noise.last_timestep}
    for name, value in {**given, "validation.timesteps": max(config.validation.timesteps)}.items():
        if value is not None and value > final:
            raise ValueError(f"{name} is {value}; this model's last is {final}")


def check_resumption(config: TrainConfig, saved: TrainConfig) -> None:
    """Raises ValueError where a run that goes on would not be the run that began; what differs is named."""
    if differing := differing_settings(config, saved, FREE_ON_RESUME):
        raise ValueError(f"resume=true with other settings than the run began with: {', '.join(differing)}")


def check_finished(config: TrainConfig, saved: TrainConfig) -> None:
    """Raises ValueError where the weights of a finished run are not what this config would train."""
    free = tuple(key for key in FREE_ON_RESUME if key not in ("optim.steps", "optim.epochs", *JOINT_BATCH))
    if differing := differing_settings(config, saved, free):
        raise ValueError(
            f"{config.output_folder}/{config.run_name} is there, trained with {', '.join(differing)}; remove it, or "
            "name another folder"
        )


def differing_settings(config: TrainConfig, saved: TrainConfig, free: tuple[str, ...]) -> list[str]:
    """Settings that differ between two runs, as text; keys that begin with one of `free` may differ."""
    now = {key: value for key, value in flatten(config).items() if not key.startswith(free)}
    return differences(flatten(saved), now)
