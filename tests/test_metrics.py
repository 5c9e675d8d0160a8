import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from dpt.boxes import box_iou, cxcywh_to_xyxy
from dpt.metrics import bootstrap_interval
from dpt.tasks.rec import objectness, rec_hits


def test_golden_rec_precision(golden):
    arrays = np.load(golden / "rec_eval.npz")
    logits, boxes = torch.from_numpy(arrays["pred_logits"]), torch.from_numpy(arrays["pred_boxes"])
    sizes = torch.from_numpy(arrays["orig_size"])  # height, width
    scale = sizes.flip(1).repeat(1, 2).float()  # (N, 4) for x, y, x, y
    assert torch.allclose(objectness(logits), torch.from_numpy(arrays["scores"]), rtol=1e-5)
    absolute = cxcywh_to_xyxy(boxes) * scale[:, None]
    assert torch.allclose(absolute, torch.from_numpy(arrays["boxes"]), rtol=1e-5, atol=1e-3)
    xywh = torch.from_numpy(arrays["gt_xywh"]).float()
    # absolute pixels or normalised boxes: generalised IoU differs unless both are on one scale
    truth = torch.cat([xywh[:, :2] + xywh[:, 2:] / 2, xywh[:, 2:]], dim=1) / scale
    for name, generalized in (("giou", True), ("iou", False)):
        hits = rec_hits(logits, boxes, truth, generalized=generalized).double().numpy()
        for dataset in ("refcoco", "refcoco+", "refcocog"):
            assert np.allclose(hits[arrays["dataset"] == dataset].mean(0), arrays[f"prec_{name}_{dataset}"])


def test_iou_agrees_with_pycocotools():
    rng = np.random.default_rng(0)
    xywh = rng.uniform(0, 50, (2, 20, 4))
    theirs = coco_mask.iou(xywh[0], xywh[1], np.zeros(20))
    xyxy = [torch.from_numpy(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1)) for b in xywh]
    assert np.allclose(box_iou(*xyxy).numpy(), theirs)


def test_interval_of_clusters_is_wider():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.random(50) < 0.4, 8).astype(float)
    mean, low, high = bootstrap_interval(values)
    clustered = bootstrap_interval(values, np.repeat(np.arange(50), 8))
    assert mean == clustered[0] == values.mean()
    assert clustered[2] - clustered[1] > 2 * (high - low)
    assert low < mean < high
    assert bootstrap_interval(values) == (mean, low, high)
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])
