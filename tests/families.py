"""Small random models of every family: real classes, the embedded model's tokenizer, sizes of a few pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from dpt.backbones.flux import Flux
from dpt.backbones.sd3 import StableDiffusion3
from dpt.backbones.sdxl import StableDiffusionXL
from dpt.base_models import CKPT_FOLDER

WIDTH, PROJECTION, TIME_WIDTH, TOKEN_WIDTH = 32, 24, 8, 32
"""of the text encoders, of their projections, of XL's embedded sizes, and of the transformers' tokens"""


def make_sdxl(folder: Path) -> Path:
    """Saves a Stable Diffusion XL and returns its folder."""
    tokenizer, text = _text()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + PROJECTION,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(CKPT_FOLDER / "shapes/vae"),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_sd3(folder: Path, *, with_t5: bool = False) -> Path:
    """Saves a Stable Diffusion 3 and returns its folder."""
    tokenizer, text = _text()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=TOKEN_WIDTH // 4,
        caption_projection_dim=TOKEN_WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * PROJECTION,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(tokenizer, 2 * WIDTH) if with_t5 else None,
        tokenizer_3=tokenizer if with_t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_flux(folder: Path, *, distilled: bool = True) -> Path:
    """Saves a FLUX.1, as the dev version or, not `distilled`, the schnell one, and returns its folder."""
    tokenizer, text = _text()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=TOKEN_WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )
    shifted = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(shifted if distilled else {"shift": 1.0})),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer, WIDTH),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder


def _text() -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """The tokenizer, and the config of a CLIP that reads its tokens. Seeds what is random."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CKPT_FOLDER / "shapes/tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, config


def _t5(tokenizer: CLIPTokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def _vae(**scale_and_shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **scale_and_shift,
    )


@dataclass(frozen=True)
class Family:
    """What tests need to know of a family."""

    make: Callable[[Path], Path]
    kind: type
    probed: str
    """the block that is probed"""
    blocks: tuple[str, ...]
    """whose features are compared with a hook's"""
    no_block: tuple[str, ...]
    """features that there are not"""
    in_lora: tuple[str, ...]
    """blocks that a LoRA is restricted to"""
    title: str
    recipes: str
    """the folder of configs"""
    slope: tuple[float, float]
    """step of the finite difference, and how close it must be; norms of transformers compute in float32"""
    guidance_scale: float = 3.0
    """at which pictures are drawn"""


FAMILIES = {
    "sdxl": Family(
        *(make_sdxl, StableDiffusionXL, "up1", ("down0", "down2", "mid", "up0", "up1", "up2"), ("up3", "block0")),
        *(("down1", "up0"), "Stable Diffusion XL", "sdxl", (1e-6, 1e-5)),
    ),
    "sd3": Family(
        *(make_sd3, StableDiffusion3, "block2", ("block0", "block1", "block3"), ("up1", "block4", "all")),
        *(("block1",), "Stable Diffusion 3", "sd35", (1e-3, 2e-3)),
    ),
    "flux": Family(
        *(make_flux, Flux, "single0", ("block0", "block1", "single0", "single1"), ("up1", "block2", "all")),
        *(("block1", "single0"), "FLUX", "flux", (1e-4, 2e-3), 1.0),
    ),
}
