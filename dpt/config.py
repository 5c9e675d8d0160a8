"""Configuration: dataclasses are the schema, a YAML holds the differences, `key=value` overrides come last."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from dpt.bounds import bounded, check_bounds, one_of
from dpt.files import in_words, read_text, write_text
from dpt.settings import Sampling
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
        raise ValueError(f"{path or 'config'}: {in_words(str(error))}") from error


def _merge(values: dict, changes: dict) -> dict:
    merged = dict(values)
    for key, value in changes.items():
        parts = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if parts else value
    return merged


def save_config(config, path: str | Path) -> None:
    """Writes a config dataclass, every value included, as YAML, at once or not at all."""
    write_text(path, yaml.safe_dump(asdict(config), sort_keys=False))


JOINT_BATCH = ("optim.batch_size", "optim.gradient_accumulation_steps")
"""settings that may change when a run goes on, where its samples a step do not"""
FREE_ON_RESUME = (
    *(
        "resume",
        "output_folder",
        "on_nan",
        "log_every",
        "tracker",
        "init_from",
        "checkpoints.",
        "validation.",
        "samples.",
    ),
    *("optim.steps", "optim.epochs", *JOINT_BATCH),
    *("data.num_workers", "data.cache_folder", "data.root", "model.local_files_only"),
)
"""keys, or beginnings of keys, that may change when a run goes on"""


def check_stage(config: "TrainConfig", stage: str, num_train_timesteps: int, *, goes_on: bool = False) -> None:
    """Raises ValueError where settings do not go with the stage, or with the model's number of timesteps.

    Args:
        goes_on: whether the run goes on from a checkpoint of its own, and so needs no `init_from`.
    """
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
        raise ValueError("model.gradient_checkpointing is true; probe keeps nothing of the U-Net that it could save")
    final = num_train_timesteps - 1
    given = {"noise.first_timestep": config.noise.first_timestep, "noise.last_timestep": config.noise.last_timestep}
    for name, value in {**given, "validation.timesteps": max(config.validation.timesteps)}.items():
        if value is not None and value > final:
            raise ValueError(f"{name} is {value}; this model's last is {final}")


def check_resumption(config: "TrainConfig", saved: "TrainConfig") -> None:
    """Raises ValueError where a run that goes on would not be the run that began; what differs is named."""
    if differing := differing_settings(config, saved, FREE_ON_RESUME):
        raise ValueError(f"resume=true with other settings than the run began with: {', '.join(differing)}")


def check_finished(config: "TrainConfig", saved: "TrainConfig") -> None:
    """Raises ValueError where the weights of a finished run are not what this config would train."""
    free = tuple(key for key in FREE_ON_RESUME if key not in ("init_from", "optim.steps", *JOINT_BATCH))
    if differing := differing_settings(config, saved, free):
        raise ValueError(
            f"{config.run_name} is there, trained with {', '.join(differing)}; remove it, or choose another name"
        )


def differing_settings(config: "TrainConfig", saved: "TrainConfig", free: tuple[str, ...]) -> list[str]:
    """Settings that differ between two runs, as text; keys that begin with one of `free` may differ."""
    now = {key: value for key, value in flatten(config).items() if not key.startswith(free)}
    return differences(flatten(saved), now)


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
    "random_unet": "the U-Net's training: its weights are random",
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
    """The weights of a checkpoint: their parts and their base model."""

    base_model: str = "sd21-base"
    feature: str = "up1"
    """the probed block, or several; see `unet_features`"""
    itm_layer: int = -1
    """the decoder layer that ITM reads; the reference reads the first (0)"""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    control: str = one_of("none", *CONTROLS)
    """the control that training had, which measuring has too"""
    lora_rank: int = bounded(0, at_least=0, at_most=MOST_RANK)
    """0: no LoRA"""
    lora_alpha: float = bounded(0.0, at_least=0, at_most=1e6)
    metrics: dict[str, float] = field(default_factory=dict)
    """figures for the model card"""
    sampling: Sampling | None = None
    """how they draw best; without it by the paper's correction"""

    def __post_init__(self):
        if isinstance(self.adapter, dict):  # huggingface_hub made this of config.json, which nothing is read from
            return
        check_bounds(self)
        layers = self.adapter.dec_layers
        if not -layers <= self.itm_layer < layers:
            raise ValueError(f"itm_layer is {self.itm_layer}; the adapter has {layers} decoder layers")


# Training

NEGATIVE_KINDS = ("attribute", "count", "relation", "size")


@dataclass
class ModelSettings:
    """The base model and what of it is probed."""

    name: str = "sd21-base"
    """a name of `dpt.backbones.stable_diffusion`, a local folder or a hub id"""
    revision: str | None = None
    local_files_only: bool = False
    feature: str = "up1"
    """down0..3, mid, up0..3, several joined by "+", or all; latents: the noisy latents themselves, as a control"""
    rec_text_encoder: str = "roberta-base"
    """roberta-base, a folder, or clip: the base model's own"""
    gradient_checkpointing: bool = False


@dataclass
class LoraSettings:
    """LoRA on to_q, to_k, to_v and to_out of every attention (tune only)."""

    rank: int = bounded(4, at_least=1, at_most=MOST_RANK)
    alpha: float | None = bounded(None, above=0)
    """by default the rank: scale 1"""
    blocks: list[str] = field(default_factory=list)
    """restricts LoRA to these blocks (down0..3, mid, up0..3); empty: all"""
    only: bool = False
    """train LoRA alone; the adapter stays as `init_from` has it"""


@dataclass
class LossSettings:
    """Weights, and how targets are made."""

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
    """the matching losses, which take five more passes of the U-Net, in every so-manieth step alone"""
    eos_coef: float = bounded(0.1, at_least=0)
    temperature: float = bounded(0.07, above=0)
    cost_class: float = bounded(1.0, at_least=0)
    cost_bbox: float = bounded(5.0, at_least=0)
    cost_giou: float = bounded(2.0, at_least=0)


@dataclass
class NoiseSettings:
    """Which noise levels are trained on."""

    first_timestep: int = bounded(0, at_least=0)
    last_timestep: int | None = bounded(None, at_least=0)
    """both inclusive; by default the whole schedule; equal ones fix the timestep"""
    offset: float = bounded(0.0, at_least=0)


@dataclass
class DataSettings:
    """Where samples come from; paths are relative to `root`. docs/data.md shows the tree."""

    kind: str = one_of("shapes", "shapes", "coco", "trajectories")
    """shapes; coco: COCO with RefCOCO/+/g and mined hard negatives; trajectories: nothing but those"""
    num_samples: int | None = bounded(None, at_least=0, at_most=10_000_000)
    """the first so many; by default 10,000 of shapes, all of coco"""
    negatives: str = one_of("edited", "edited", "mined")
    """shapes: edited (a minimal edit of the sample) or mined (other scenes that are alike, as in the paper)"""
    leave_out: list[str] = field(default_factory=list)
    """shapes, edited: kinds of negative not to train on: attribute, count, relation, size"""
    cache_folder: str = "outputs/cache"
    """shapes: for latents"""
    root: str | None = None
    """coco: the data folder"""
    images: str = "train2014"
    expressions: str = "annotations/finetune_refall_train.json"
    itm: str = "itm/train"
    """hard negatives: a folder, or a .tsv"""
    latents: str | None = None
    """a folder of cached latents, read instead of the training images"""
    val_expressions: list[str] = field(
        default_factory=lambda: [
            f"annotations/finetune_{name}_val.json" for name in ("refcoco", "refcoco+", "refcocog")
        ]
    )
    """their images are in `images`"""
    val_itm: str = "itm/val.tsv"
    val_images: str = "val2014"
    """the images of `val_itm`"""
    flip: bool = False
    """coco: mirror half of the images, swapping left and right in the texts; the paper does not"""
    latent_sample: str = one_of("mean", "mean", "posterior")
    """coco: of images that training encodes, the mean of the autoencoder's posterior, or a draw from it in every epoch,
    as in the reference. Shapes' are always drawn"""
    num_workers: int = bounded(0, at_least=0, at_most=256)
    """processes that read data ahead"""
    trajectories: str | None = None
    """a folder of `python -m dpt.data trajectories`: own half-drawn pictures whose score is to rank them; with shapes
    or coco beside those samples"""
    labels: str = "oracle"
    """by which scorer's values: the folder's labels_<labels>.jsonl"""
    prompts_per_step: int = bounded(6, at_least=1, at_most=4096)
    """of the trajectories, a device and batch"""
    num_prompts: int | None = bounded(None, at_least=10, at_most=10_000_000)
    """the first so many of the folder's, for learning curves; by default all"""


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
        _check_data(self.data)
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


def _check_data(data: DataSettings) -> None:
    """Raises ValueError where settings of data exclude each other."""
    if data.kind == "coco" and data.negatives != "edited":
        raise ValueError(
            f"data.negatives is {data.negatives!r}; coco's are those of data.itm, the setting is for shapes"
        )
    if data.kind == "trajectories" and data.trajectories is None:
        raise ValueError("data.trajectories is missing: a folder that `python -m dpt.data trajectories` has filled")
    if data.kind == "coco" and data.root is None:
        raise ValueError("data.root is missing: the folder that docs/data.md shows")
    unknown = [kind for kind in data.leave_out if kind not in NEGATIVE_KINDS]
    if unknown or len(set(data.leave_out)) == len(NEGATIVE_KINDS):
        raise ValueError(f"data.leave_out is {data.leave_out}; it may name some of {', '.join(NEGATIVE_KINDS)}")
    if data.leave_out and (data.kind != "shapes" or data.negatives != "edited"):
        raise ValueError(f"data.leave_out is {data.leave_out}; only edited negatives of shapes have a kind")
    cached = data.latents is not None or data.kind != "coco"
    if data.flip and cached:
        raise ValueError("data.flip is true; cached latents cannot be mirrored")
    if data.latent_sample == "posterior" and cached:
        raise ValueError("data.latent_sample is 'posterior'; it is for coco's images: cached latents are as they are")


def _check_losses(config: TrainConfig) -> None:
    """Raises ValueError where nothing would be trained or denoised."""
    loss, weights = config.loss, config.loss.weights
    ranks = config.data.trajectories is not None and weights.rank
    if not (weights.itm or weights.rec or ranks or (weights.denoise and config.lora.only)):
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
