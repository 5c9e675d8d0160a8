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
class AdapterConfig:
    """What an adapter is made of; the defaults are the paper's for SD 2.1."""

    in_channels: list[int] = field(default_factory=lambda: [1280])
    """channels of each feature map"""
    fuse: bool = False
    """sum the maps after a 1x1 convolution each (`all`) instead of concatenating them"""
    fusion_dim: int = 1280
    fusion_size: int = 16
    """channels, height and width of the fused map"""
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
    text_dim: int = 1024
    """width of the pooled text that ITM compares with"""
    rec_text_dim: int = 768
    """width of the token states that REC is aligned with"""
    contrastive_dim: int = 64

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
