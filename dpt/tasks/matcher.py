"""Bipartite matching of REC queries and boxes (DETR; MDETR's soft-token cost)."""

import torch

from dpt.boxes import cxcywh_to_xyxy, generalized_box_iou


@torch.no_grad()
def hungarian_matcher(
    outputs: dict[str, torch.Tensor],
    targets: list[dict],
    *,
    cost_class: float = 1.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cheapest assignment of queries to boxes, image by image.

    Args:
        outputs: `pred_logits` (B, Q, 256) and `pred_boxes` (B, Q, 4) normalised cxcywh.
        targets: one an image, with `boxes` (N, 4) normalised cxcywh and `positive_map` (N, 256).

    Returns:
        One pair an image: indices of queries and of boxes, int64 (min(Q, N),) each.
    """
    from scipy.optimize import linear_sum_assignment  # its import takes a third of a second

    probabilities = outputs["pred_logits"].float().softmax(-1)
    boxes = outputs["pred_boxes"].float()
    indices = []
    for probability, box, target in zip(probabilities, boxes, targets, strict=True):
        cost = (
            cost_class * -(probability @ target["positive_map"].to(probability).T)
            + cost_bbox * torch.cdist(box, target["boxes"].to(box), p=1)
            + cost_giou * -generalized_box_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target["boxes"].to(box)))
        )  # (Q, N)
        cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)  # the losses, not scipy, tell of what is not finite
        queries, matched = linear_sum_assignment(cost.cpu().numpy())
        indices.append((torch.from_numpy(queries).to(box.device), torch.from_numpy(matched).to(box.device)))
    return indices
