"""DETR's encoder and decoder (Carion et al., 2020), batch first.

Positions are added to attention's queries and keys, and to its values only in a decoder with `value_positions`; queries
start at zero and their embeddings are added like positions. Norms follow each part (DETR) or, with `pre_norm`, precede
it.

Shapes: B batch, S = H * W map cells, Q queries, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

PLAIN_LENGTH = 1024


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float):
        super().__init__(
            nn.Linear(dim, dim_feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim_feedforward, dim)
        )


def attend(attention: nn.MultiheadAttention, query, key, value) -> torch.Tensor:
    """Attention by the fused kernel.

    With gradients on a CPU by plain products, up to `PLAIN_LENGTH` cells: on 96 maps of 2 x 2 to 16 x 16 cells, width
    128, bf16, an adapter's step was measured to take 0.4 to 0.7 of the time then.
    """
    if query.device.type != "cpu" or not torch.is_grad_enabled() or key.shape[1] > PLAIN_LENGTH:
        return attention(query, key, value, need_weights=False)[0]
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (  # (B, heads, length, D / heads)
        F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    scores = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    scores = F.dropout(scores, attention.dropout, attention.training)
    return attention.out_proj((scores @ value).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention over the map, then a feed-forward part."""

    def __init__(self, dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.feed_forward = FeedForward(dim, dim_feedforward, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, src: torch.Tensor, pos_embed: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (B, S, D); `pos_embed` is (B, S, D)."""
        if self.pre_norm:
            x = self.norm1(src)
            src = src + self.dropout(attend(self.self_attn, x + pos_embed, x + pos_embed, x))
            return src + self.dropout(self.feed_forward(self.norm2(src)))
        src = self.norm1(src + self.dropout(attend(self.self_attn, src + pos_embed, src + pos_embed, src)))
        return self.norm2(src + self.dropout(self.feed_forward(src)))


class DecoderLayer(nn.Module):
    """Self-attention over the queries, attention to the map, then a feed-forward part."""

    def __init__(
        self, dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool, value_positions: bool
    ):
        super().__init__()
        self.value_positions = value_positions
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.feed_forward = FeedForward(dim, dim_feedforward, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, tgt, memory, pos_embed, query_embed) -> torch.Tensor:
        """(B, Q, D) to (B, Q, D); `memory` and `pos_embed` are (B, S, D), `query_embed` (B, Q, D)."""
        key = memory + pos_embed
        value = key if self.value_positions else memory
        if self.pre_norm:
            x = self.norm1(tgt)
            tgt = tgt + self.dropout(attend(self.self_attn, x + query_embed, x + query_embed, x))
            tgt = tgt + self.dropout(attend(self.cross_attn, self.norm2(tgt) + query_embed, key, value))
            return tgt + self.dropout(self.feed_forward(self.norm3(tgt)))
        tgt = self.norm1(tgt + self.dropout(attend(self.self_attn, tgt + query_embed, tgt + query_embed, tgt)))
        tgt = self.norm2(tgt + self.dropout(attend(self.cross_attn, tgt + query_embed, key, value)))
        return self.norm3(tgt + self.dropout(self.feed_forward(tgt)))


class Transformer(nn.Module):
    """Encoder over a feature map, decoder from queries."""

    def __init__(
        self,
        *,
        dim: int = 256,
        nheads: int = 8,
        enc_layers: int = 1,
        dec_layers: int = 1,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
        value_positions: bool = False,
    ):
        super().__init__()
        settings = (dim, nheads, dim_feedforward, dropout, pre_norm)
        self.encoder_layers = nn.ModuleList(EncoderLayer(*settings) for _ in range(enc_layers))
        self.encoder_norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        self.decoder_layers = nn.ModuleList(DecoderLayer(*settings, value_positions) for _ in range(dec_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src, pos_embed, query_embed) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes a map.

        Args:
            src: (B, D, H, W); pos_embed: the same shape; query_embed: (Q, D).

        Returns:
            hs: outputs of all decoder layers, (layers, B, Q, D); memory: the encoded map, (B, S, D).
        """
        memory, pos_embed = src.flatten(2).mT, pos_embed.flatten(2).mT  # (B, S, D)
        for layer in self.encoder_layers:
            memory = layer(memory, pos_embed)
        memory = self.encoder_norm(memory)
        query_embed = query_embed.expand(len(memory), -1, -1)  # (B, Q, D)
        tgt, hs = torch.zeros_like(query_embed), []
        for layer in self.decoder_layers:
            tgt = layer(tgt, memory, pos_embed, query_embed)
            hs.append(self.decoder_norm(tgt))
        return torch.stack(hs), memory
