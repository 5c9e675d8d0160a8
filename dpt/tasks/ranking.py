"""Ranking half-drawn pictures of one prompt by the matching score, so that the score can choose early.

Shapes: G prompts, N pictures of each, P pooled text width.
"""

import torch
import torch.nn.functional as F

from dpt.metrics import area_within_prompts


def ranking_loss(scores: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Pairwise logistic loss (RankNet, Burges et al. 2005): the better of two pictures shall have the higher score.

    Args:
        scores: matching scores of the half-drawn pictures, (G, N).
        values: a judge's values of the finished pictures, (G, N); pairs of equal value do not count.
        scale: exp(logit_scale).

    Returns:
        The mean over prompts of the mean over their pairs, in float32; prompts without a pair do not count.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.float() * scale.float()
        better = (values[:, :, None] > values[:, None]).float()  # (G, N, N)
        losses = F.softplus(scores[:, None] - scores[:, :, None])
        pairs = better.sum((1, 2))
        return ((losses * better).sum((1, 2)) / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


def ranking_areas(scores: torch.Tensor, values: torch.Tensor) -> list[float]:
    """The metric: the area under the curve of each prompt that has pictures of different value.

    Args:
        scores, values: (G, N).
    """
    return area_within_prompts(scores.double().cpu().numpy(), values.double().cpu().numpy()).tolist()
