"""A small random Stable Diffusion 3 folder: real classes, the embedded model's tokenizer, with and without T5."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from dpt.base_models import CKPT_FOLDER

WIDTH, PROJECTION, TOKEN_WIDTH = 32, 24, 32
"""of either CLIP, of its projection, and of the transformer's tokens"""


def make_sd3(folder: Path, *, with_t5: bool = False) -> Path:
    """Saves the folder and returns it."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CKPT_FOLDER / "shapes/tokenizer")
    text = CLIPTextConfig(
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
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    t5 = T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5) if with_t5 else None,
        tokenizer_3=tokenizer if with_t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder
