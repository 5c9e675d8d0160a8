"""Position and timestep embeddings of the adapter.

Shapes: B batch, D width, (H, W) feature map.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SinePositionEmbedding(nn.Module):
    """DETR's 2-D sine embedding: the row in the first half of the channels, the column in the second.

    Positions count from 1 and are normalised to 2 pi at the last row or column; temperature 10000.
    """

    def __init__(self, dim: int, temperature: float = 10_000.0):
        super().__init__()
        self.dim, self.temperature = dim, temperature

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        """The embedding for a map (B, D, H, W): (1, D, H, W) float32."""
        height, width = src.shape[-2:]
        rows = self._axis(height, src.device)[:, :, None].expand(-1, -1, width)  # (D/2, H, W)
        columns = self._axis(width, src.device)[:, None, :].expand(-1, height, -1)
        return torch.cat([rows, columns])[None]

    def _axis(self, length, device):
        half = self.dim // 2
        positions = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        positions = positions / (length + 1e-6) * 2 * math.pi
        index = torch.arange(half, dtype=torch.float32, device=device)
        angles = positions / self.temperature ** (2 * (index[:, None] // 2) / half)  # (D/2, length)
        even = (torch.arange(half, device=device) % 2 == 0)[:, None]
        return torch.where(even, angles.sin(), angles.cos())


class LearnedPositionEmbedding(nn.Module):
    """DETR's learned embedding: the column in the first half of the channels, the row in the second; 50 of each."""

    def __init__(self, dim: int, size: int = 50):
        super().__init__()
        self.row_embed, self.col_embed = nn.Embedding(size, dim // 2), nn.Embedding(size, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        """The embedding for a map (B, D, H, W): (1, D, H, W).

        Raises:
            ValueError: a map larger than the table.
        """
        height, width = src.shape[-2:]
        if max(height, width) > self.row_embed.num_embeddings:
            raise ValueError(
                f"the feature map is {height}x{width}; learned positions reach "
                f"{self.row_embed.num_embeddings}: use sine"
            )
        columns = self.col_embed.weight[:width].T[:, None, :].expand(-1, height, -1)
        rows = self.row_embed.weight[:height].T[:, :, None].expand(-1, -1, width)
        return torch.cat([columns, rows])[None]


class TimestepEmbedder(nn.Module):
    """Sinusoidal timesteps of width D (cosine first, no shift), then linear D -> 4D, SiLU, linear 4D -> D.

    The same values as diffusers' `Timesteps` followed by `TimestepEmbedding`.
    """

    def __init__(self, dim: int, temperature: float = 10_000.0):
        super().__init__()
        self.dim, self.temperature = dim, temperature
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(dim, 4 * dim)})
        nn.Linear(4 * dim, 4 * dim)  # drawn and dropped, as ever: the same seed gives the same adapter
        self.time_embedding["linear_2"] = nn.Linear(4 * dim, dim)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) to (B, D)."""
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(-math.log(self.temperature) * steps / half)[None]
        first, second = self.time_embedding.values()
        return second(F.silu(first(torch.cat([angles.cos(), angles.sin()], dim=1).to(first.weight.dtype))))
