"""Settings of the `shapes` world and of its base model's pretraining. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from dpt.bounds import bounded, check_bounds

IMAGE_SIZE = 128
SEEDS_APART = 1000  # of prompts that are judged: seed s of the k-th stands for the noise of seed k * SEEDS_APART + s
LABELLED_FOLDER = Path(__file__).parent / "labelled"
STAGE_NAMES = ("clip", "vae", "latents", "unet", "decoder", "export")


@dataclass(frozen=True)
class WebNoise:
    """The chance of each fault of web-like captions, which are partial and noisy."""

    drop_object: float = bounded(0.04, at_least=0, at_most=1)
    """per object of a caption that names more than one; at least one stays"""
    drop_color: float = bounded(0.08, at_least=0, at_most=1)
    """per phrase"""
    drop_shape: float = bounded(0.04, at_least=0, at_most=1)
    """per phrase that keeps its colour"""
    drop_size: float = bounded(0.15, at_least=0, at_most=1)
    """per phrase that has one"""
    drop_relation: float = bounded(0.15, at_least=0, at_most=1)
    """per relation"""
    flip_relation: float = bounded(0.08, at_least=0, at_most=1)
    """per relation that stays"""
    swap_attributes: float = bounded(0.12, at_least=0, at_most=1)
    """per caption: two phrases trade colours, or shapes"""

    def __post_init__(self):
        check_bounds(self, "web_noise.")


@dataclass
class Optimization:
    steps: int = bounded(1000, at_least=1)
    lr: float = bounded(1e-3, above=0)
    warmup: int = bounded(50, at_least=0)
    """steps of linear warm-up"""
    decay: float = bounded(0.4, at_least=0, at_most=1)
    """share of the steps at the end over which the learning rate falls to zero"""
    ema: float = bounded(0.995, at_least=0, below=1)
    """decay of the weights' average; a stage delivers the average"""
    batch_size: int = bounded(64, at_least=1, at_most=100_000)
    parts: int = bounded(1, at_least=1, at_most=1000)
    """of a batch, computed side by side on a thread each"""
    save_every: int = bounded(100, at_least=1)
    evaluate_every: int = bounded(100, at_least=1)

    def __post_init__(self):
        check_bounds(self, "optimization: ")
        if self.parts > self.batch_size:
            raise ValueError(f"optimization: parts is {self.parts}; it must be at most batch_size, {self.batch_size}")

    @property
    def part_size(self) -> int:
        """The samples of one part of a batch."""
        return self.batch_size // self.parts


@dataclass
class Clip:
    width: int = bounded(128, at_least=1, at_most=8192)
    layers: int = bounded(4, at_least=1, at_most=100)
    heads: int = bounded(4, at_least=1, at_most=1000)
    hard_share: float = bounded(0.25, at_least=0, at_most=1)
    """share of a batch that is pairs of an example and its hard negative"""
    train: Optimization = field(default_factory=lambda: Optimization(steps=900, batch_size=256))

    def __post_init__(self):
        check_bounds(self, "clip.")


@dataclass
class Vae:
    channels: list[int] = bounded([16, 32, 64, 64], at_least=1, at_most=8192)
    crop: int = bounded(64, at_least=1, at_most=IMAGE_SIZE)
    kl_weight: float = bounded(1e-6, at_least=0)
    train: Optimization = field(default_factory=lambda: Optimization(steps=3500, batch_size=24, lr=2e-3))
    decoder: Optimization = field(default_factory=lambda: Optimization(steps=700, batch_size=8, lr=1e-3))
    """the decoder alone, on whole pictures, with the encoder, and so the latents, as they are"""
    decoder_noise: float = bounded(0.3, at_least=0)
    """noise that it learns to see through, in units of the whitened latents: generated latents are never exact"""

    def __post_init__(self):
        check_bounds(self, "vae.")


@dataclass
class Unet:
    channels: list[int] = bounded([48, 96, 128, 128], at_least=1, at_most=8192)
    heads: list[int] = bounded([2, 3, 4, 4], at_least=1, at_most=1000)
    num_latents: int = bounded(100_000, at_least=1, at_most=100_000_000)
    """scenes whose latents are cached and trained on"""
    caption_dropout: float = bounded(0.1, at_least=0, at_most=1)
    web_noise: WebNoise = field(default_factory=WebNoise)
    contrastive_batch_size: int = bounded(32, at_least=2, at_most=100_000)
    """pictures a step of CLIP's loss, with which both towers are trained along: all of them pairs of an example and its
    hard negative"""
    contrastive_weight: float = bounded(0.1, at_least=0)
    wording_batch_size: int = bounded(64, at_least=1, at_most=100_000)
    """captions a step of `wording_loss`"""
    guidance_scale: float = bounded(5.0, at_least=0, below=1000)
    """for the pictures drawn while training"""
    prompts_per_category: int = bounded(10, at_least=1)
    """val prompts drawn at each evaluation"""
    train: Optimization = field(
        default_factory=lambda: Optimization(
            steps=10_000, ema=0.998, parts=2, save_every=100, evaluate_every=500, warmup=100
        )
    )

    def __post_init__(self):
        check_bounds(self, "unet.")


@dataclass
class PretrainConfig:
    folder: str = "outputs/shapes-pretrain"
    """where states, caches and metrics are kept"""
    stages: list[str] = field(default_factory=lambda: [*STAGE_NAMES])
    init_from: str | None = None
    """a folder that `export` wrote: its CLIP and autoencoder are kept, its U-Net is trained on"""
    threads: int = bounded(2, at_least=1, at_most=1024)
    clip: Clip = field(default_factory=Clip)
    vae: Vae = field(default_factory=Vae)
    unet: Unet = field(default_factory=Unet)
    output: str = "ckpt/shapes"
    """the diffusers folder that `export` writes"""

    def __post_init__(self):
        check_bounds(self)
