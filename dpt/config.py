"""Configuration: dataclasses are the schema, a YAML holds the differences, `key=value` overrides come last.

The settings of weights and losses stand here; `dpt.training.settings` and `dpt.data.settings` hold those of a run.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from dpt.bounds import bounded, check_bounds, one_of
from dpt.files import in_words, read_text, write_text
from dpt.sampling_settings import Sampling
from dpt.tasks import LossWeights
from dpt.typed_yaml import read_document, read_override

T = TypeVar("T")


def load_config(schema: type[T], path: str | Path | None = None, overrides: list[str] = ()) -> T:
    """An instance of the dataclass `schema`: its defaults, then the YAML at `path`, then `overrides` ("a.b=1").

    Text is taken as it is typed, and "~/" at its beginning is the home folder.

    Raises:
        ValueError: an unknown key (with a suggestion), a wrong type, a value out of bounds, or an override that is not
            `key=value`.
    """
    values = asdict(schema())
    if path is not None:
        try:
            document = read_document(read_text(path), schema)
        except ValueError as error:
            raise ValueError(f"config {path}: {error}") from error
        if not isinstance(document, dict | None):
            raise ValueError(f"config {path}: keys and values are expected, not a list or a bare value")
        values = _merge(values, document or {})
    for override in overrides:
        try:
            values = _merge(values, read_override(override, schema))
        except ValueError as error:
            raise ValueError(f"override {override[:100]!r}: {error}") from error
    try:
        return msgspec.convert(values, schema)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError):  # from a `__post_init__`, which names what it is about
            raise error.__cause__ from None
        where = f"{path or 'config'}{' and overrides' if overrides else ''}"
        raise ValueError(f"{where}: {in_words(str(error))}") from error


def _merge(values: dict, changes: dict) -> dict:
    merged = dict(values)
    for key, value in changes.items():
        parts = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if parts else value
    return merged


def save_config(config, path: str | Path) -> None:
    """Writes a config dataclass, every value included, as YAML, at once or not at all."""
    write_text(path, yaml.safe_dump(asdict(config), sort_keys=False))


def differences(before: dict, now: dict) -> list[str]:
    """Settings that changed from `before` to `now`, as text."""
    return [f"{key} {before.get(key)} (now {value})" for key, value in now.items() if before.get(key) != value]


def flatten(config, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Every value of a config dataclass by its dotted key; lists and None as text."""
    flat = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{entry.name}.")
        else:
            flat[prefix + entry.name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat


CONTROLS = {
    "none": "nothing",
    "random_unet": "the denoiser's training: its weights are random",
    "empty_prompt": "the prompt: features are of the empty one, the text is compared with as ever",
    "constant_text": "the text that is compared with: one vector for all; features are of the prompt as ever",
    "shuffled_labels": "the labels: chance, once for each sample, says which pair is true and where boxes are",
    "text_blind": "all text: features are of the empty prompt, and one vector is compared with",
    "image_blind": "the image: what is noised is nothing",
}
"""Control -> the part that it takes away from a probe or a tune."""


# Parts of weights. Upper bounds keep a damaged or hostile file from taking all memory.

MOST_MAPS, MOST_RANK = 32, 2048
"""feature maps that an adapter reads, rank of a LoRA"""


@dataclass
class AdapterSettings:
    """The adapter's free sizes; the defaults are the paper's."""

    hidden_dim: int = bounded(256, at_least=4, at_most=2048)
    nheads: int = bounded(8, at_least=1, at_most=2048)
    enc_layers: int = bounded(1, at_least=1, at_most=16)
    dec_layers: int = bounded(1, at_least=1, at_most=16)
    dim_feedforward: int = bounded(2048, at_least=1, at_most=16_384)
    dropout: float = bounded(0.1, at_least=0, below=1)
    pre_norm: bool = False
    position_embedding: str = one_of("sine", "sine", "learned")
    value_positions: bool = False
    """add positions to the values of the decoder's attention to the map too, not only to its keys as DETR does"""
    normalize_features: bool = False
    """standardise each channel of the features by its mean and deviation, measured before training begins"""
    num_queries_itm: int = bounded(10, at_least=1, at_most=2048)
    num_queries_rec: int = bounded(100, at_least=1, at_most=2048)
    heads: list[str] = field(default_factory=lambda: ["itm", "rec"])
    """names of the tasks that have a head: the paper's two, and further ones of `dpt.tasks`"""
    contrastive_dim: int = bounded(64, at_least=1, at_most=8192)
    fusion_dim: int = bounded(1280, at_least=1, at_most=16_384)
    fusion_size: int = bounded(16, at_least=1, at_most=512)
    """channels, height and width of the map that `all` is fused to"""

    def __post_init__(self):
        check_bounds(self, "adapter.")
        if not {"itm", "rec"} <= set(self.heads):
            raise ValueError(f"adapter.heads is {self.heads}; it must hold itm and rec, and may hold further tasks")
        if self.hidden_dim % self.nheads or self.hidden_dim % 4:
            raise ValueError(
                f"adapter.hidden_dim is {self.hidden_dim}; it must be divisible by 4 and by nheads ({self.nheads})"
            )


@dataclass
class AdapterConfig(AdapterSettings):
    """All sizes of an adapter: its free ones, and those that follow from the model (here SD 2.1's)."""

    in_channels: list[int] = bounded([1280], at_least=1, at_most=16_384)
    """channels of each feature map"""
    fuse: bool = False
    """sum the maps after a 1x1 convolution each (`all`) instead of concatenating them"""
    text_dim: int = bounded(1024, at_least=1, at_most=16_384)
    """width of the pooled text that ITM compares with"""
    rec_text_dim: int = bounded(768, at_least=1, at_most=16_384)
    """width of the token states that REC is aligned with"""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.in_channels) <= MOST_MAPS:
            raise ValueError(f"adapter.in_channels are {len(self.in_channels)}; it must be 1 to {MOST_MAPS}, one a map")


@dataclass
class DPTConfig:
    """The config beside a checkpoint's weights: their parts and their base model."""

    base_model: str = "sd21-base"
    feature: str = "up1"
    """the probed block, or several; see `dpt.backbones.blocks`"""
    itm_layer: int = -1
    """the decoder layer that ITM reads; the reference reads the first (0)"""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    control: str = one_of("none", *CONTROLS)
    """the control that training had, which measuring has too"""
    t5: bool | None = None
    """whether the base model's context held T5's states, of families that have one; None where nobody noted it"""
    lora_rank: int = bounded(0, at_least=0, at_most=MOST_RANK)
    """0: no LoRA"""
    lora_alpha: float = bounded(0.0, at_least=0, at_most=1e6)
    metrics: dict[str, float] = field(default_factory=dict)
    """figures for the model card"""
    sampling: Sampling | None = None
    """how they draw best; without it see `dpt.base_models.recommended`"""

    def __post_init__(self):
        if isinstance(self.adapter, dict):  # huggingface_hub made this of config.json, which nothing is read from
            return
        check_bounds(self)
        layers = self.adapter.dec_layers
        if not -layers <= self.itm_layer < layers:
            raise ValueError(f"itm_layer is {self.itm_layer}; the adapter has {layers} decoder layers")


@dataclass
class LossSettings:
    """Settings of the losses: their weights, and how targets are made."""

    weights: LossWeights = field(default_factory=LossWeights)
    snr_gamma: float | None = bounded(None, above=0)
    """min-SNR weighting of the denoising loss"""
    normalize_positive_map: bool = True
    """False: 0/1, as the reference trains"""
    denoise_negatives: bool = False
    """denoise the hard-negative and the random image too, under captions of their own (shapes only): what a tune step
    costs, spent on denoising"""
    align_to_padding: bool = False
    """True: padding counts as wrong tokens in contrastive alignment, as in the reference"""
    auxiliary: bool = False
    """REC's losses after every decoder layer, not only the last, as in DETR"""
    itm_every: int = bounded(1, at_least=1)
    """the matching losses, which take five more passes of the denoiser, in every so-manieth step alone"""
    reward_until: float = bounded(0.4, above=0, below=1)
    """half-drawn pictures are scored after a step drawn evenly from the first such share of the steps"""
    eos_coef: float = bounded(0.1, at_least=0)
    temperature: float = bounded(0.07, above=0)
    cost_class: float = bounded(1.0, at_least=0)
    cost_bbox: float = bounded(5.0, at_least=0)
    cost_giou: float = bounded(2.0, at_least=0)
