"""Reads the checkpoints of the released implementation: its key names and ours."""

import re

import torch

from dpt.adapter import AdapterConfig

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
    state: dict[str, torch.Tensor], *, num_queries_itm: int, nheads: int = 8, pre_norm: bool = False, **fixed
) -> AdapterConfig:
    """The config that an adapter's tensors (our names) fit; what shapes do not tell is given.

    Args:
        num_queries_itm: how many of the queries are for ITM.
        fixed: further fields that win over the inferred ones, such as `fusion_size` or `in_channels`.
    """

    def layers(part):
        return len({key.split(".")[2] for key in state if key.startswith(f"transformer.{part}_layers.")})

    hidden_dim, feature_channels = state["input_proj.weight"].shape[:2]
    fused = sorted(k for k in state if k.startswith("fusion.projections.") and k.endswith("weight"))
    inferred = {
        "in_channels": [state[key].shape[1] for key in fused] or [feature_channels],
        "fuse": bool(fused),
        "fusion_dim": feature_channels,
        "hidden_dim": hidden_dim,
        "nheads": nheads,
        "enc_layers": layers("encoder"),
        "dec_layers": layers("decoder"),
        "dim_feedforward": state["transformer.encoder_layers.0.feed_forward.0.weight"].shape[0],
        "pre_norm": pre_norm,
        "position_embedding": "learned" if "position_embedding.row_embed.weight" in state else "sine",
        "num_queries_itm": num_queries_itm,
        "num_queries_rec": len(state["query_embed.weight"]) - num_queries_itm,
        "text_dim": state["itm_head.projection.2.weight"].shape[0],
        "rec_text_dim": state["rec_head.token_projection.weight"].shape[1],
        "contrastive_dim": state["rec_head.query_projection.weight"].shape[0],
    }
    return AdapterConfig(**inferred | fixed)
