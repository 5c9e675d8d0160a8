"""Boxes: formats and overlaps. `cxcywh` is (centre x, centre y, width, height), `xyxy` two corners."""

import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

__all__ = ["box_iou", "cxcywh_to_xyxy", "generalized_box_iou", "xywh_to_cxcywh", "xyxy_to_cxcywh"]


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) to (..., 4)."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes_xyxy: torch.Tensor) -> torch.Tensor:
    """(..., 4) to (..., 4)."""
    return box_convert(boxes_xyxy, "xyxy", "cxcywh")


def xywh_to_cxcywh(boxes_xywh: torch.Tensor) -> torch.Tensor:
    """COCO's (left, top, width, height) to cxcywh, (..., 4)."""
    return box_convert(boxes_xywh, "xywh", "cxcywh")
