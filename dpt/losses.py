"""The losses of probing and tuning: image-text matching, referring expressions, denoising. All in float32.

Every loss returns a dict of named scalars.

Shapes: B batch, Q queries, N boxes, L text tokens, P pooled width, K contrastive width.
"""

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin

from dpt.adapter import itm_score
from dpt.boxes import cxcywh_to_xyxy, generalized_box_iou
from dpt.matcher import hungarian_matcher

Indices = list[tuple[torch.Tensor, torch.Tensor]]


def itm_loss(
    i2t_embeddings: torch.Tensor,
    i2t_texts: torch.Tensor,
    t2i_embeddings: torch.Tensor,
    t2i_texts: torch.Tensor,
    scale: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Two three-way cross-entropies; in both, candidate 0 is the true pair.

    Args:
        i2t_embeddings: query embeddings of the image conditioned on each of its captions, (B, 3, Q, P).
        i2t_texts: pooled text of those captions, (B, 3, P).
        t2i_embeddings: query embeddings of each image conditioned on the caption, (B, 3, Q, P).
        t2i_texts: pooled text of that caption, (B, P).
        scale: exp(logit_scale).
        labels: (B, 2), for a control: which candidate counts as the true pair instead, by text and by image.
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


def ranking_loss(scores: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Pairwise logistic loss (RankNet, Burges et al. 2005): of two pictures the better is to have the higher score.

    Args:
        scores: matching scores of N half-drawn pictures of each of G prompts, (G, N).
        values: what a judge says of the finished pictures, (G, N); pairs of equal value do not count.
        scale: exp(logit_scale).

    Returns:
        The mean over prompts of the mean over their pairs; prompts without a pair do not count.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.float() * scale.float()
        better = (values[:, :, None] > values[:, None]).float()  # (G, N, N)
        losses = F.softplus(scores[:, None] - scores[:, :, None])
        pairs = better.sum((1, 2))
        return ((losses * better).sum((1, 2)) / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


def rec_losses(
    outputs: dict[str, torch.Tensor],
    targets: list[dict],
    *,
    proj_tokens: torch.Tensor | None = None,
    token_valid: torch.Tensor | None = None,
    num_boxes: float | torch.Tensor | None = None,
    eos_coef: float = 0.1,
    temperature: float = 0.07,
    matcher_costs: dict[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """MDETR's losses between matched queries and boxes.

    Args:
        outputs: as `RecHead` returns them.
        targets: one an image: `boxes` (N, 4) normalised cxcywh, `positive_map` (N, 256); with `proj_tokens` also
            `token_mask` (N, L) bool, the tokens that each box's phrase covers. N may be 0.
        proj_tokens: unit token vectors, (B, L, K); without them there is no contrastive alignment.
        token_valid: tokens that are not padding, (B, L) bool. Without it padding counts as wrong tokens, as in the
            reference, and the loss of a sample depends on the longest expression of its batch.
        num_boxes: what the sums are divided by, at least 1; by default the boxes of this batch.

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou`, and `loss_contrastive_align`.
    """
    with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
        outputs = {name: value.float() for name, value in outputs.items()}
        indices = hungarian_matcher(outputs, targets, **(matcher_costs or {}))
        if num_boxes is None:
            num_boxes = max(1, sum(len(target["boxes"]) for target in targets))
        losses = {"loss_ce": _soft_token_loss(outputs["pred_logits"], targets, indices, eos_coef) / num_boxes}
        rows, queries, boxes = _matched(indices, [target["boxes"] for target in targets])
        predicted = outputs["pred_boxes"][rows, queries]
        boxes = boxes.to(predicted)
        losses["loss_bbox"] = F.l1_loss(predicted, boxes, reduction="sum") / num_boxes
        giou = generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes)).diagonal()
        losses["loss_giou"] = (1 - giou).sum() / num_boxes
        if proj_tokens is not None:
            matches = _matched(indices, [target["token_mask"] for target in targets])
            total = _contrastive_alignment(
                outputs["proj_queries"], proj_tokens.float(), matches, token_valid, temperature
            )
            losses["loss_contrastive_align"] = total / num_boxes
        return losses


def _matched(indices: Indices, values: list[torch.Tensor]):
    """Image and query index of every match, and its target's value."""
    rows = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(indices)])
    queries = torch.cat([queries for queries, _ in indices])
    return rows, queries, torch.cat([v.to(rows.device)[n] for v, (_, n) in zip(values, indices, strict=True)])


def _soft_token_loss(pred_logits, targets, indices, eos_coef):
    """Cross-entropy with the positive map as soft target; unmatched queries say "no object" at weight `eos_coef`."""
    rows, queries, positive_map = _matched(indices, [target["positive_map"] for target in targets])
    target = torch.zeros_like(pred_logits)
    target[..., -1] = 1
    target[rows, queries] = positive_map.to(target)
    weight = torch.full(pred_logits.shape[:2], eos_coef, device=pred_logits.device)
    weight[rows, queries] = 1
    return -(weight * (target * pred_logits.log_softmax(-1)).sum(-1)).sum()


def _contrastive_alignment(proj_queries, proj_tokens, matches, token_valid, temperature):
    """InfoNCE between matched queries and the tokens of their phrases, both ways, averaged."""
    rows, queries, token_mask = matches
    logits = proj_queries @ proj_tokens.mT / temperature  # (B, Q, L)
    if token_valid is not None:
        logits = logits.masked_fill(~token_valid[:, None], torch.finfo(logits.dtype).min)
    positive = torch.zeros_like(logits, dtype=torch.bool)
    positive[rows, queries] = token_mask[:, : logits.shape[-1]]
    total = 0.0
    for dim in (2, 1):  # over a query's tokens, over a token's queries
        count = positive.sum(dim)
        mean = logits.masked_fill(~positive, 0).sum(dim) / (count + 1e-6)
        total = total + ((logits.logsumexp(dim) - mean) * (count > 0)).sum() / 2
    return total


def denoising_loss(
    noise_pred: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: SchedulerMixin,
    *,
    snr_gamma: float | None = None,
) -> dict[str, torch.Tensor]:
    """Mean squared error to the noise or velocity, (B, C, h, w) each; with `snr_gamma`, min-SNR weights (Hang 2023)."""
    squared = (noise_pred.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if snr_gamma is not None:
        snr = signal_to_noise_ratio(scheduler, timesteps)
        divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
        squared = squared * snr.clamp(max=snr_gamma) / divisor
    return {"loss_denoise": squared.mean()}


def signal_to_noise_ratio(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """alpha_bar / (1 - alpha_bar) at the timesteps, (B,)."""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)
