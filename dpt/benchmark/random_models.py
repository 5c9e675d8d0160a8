"""Denoisers with random weights, of the real classes, and the inputs of a step."""

from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from dpt.backbones.architecture import CONFIGS
from dpt.backbones.blocks import block_channels
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.flow import FlowScheduler, FluxScheduler
from dpt.backbones.loading import load_stable_diffusion
from dpt.config import AdapterConfig

CELLS = 32
"""sides of the latents of random models"""


@dataclass
class RandomModel:
    """A frozen denoiser, its scheduler, and an adapter and encoded prompts that fit it."""

    denoiser: torch.nn.Module
    scheduler: object
    feature: str
    latent_channels: int = 4
    text_tokens: int = 77
    context_width: int = 1024
    pooled_width: int = 1024
    further: dict[str, int | None] = field(default_factory=dict)
    """further inputs by name: widths, None for a number an image"""
    guidance_scale: float = 7.5
    cells: int = CELLS
    small_adapter: bool = False

    @property
    def adapter_config(self) -> AdapterConfig:
        """The paper's adapter for it; the embedded model's own for `shapes`."""
        small = {"hidden_dim": 128, "dim_feedforward": 512, "num_queries_itm": 4, "num_queries_rec": 12}
        channels = [block_channels(self.feature, self.denoiser.config)]
        return AdapterConfig(in_channels=channels, text_dim=self.pooled_width, **(small if self.small_adapter else {}))

    def latents(self, *shape: int) -> torch.Tensor:
        """Standard normal, (*shape, C, h, w)."""
        return torch.randn(*shape, self.latent_channels, self.cells, self.cells)

    def conditioning(self, batch_size: int) -> Conditioning:
        """Random embeddings in place of encoded prompts."""
        dtype = self.denoiser.dtype
        further = {
            name: torch.randn(batch_size, *([width] if width else [])).to(dtype) for name, width in self.further.items()
        }
        context = torch.randn(batch_size, self.text_tokens, self.context_width).to(dtype)
        return Conditioning(context, torch.randn(batch_size, self.pooled_width), further)


SMALL_SD = {
    "block_out_channels": (128, 256, 512, 512),
    "attention_head_dim": (2, 4, 8, 8),
    "cross_attention_dim": 512,
    "use_linear_projection": True,
}
SMALL_XL = CONFIGS["sdxl"] | {
    "block_out_channels": [96, 192, 384],
    "transformer_layers_per_block": [1, 1, 3],
    "attention_head_dim": [3, 6, 12],
    "cross_attention_dim": 512,
    "projection_class_embeddings_input_dim": 6 * 256 + 512,
}
SMALL_SD3 = CONFIGS["sd35-medium"] | {
    "num_layers": 10,
    "num_attention_heads": 8,
    "dual_attention_layers": [0, 1, 2, 3, 4],
    "caption_projection_dim": 512,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 256,
}
SMALL_FLUX = CONFIGS["flux-dev"] | {
    "num_layers": 6,
    "num_single_layers": 12,
    "num_attention_heads": 4,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 256,
}


def random_model(name: str) -> RandomModel:
    """A model by name: `shapes`, or `random-` and a size or a full-size architecture, those in bfloat16."""
    if name == "shapes":
        sd = load_stable_diffusion("shapes")
        width = sd.text_encoder.config.hidden_size
        texts = {"text_tokens": sd.tokenizer.model_max_length, "context_width": width, "pooled_width": width}
        cells = sd.denoiser.config.sample_size
        return RandomModel(sd.denoiser, sd.scheduler, "up1", cells=cells, small_adapter=True, **texts)
    torch.manual_seed(0)
    ddim = DDIMScheduler(steps_offset=1, clip_sample=False)
    if name == "random-145m":
        return RandomModel(_unet(SMALL_SD), ddim, "up1", context_width=512, pooled_width=512)
    if name == "random-sd21":
        return RandomModel(_full(UNet2DConditionModel, "sd21-base"), ddim, "up1")
    if name in ("random-xl-94m", "random-sdxl"):
        width, full = (512, False) if name == "random-xl-94m" else (1280, True)
        denoiser = _full(UNet2DConditionModel, "sdxl") if full else _unet(SMALL_XL)
        texts = {"context_width": 2048 if full else 512, "pooled_width": width}
        return RandomModel(denoiser, ddim, "up0", further={"text_embeds": width, "time_ids": 6}, **texts)
    if name in ("random-sd3-102m", "random-sd35"):
        width, full = (256, False) if name == "random-sd3-102m" else (2048, True)
        transformer = (
            _full(SD3Transformer2DModel, "sd35-medium") if full else _frozen(SD3Transformer2DModel(**SMALL_SD3))
        )
        texts = {"text_tokens": 154, "context_width": 4096 if full else 512, "pooled_width": width}
        options = {"latent_channels": 16, "further": {"pooled_projections": width}, "guidance_scale": 5.0}
        return RandomModel(transformer, FlowScheduler(shift=3.0), "block12" if full else "block5", **texts, **options)
    if name != "random-flux-106m":
        raise ValueError(f"model is {name!r}; there is none of that name")
    transformer = _frozen(FluxTransformer2DModel(**SMALL_FLUX))
    options = {"latent_channels": 16, "further": {"pooled_projections": 256, "guidance": None}, "guidance_scale": 1.0}
    texts = {"text_tokens": 154, "context_width": 512, "pooled_width": 256}
    return RandomModel(transformer, FluxScheduler(shift=3.0), "block4", **texts, **options)


def _unet(config: dict) -> UNet2DConditionModel:
    return _frozen(UNet2DConditionModel(**config | {"sample_size": CELLS}))


def _full(kind: type, name: str) -> torch.nn.Module:
    """A named model's architecture in bfloat16. Few values are drawn and repeated: drawing billions takes a minute."""
    with torch.device("meta"):
        network = kind(**CONFIGS[name])
    network, some = network.to(torch.bfloat16).to_empty(device="cpu"), 0.02 * torch.randn(2**20).bfloat16()
    for parameter in (*network.parameters(), *network.buffers()):
        flat = parameter.data.flatten()
        for first in range(0, len(flat), len(some)):
            part = flat[first : first + len(some)]
            part.copy_(some[: len(part)])
    return _frozen(network)


def _frozen(network: torch.nn.Module) -> torch.nn.Module:
    return network.eval().requires_grad_(False)
