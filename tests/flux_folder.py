"""A small random FLUX.1 folder: real classes, the embedded model's tokenizer."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from dpt.base_models import CKPT_FOLDER

WIDTH, TOKEN_WIDTH = 24, 32
"""of CLIP, and of the transformer's tokens"""


def make_flux(folder: Path, *, distilled: bool = True) -> Path:
    """Saves the folder, as FLUX.1-dev's or, not `distilled`, as FLUX.1-schnell's, and returns it."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CKPT_FOLDER / "shapes/tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
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
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    shifted = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(shifted if distilled else {"shift": 1.0})),
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder
