"""Configuration: dataclasses are the schema, a YAML holds the differences, `key=value` overrides on the command line.

OmegaConf checks names and types; it never leaves this module.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def load_config(schema: type[T], path: str | Path | None = None, overrides: list[str] = ()) -> T:
    """An instance of the dataclass `schema`: its defaults, then the YAML at `path`, then `overrides` ("a.b=1").

    Raises:
        ValueError: an unknown key (with a suggestion), a wrong type, or an override that is not `key=value`.
    """
    config = OmegaConf.structured(schema)
    sources = []
    if path is not None:
        try:
            sources.append((str(path), OmegaConf.load(path)))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
        try:
            sources.append((override, OmegaConf.from_dotlist([override])))
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r} cannot be read: its value is no YAML") from error
    for name, source in sources:
        try:
            config = OmegaConf.merge(config, source)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or ""
            known = _keys(schema)
            if key and key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"
                raise ValueError(f"{name}: unknown key {key}{hint}") from error
            raise ValueError(f"{name}: {key}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(config)


def _keys(schema, prefix="") -> list[str]:
    keys = []
    for entry in fields(schema):
        keys.append(prefix + entry.name)
        if is_dataclass(entry.type):
            keys += _keys(entry.type, f"{prefix}{entry.name}.")
    return keys


def save_config(config, path: str | Path) -> None:
    """Writes a config dataclass, every value included, as YAML."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False))


# What weights are made of


@dataclass
class AdapterSettings:
    """The adapter's free sizes; the defaults are the paper's."""

    hidden_dim: int = 256
    nheads: int = 8
    enc_layers: int = 1
    dec_layers: int = 1
    dim_feedforward: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False
    position_embedding: str = "sine"
    """sine or learned"""
    num_queries_itm: int = 10
    num_queries_rec: int = 100
    contrastive_dim: int = 64
    fusion_dim: int = 1280
    fusion_size: int = 16
    """channels, height and width of the map that `all` is fused to"""

    def __post_init__(self):
        if self.position_embedding not in ("sine", "learned"):
            raise ValueError(f"position_embedding is {self.position_embedding!r}; it must be sine or learned")
        if self.hidden_dim % self.nheads or self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}; it must be divisible by 4 and by nheads ({self.nheads})"
            )
        for name in ("num_queries_itm", "num_queries_rec", "enc_layers", "dec_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class AdapterConfig(AdapterSettings):
    """What an adapter is made of: its free sizes, and those that follow from the model (here SD 2.1's)."""

    in_channels: list[int] = field(default_factory=lambda: [1280])
    """channels of each feature map"""
    fuse: bool = False
    """sum the maps after a 1x1 convolution each (`all`) instead of concatenating them"""
    text_dim: int = 1024
    """width of the pooled text that ITM compares with"""
    rec_text_dim: int = 768
    """width of the token states that REC is aligned with"""


@dataclass
class DPTConfig:
    """What the weights are, and for which model."""

    base_model: str = "sd21-base"
    feature: str = "up1"
    """the probed block, or several; see `unet_features`"""
    itm_layer: int = -1
    """the decoder layer that ITM reads; the reference reads the first (0)"""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    lora_rank: int = 0
    """0: no LoRA"""
    lora_alpha: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """figures for the model card"""


# Training


@dataclass
class LossWeights:
    """What each named loss is multiplied by; a group at 0 is not computed."""

    itm_i2t: float = 1.0
    itm_t2i: float = 1.0
    ce: float = 1.0
    bbox: float = 5.0
    giou: float = 2.0
    contrastive_align: float = 1.0
    denoise: float = 1.0

    def total(self, losses: dict):
        """The weighted sum of `loss_*` values."""
        return sum(getattr(self, name.removeprefix("loss_")) * value for name, value in losses.items())

    @property
    def itm(self) -> bool:
        return bool(self.itm_i2t or self.itm_t2i)

    @property
    def rec(self) -> bool:
        return bool(self.ce or self.bbox or self.giou or self.contrastive_align)


@dataclass
class ModelSettings:
    """The base model and what of it is probed."""

    name: str = "sd21-base"
    """a name of `dpt.stable_diffusion`, a local folder or a hub id"""
    revision: str | None = None
    local_files_only: bool = False
    feature: str = "up1"
    """down0..3, mid, up0..3, several joined by "+", or all"""
    rec_text_encoder: str = "roberta-base"
    """roberta-base, a folder, or clip: the base model's own"""
    gradient_checkpointing: bool = False


@dataclass
class LoraSettings:
    """LoRA on to_q, to_k, to_v and to_out of every attention (tune only)."""

    rank: int = 4
    alpha: float | None = None
    """by default the rank: scale 1"""
    blocks: list[str] = field(default_factory=list)
    """restricts LoRA to these blocks (down0..3, mid, up0..3); empty: all"""


@dataclass
class LossSettings:
    """Weights, and how targets are made."""

    weights: LossWeights = field(default_factory=LossWeights)
    snr_gamma: float | None = None
    """min-SNR weighting of the denoising loss"""
    normalize_positive_map: bool = True
    """False: 0/1, as the reference trains"""
    eos_coef: float = 0.1
    temperature: float = 0.07
    cost_class: float = 1.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0


@dataclass
class NoiseSettings:
    """Which noise levels are trained on."""

    first_timestep: int = 0
    last_timestep: int | None = None
    """both inclusive; by default the whole schedule; equal ones fix the timestep"""
    offset: float = 0.0


@dataclass
class DataSettings:
    """Where samples come from."""

    kind: str = "shapes"
    num_samples: int = 10_000
    negatives: str = "edited"
    """shapes: edited or mined"""
    cache_folder: str = "outputs/cache"
    """for latents"""


@dataclass
class OptimSettings:
    """AdamW and its schedule."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    """constant, linear or cosine (to zero at the last step)"""
    warmup_steps: int = 0
    batch_size: int = 48
    """samples a device in one forward pass"""
    gradient_accumulation_steps: int = 1
    steps: int = 60_000
    """updates of the weights"""
    mixed_precision: str = "no"
    """no, fp16 or bf16"""


@dataclass
class CheckpointSettings:
    every: int = 1000
    keep: int = 3
    """older ones are removed"""


@dataclass
class TrainConfig:
    """One run of either stage."""

    run_name: str = "run"
    output_folder: str = "outputs"
    resume: bool = False
    """go on with an existing run of this name"""
    seed: int = 42
    init_from: str | None = None
    """a checkpoint whose adapter (logit_scale included) and LoRA training starts from"""
    on_nan: str = "raise"
    """a non-finite loss: raise, or skip the step and count it"""
    log_every: int = 10
    validate_every: int = 500
    num_val_samples: int = 200
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self):
        choices = {
            "on_nan": (self.on_nan, ("raise", "skip")),
            "data.kind": (self.data.kind, ("shapes",)),
            "optim.schedule": (self.optim.schedule, ("constant", "linear", "cosine")),
            "optim.mixed_precision": (self.optim.mixed_precision, ("no", "fp16", "bf16")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be {' or '.join(allowed)}")
        positive = {
            "optim.batch_size": self.optim.batch_size,
            "optim.gradient_accumulation_steps": self.optim.gradient_accumulation_steps,
            "optim.steps": self.optim.steps,
            "lora.rank": self.lora.rank,
            "checkpoints.every": self.checkpoints.every,
            "checkpoints.keep": self.checkpoints.keep,
            "log_every": self.log_every,
            "validate_every": self.validate_every,
        }
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        last = self.noise.last_timestep
        if self.noise.first_timestep < 0 or (last is not None and last < self.noise.first_timestep):
            raise ValueError(
                f"noise.first_timestep and noise.last_timestep are {self.noise.first_timestep} and {last}; "
                "they need 0 <= first <= last"
            )
