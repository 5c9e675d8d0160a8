"""The files of the reference: our names of their tensors, and the adapter that they fit."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from dpt.backbones.blocks import parse_feature
from dpt.base_models import MODELS
from dpt.config import AdapterConfig, DPTConfig
from dpt.lora import lora_key
from dpt.weights import read_tensors

RELEASED_FILES = ("pytorch_model.bin", "model.safetensors")
ADAPTER_KEYS = (
    (r"query_embed\.", "query_embed."),
    (r"input_proj\.", "input_proj."),
    (r"fusion_proj\.", "fusion.projections."),
    (r"position_embedding\.", "position_embedding."),
    (r"timestep_embedding\.time_embedding\.", "timestep_embedder.time_embedding."),
    (r"transformer\.(en|de)coder\.norm\.", r"transformer.\1coder_norm."),
    (r"transformer\.(en|de)coder\.layers\.(\d+)\.linear1\.", r"transformer.\1coder_layers.\2.feed_forward.0."),
    (r"transformer\.(en|de)coder\.layers\.(\d+)\.linear2\.", r"transformer.\1coder_layers.\2.feed_forward.3."),
    (r"transformer\.decoder\.layers\.(\d+)\.multihead_attn\.", r"transformer.decoder_layers.\1.cross_attn."),
    (r"transformer\.(en|de)coder\.layers\.(\d+)\.(self_attn|norm\d)\.", r"transformer.\1coder_layers.\2.\3."),
    (r"map_to_clip\.", "itm_head.projection."),
    (r"logit_scale$", "itm_head.logit_scale"),
    (r"class_embed\.", "rec_head.class_embed."),
    (r"bbox_embed\.layers\.0\.", "rec_head.bbox_embed.0."),
    (r"bbox_embed\.layers\.1\.", "rec_head.bbox_embed.2."),
    (r"bbox_embed\.layers\.2\.", "rec_head.bbox_embed.4."),
    (r"contrastive_align_projection_image\.", "rec_head.query_projection."),
    (r"contrastive_align_projection_text\.", "rec_head.token_projection."),
)
"""Reference's key pattern -> our name. The first that matches counts."""


def adapter_key(reference_key: str) -> str | None:
    """Our name of one of the reference's adapter tensors; None for a name that the adapter does not have."""
    for pattern, replacement in ADAPTER_KEYS:
        if re.match(pattern, reference_key):
            return re.sub("^" + pattern, replacement, reference_key)
    return None


def infer_adapter_config(
    state: dict[str, torch.Tensor], *, num_queries_itm: int = 10, nheads: int = 8, **fixed
) -> AdapterConfig:
    """The config of the adapter that tensors (under our names) belong to, from their shapes and the arguments.

    Args:
        num_queries_itm: how many of the queries are for ITM.
        fixed: further fields that win over the inferred ones, such as `fusion_size` or `in_channels`.

    Raises:
        ValueError: a tensor that every adapter has is missing, or has another number of dimensions.
    """

    def shape(name, num_dims=2):
        if state[name].ndim != num_dims:
            raise ValueError(f"the adapter's tensor {name} has {state[name].ndim} dimensions instead of {num_dims}")
        return state[name].shape

    def layers(part):
        return len({key.split(".")[2] for key in state if key.startswith(f"transformer.{part}_layers.")})

    try:
        hidden_dim, feature_channels = shape("input_proj.weight", 4)[:2]
        fused = sorted(k for k in state if k.startswith("fusion.projections.") and k.endswith("weight"))
        inferred = {
            "in_channels": [shape(key, 4)[1] for key in fused] or [feature_channels],
            "fuse": bool(fused),
            "fusion_dim": feature_channels,
            "hidden_dim": hidden_dim,
            "nheads": nheads,
            "enc_layers": layers("encoder"),
            "dec_layers": layers("decoder"),
            "dim_feedforward": shape("transformer.encoder_layers.0.feed_forward.0.weight")[0],
            "pre_norm": "transformer.encoder_norm.weight" in state,
            "normalize_features": "feature_mean" in state,
            "position_embedding": "learned" if "position_embedding.row_embed.weight" in state else "sine",
            "num_queries_itm": num_queries_itm,
            "num_queries_rec": shape("query_embed.weight")[0] - num_queries_itm,
            "text_dim": shape("itm_head.projection.2.weight")[0],
            "rec_text_dim": shape("rec_head.token_projection.weight")[1],
            "contrastive_dim": shape("rec_head.query_projection.weight")[0],
        }
    except KeyError as error:
        raise ValueError(f"the adapter's tensor {error} is missing") from error
    return AdapterConfig(**inferred | fixed)


def read_released(
    file: Path, *, feature: str = "up1", base_model: str = "sd21-base", **settings
) -> tuple[DPTConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A released file's config, adapter tensors and LoRA tensors, under our names.

    Args:
        feature, base_model: what the file does not tell; the released one is of SD 2.1-base's up1.
        settings: as `infer_adapter_config` takes them.

    Raises:
        ValueError: a tensor of neither adapter nor LoRA, or an adapter that lacks one.
    """
    four = SimpleNamespace(down_block_types=range(4), up_block_types=range(4))  # all models that it could be for
    parse_feature(feature, four)
    if base_model not in MODELS:
        raise ValueError(f"base_model is {base_model!r}; it must be one of {', '.join(MODELS)}")
    adapter_state, lora, unknown = {}, {}, []
    for key, tensor in read_tensors(file).items():
        if own := lora_key(key):
            lora[own] = tensor
        elif own := adapter_key(key):
            adapter_state[own] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} tensors belong to neither adapter nor LoRA, such as {unknown[:3]}")
    try:
        adapter_config = infer_adapter_config(adapter_state, **settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return DPTConfig(base_model, feature, 0, adapter_config), adapter_state, lora
