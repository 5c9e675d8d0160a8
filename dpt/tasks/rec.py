"""Referring expressions (Qu et al. 2024, section 3.2; MDETR's heads and losses): find the box that a phrase refers to.

Shapes: B batch, Q queries, D width, N boxes, L text tokens, R width of the REC text encoder, K contrastive width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from dpt.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from dpt.config import AdapterConfig, LossSettings
from dpt.tasks.matcher import hungarian_matcher
from dpt.tasks.task import EXPRESSION, Task

if TYPE_CHECKING:
    from transformers import BatchEncoding

NUM_TOKEN_SLOTS = 255  # the classes are the expression's token positions, and one for "no object"
KS = (1, 5, 10)
Indices = list[tuple[torch.Tensor, torch.Tensor]]


class RecHead(nn.Module):
    """Referring expressions: token-slot logits, boxes, and a space shared with the expression's token states."""

    def __init__(self, dim: int, rec_text_dim: int, contrastive_dim: int):
        super().__init__()
        self.class_embed = nn.Linear(dim, NUM_TOKEN_SLOTS + 1)
        self.bbox_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4)
        )
        self.query_projection = nn.Linear(dim, contrastive_dim)
        self.token_projection = nn.Linear(rec_text_dim, contrastive_dim)

    def forward(self, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, Q, D) to `pred_logits` (B, Q, 256), `pred_boxes` (B, Q, 4) cxcywh in [0, 1], `proj_queries` (B, Q, K)."""
        return {
            "pred_logits": self.class_embed(queries),
            "pred_boxes": self.bbox_embed(queries).sigmoid(),
            "proj_queries": F.normalize(self.query_projection(queries), dim=-1),
        }

    def project_tokens(self, token_states: torch.Tensor) -> torch.Tensor:
        """Token states (B, L, R) to unit vectors (B, L, K)."""
        return F.normalize(self.token_projection(token_states), dim=-1)


def token_mask(encoding: BatchEncoding, index: int, spans: list[tuple[int, int]], length: int) -> torch.Tensor:
    """The tokens that character spans of text `index` cover, (length,) bool.

    A span that begins or ends on a blank is narrowed to the words inside (the reference looks them up in another text
    of the batch then).

    Args:
        encoding: of a fast tokenizer.
        spans: [begin, end) pairs of characters.
        length: of the mask; tokens beyond it are left out.
    """
    mask = torch.zeros(length, dtype=torch.bool)
    for begin, end in spans:
        tokens = [encoding.char_to_token(index, character) for character in range(begin, end)]
        tokens = [token for token in tokens if token is not None and token < length]
        if tokens:
            mask[min(tokens) : max(tokens) + 1] = True
    return mask


def positive_map(masks: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    """Class targets of boxes, (N, 256), of their token masks (N, T).

    Args:
        normalize: rows sum to one, as in MDETR; without it they are 0/1, as in the reference's training.
    """
    slots = torch.zeros(len(masks), NUM_TOKEN_SLOTS + 1)
    width = min(masks.shape[1], NUM_TOKEN_SLOTS)
    slots[:, :width] = masks[:, :width].float()
    return slots / (slots.sum(1, keepdim=True) + 1e-6) if normalize else slots


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
        num_boxes: divisor of the sums, at least 1; by default the number of this batch's boxes.

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


def objectness(pred_logits: torch.Tensor) -> torch.Tensor:
    """1 - P(no object), by which REC's boxes are ranked: (..., 256) to (...)."""
    return 1 - pred_logits.float().softmax(-1)[..., -1]


def rec_hits(
    pred_logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    boxes: torch.Tensor,
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    generalized: bool = False,
) -> torch.Tensor:
    """Whether one of the k surest boxes overlaps the true one by at least 0.5, (N, len(ks)) bool.

    Args:
        pred_logits: (N, Q, 256); pred_boxes: (N, Q, 4) normalised cxcywh.
        boxes: one true box an expression, (N, 4) normalised cxcywh.
        generalized: threshold the generalised IoU, as the reference does, instead of the IoU.
    """
    overlap = generalized_box_iou if generalized else box_iou
    order = objectness(pred_logits).argsort(dim=1, descending=True)
    hits = []
    for ranking, predicted, box in zip(order, pred_boxes.float(), boxes.to(pred_boxes), strict=True):
        overlaps = overlap(cxcywh_to_xyxy(box[None].float()), cxcywh_to_xyxy(predicted[ranking]))[0]
        hits.append(torch.stack([(overlaps[:k] >= 0.5).any() for k in ks]))
    return torch.stack(hits)


class ReferringExpressions(Task):
    """The task: find the boxes of an expression, which is the denoiser's prompt.

    Args:
        loss: settings of the losses and targets; by default the paper's.
    """

    name = "rec"
    losses = ("ce", "bbox", "giou", "contrastive_align")
    passes = measured = (EXPRESSION,)
    figures = tuple(f"{name}_at_{k}" for name in ("precision", "giou_precision") for k in KS)

    def __init__(self, loss: LossSettings | None = None):
        self.settings = loss or LossSettings()

    def head(self, config: AdapterConfig) -> RecHead:
        return RecHead(config.hidden_dim, config.rec_text_dim, config.contrastive_dim)

    def takes(self, sample) -> bool:
        return len(sample.boxes) > 0

    def targets(self, batch, rec_text, device):
        """`targets` and, where the text encoder has a model, `token_states` and `token_valid`, as `rec_losses` has."""
        encoding = rec_text.tokenize(batch.expressions)
        length, inputs = encoding.input_ids.shape[1], {"targets": []}
        if rec_text.model is not None:
            inputs["token_states"] = rec_text.encode(encoding)
            if not self.settings.align_to_padding:
                inputs["token_valid"] = encoding.attention_mask.bool().to(device)
        for k, (boxes, spans) in enumerate(zip(batch.boxes, batch.tokens_positive, strict=True)):
            masks = torch.zeros(len(boxes), length, dtype=torch.bool)
            for n, box_spans in enumerate(spans):
                masks[n] = token_mask(encoding, k, box_spans, length)
            classes = positive_map(masks, normalize=self.settings.normalize_positive_map)
            target = {"boxes": boxes.float(), "positive_map": classes, "token_mask": masks}
            inputs["targets"].append({name: value.to(device) for name, value in target.items()})
        return inputs

    def loss(self, adapter, hs, inputs):
        settings, hs = self.settings, hs[EXPRESSION]
        proj_tokens = None
        if "token_states" in inputs:
            proj_tokens = adapter.rec_head.project_tokens(inputs["token_states"])
        layers = [
            rec_losses(
                adapter.rec_outputs(hs, layer),
                inputs["targets"],
                proj_tokens=proj_tokens,
                token_valid=inputs.get("token_valid"),
                num_boxes=inputs.get("num_boxes"),
                eos_coef=settings.eos_coef,
                temperature=settings.temperature,
                matcher_costs={n: getattr(settings, n) for n in ("cost_class", "cost_bbox", "cost_giou")},
            )
            for layer in (range(len(hs)) if settings.auxiliary else [-1])
        ]
        return {name: sum(losses[name] for losses in layers) for name in layers[0]}

    def records(self, adapter, hs, inputs, samples):
        """Whether one of the k surest boxes hits, by IoU and generalised IoU, and the surest: objectness and cxcywh."""
        outputs = adapter.rec_outputs(hs[EXPRESSION])
        logits, boxes = outputs["pred_logits"].float().cpu(), outputs["pred_boxes"].float().cpu()
        truth = torch.stack([sample.boxes[0] for sample in samples])
        records = [{} for _ in samples]
        for name, generalized in (("precision", False), ("giou_precision", True)):
            hits = rec_hits(logits, boxes, truth, ks=KS, generalized=generalized)
            for record, row in zip(records, hits, strict=True):
                record |= {f"{name}_at_{k}": hit for k, hit in zip(KS, row.tolist(), strict=True)}
        for record, sureness, found in zip(records, objectness(logits), boxes, strict=True):
            best = sureness.argmax()
            record["surest"] = [round(value, 3) for value in (sureness[best].item(), *found[best].tolist())]
        return records
