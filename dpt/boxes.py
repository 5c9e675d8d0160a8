"""Boxes: `cxcywh` is (centre x, centre y, width, height), `xyxy` two corners.

By torchvision, which is imported where it is needed: that takes a second.

Shapes: N and M boxes.
"""

import torch


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) to (..., 4)."""
    from torchvision.ops import box_convert

    return box_convert(boxes, "cxcywh", "xyxy")


def box_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of xyxy boxes (N, 4) and (M, 4): (N, M)."""
    from torchvision.ops import box_iou as of

    return of(first, second)


def generalized_box_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of xyxy boxes (N, 4) and (M, 4): (N, M)."""
    from torchvision.ops import generalized_box_iou as of

    return of(first, second)
