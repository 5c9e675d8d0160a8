"""The discriminative adapter (Qu et al. 2024, section 3.2): a DETR-style reader of denoiser features.

Its heads are those of the tasks in `dpt.tasks`.

Shapes: B batch, Q queries (those for ITM first, then those for REC), D width, H W map, P pooled text width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dpt.adapter.embeddings import LearnedPositionEmbedding, SinePositionEmbedding, TimestepEmbedder
from dpt.adapter.transformer import Transformer
from dpt.config import AdapterConfig
from dpt.tasks import tasks_of


class FeatureFusion(nn.Module):
    """Sums feature maps, each behind its own 1x1 convolution and resized (nearest) to one size."""

    def __init__(self, in_channels: list[int], dim: int, size: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(channels, dim, 1) for channels in in_channels)
        self.size = size

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C_k, H_k, W_k) to (B, dim, size, size)."""
        maps = [projection(feature) for projection, feature in zip(self.projections, features, strict=True)]
        return torch.stack([F.interpolate(x, (self.size, self.size), mode="nearest") for x in maps]).sum(0)


class DiscriminativeAdapter(nn.Module):
    """Reads denoiser features with learned queries: the first ones are for ITM, the others for REC."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_dim
        self.fusion = FeatureFusion(config.in_channels, config.fusion_dim, config.fusion_size) if config.fuse else None
        for name, value in (("feature_mean", 0.0), ("feature_std", 1.0)):
            if config.normalize_features:
                self.register_buffer(name, torch.full((sum(config.in_channels),), value))
        self.input_proj = nn.Conv2d(config.fusion_dim if config.fuse else sum(config.in_channels), dim, 1)
        learned = config.position_embedding == "learned"
        self.position_embedding = LearnedPositionEmbedding(dim) if learned else SinePositionEmbedding(dim)
        self.timestep_embedder = TimestepEmbedder(dim)
        self.transformer = Transformer(
            dim=dim,
            nheads=config.nheads,
            enc_layers=config.enc_layers,
            dec_layers=config.dec_layers,
            dim_feedforward=config.dim_feedforward,
            dropout=config.dropout,
            pre_norm=config.pre_norm,
            value_positions=config.value_positions,
        )
        self.query_embed = nn.Embedding(config.num_queries_itm + config.num_queries_rec, dim)
        for task in tasks_of(config):
            self.add_module(f"{task.name}_head", task.head(config))

    def forward(self, features: list[torch.Tensor], timesteps: torch.Tensor) -> torch.Tensor:
        """Outputs of all queries after each decoder layer, (layers, B, Q, D).

        Args:
            features: the denoiser's maps, (B, C_k, H_k, W_k) each; concatenated ones are resized to the first's size.
            timesteps: (B,) or a scalar.
        """
        if self.config.normalize_features:
            sizes = self.config.in_channels
            moments = zip(self.feature_mean.split(sizes), self.feature_std.split(sizes), strict=True)
            features = [
                (feature - mean[:, None, None]) / std[:, None, None]
                for feature, (mean, std) in zip(features, moments, strict=True)
            ]
        if self.fusion is not None:
            feature = self.fusion(features)
        else:
            size = features[0].shape[-2:]
            feature = torch.cat([F.interpolate(x, size, mode="nearest") for x in features], dim=1)
        src = self.input_proj(feature)  # (B, D, H, W)
        time_embed = self.timestep_embedder(timesteps.expand(len(src)))  # (B, D)
        pos_embed = self.position_embedding(src).to(src.dtype) + time_embed[:, :, None, None]
        hs, _ = self.transformer(src, pos_embed, self.query_embed.weight)
        return hs

    @torch.no_grad()
    def measure_features(self, features: list[torch.Tensor]) -> None:
        """Stores mean and deviation of each channel of maps (B, C_k, H_k, W_k), for `normalize_features`."""
        flat = [feature.float().transpose(0, 1).flatten(1) for feature in features]  # (C_k, B * H * W)
        self.feature_mean.copy_(torch.cat([x.mean(1) for x in flat]))
        self.feature_std.copy_(torch.cat([x.std(1) for x in flat]) + 1e-6)

    def itm_embeddings(self, hs: torch.Tensor, layer: int = -1) -> torch.Tensor:
        """Query embeddings to compare with pooled texts, (B, num_queries_itm, P).

        Args:
            hs: as returned by `forward`.
            layer: the decoder layer that is read; the reference reads the first (0).
        """
        return self.itm_head(hs[layer][:, : self.config.num_queries_itm])

    def rec_outputs(self, hs: torch.Tensor, layer: int = -1) -> dict[str, torch.Tensor]:
        """Outputs of `RecHead` for the REC queries after a decoder layer, by default the last."""
        return self.rec_head(hs[layer][:, self.config.num_queries_itm :])


@dataclass(frozen=True)
class Scorer:
    """An adapter, the blocks that it reads, and the decoder layer that ITM reads: enough to score noisy latents."""

    adapter: DiscriminativeAdapter
    blocks: tuple[str, ...]
    """of the denoiser; see `dpt.backbones.blocks`"""
    itm_layer: int = -1
    """the decoder layer that ITM reads"""
