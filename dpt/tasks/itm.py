"""Image-text matching (Qu et al. 2024, equations 3 and 4): does a text describe a picture?

Shapes: B batch, Q queries, D width, P pooled text width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from dpt.config import AdapterConfig
from dpt.tasks.task import TRUE_PAIR, Pass, Task

TEXTS = (TRUE_PAIR, Pass(0, 1), Pass(0, 2))
IMAGES = (TRUE_PAIR, Pass(1, 0), Pass(2, 0))


class ItmHead(nn.Module):
    """Query outputs in the space of the pooled text, and a learned temperature."""

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, text_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """(..., Q, D) to (..., Q, P)."""
        return self.projection(queries)


def itm_score(itm_embeddings: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> torch.Tensor:
    """s(z_t, y): the largest cosine between a query and the pooled text, (B,) float32.

    Args:
        itm_embeddings: (B, Q, P); pooled_prompt_embeds: (B, P).
    """
    with torch.autocast(itm_embeddings.device.type, enabled=False):  # half precision would tie scores of minimal edits
        queries, text = (F.normalize(x.float(), dim=-1) for x in (itm_embeddings, pooled_prompt_embeds))
        return torch.einsum("bqp,bp->bq", queries, text).amax(1)


def itm_loss(
    i2t_embeddings: torch.Tensor,
    i2t_texts: torch.Tensor,
    t2i_embeddings: torch.Tensor,
    t2i_texts: torch.Tensor,
    scale: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Two three-way cross-entropies, in float32; in both, candidate 0 is the true pair.

    Args:
        i2t_embeddings: query embeddings of the image conditioned on each of its captions, (B, 3, Q, P).
        i2t_texts: pooled text of those captions, (B, 3, P).
        t2i_embeddings: query embeddings of each image conditioned on the caption, (B, 3, Q, P).
        t2i_texts: pooled text of that caption, (B, P).
        scale: exp(logit_scale).
        labels: (B, 2), for a control: the candidate that counts as the true pair instead, by text and by image.

    Returns:
        `loss_itm_i2t` and `loss_itm_t2i`.
    """
    with torch.autocast(i2t_embeddings.device.type, enabled=False):
        i2t = itm_score(i2t_embeddings.flatten(0, 1).float(), i2t_texts.flatten(0, 1).float())
        texts = t2i_texts[:, None].expand(-1, t2i_embeddings.shape[1], -1)
        t2i = itm_score(t2i_embeddings.flatten(0, 1).float(), texts.flatten(0, 1).float())
        if labels is None:
            labels = torch.zeros((len(i2t_texts), 2), dtype=torch.long, device=i2t.device)
        return {
            name: F.cross_entropy(scale.float() * scores.view(len(label), -1), label)
            for name, scores, label in zip(("loss_itm_i2t", "loss_itm_t2i"), (i2t, t2i), labels.unbind(1), strict=True)
        }


def wins(ahead: torch.Tensor) -> torch.Tensor:
    """1 where the truth is ahead, 0 where it is behind, one half for a tie."""
    return (ahead > 0) + 0.5 * (ahead == 0)


class ImageTextMatching(Task):
    """The task: find an image's text among three texts, and a text's image among three images.

    Args:
        layer: the decoder layer that is read; the reference reads the first (0).
    """

    name = "itm"
    losses = ("itm_i2t", "itm_t2i")
    passes = tuple({*TEXTS, *IMAGES})
    measured = (TRUE_PAIR, Pass(0, 1), Pass(1, 0))
    figures = ("text", "image")

    def __init__(self, layer: int = -1):
        self.layer = layer

    def head(self, config: AdapterConfig) -> ItmHead:
        return ItmHead(config.hidden_dim, config.text_dim)

    def loss(self, adapter, hs, inputs):
        pooled = inputs["caption_pooled"]  # (B, 3, P)

        def embeddings(passes):
            return torch.stack([adapter.itm_embeddings(hs[p], self.layer) for p in passes], dim=1)  # (B, 3, Q, P)

        scale = adapter.itm_head.logit_scale.exp()
        return itm_loss(embeddings(TEXTS), pooled, embeddings(IMAGES), pooled[:, 0], scale, inputs.get("itm_labels"))

    def scores(self, adapter, hs, inputs) -> torch.Tensor:
        """Matching scores of the measured passes, (B, 3)."""
        pooled = inputs["caption_pooled"]
        scores = [itm_score(adapter.itm_embeddings(hs[p], self.layer), pooled[:, p.text]) for p in self.measured]
        return torch.stack(scores, dim=1)

    def records(self, adapter, hs, inputs, samples):
        """Whether the truth beats the hard-negative text and image, and the kind of the negative."""
        scores = self.scores(adapter, hs, inputs)
        won = wins(scores[:, :1] - scores[:, 1:])
        return [
            {"text": text, "image": image, "kind": sample.negative_kind}
            for (text, image), sample in zip(won.tolist(), samples, strict=True)
        ]
