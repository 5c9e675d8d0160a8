"""Boxes: `cxcywh` is (centre x, centre y, width, height), `xyxy` two corners."""

import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

__all__ = ["box_iou", "cxcywh_to_xyxy", "generalized_box_iou"]


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) to (..., 4)."""
    return box_convert(boxes, "cxcywh", "xyxy")
