import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from transformers import AutoTokenizer

from dpt.tasks.denoising import denoising_loss, signal_to_noise_ratio
from dpt.tasks.itm import itm_loss
from dpt.tasks.matcher import hungarian_matcher
from dpt.tasks.rec import positive_map, rec_losses, token_mask

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_contrastive_align": 1.0}


def load(golden, name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / f"{name}.npz").items()}


def rec_case(golden, case):
    """Outputs (with gradients), targets and arrays of a golden criterion file."""
    arrays = load(golden, f"loss_criterion_{case}")
    described = json.loads((golden / f"loss_criterion_{case}.targets.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(golden / "roberta")
    encoding = tokenizer([d["caption"] for d in described], padding="longest", return_tensors="pt")
    num_tokens = arrays["proj_tokens"].shape[1]
    names = ("pred_logits", "pred_boxes", "proj_queries", "proj_tokens")
    outputs = {name: arrays[name].clone().requires_grad_() for name in names}
    maps = arrays["positive_map"].split(arrays["sizes"].tolist())
    targets = []
    for b, d in enumerate(described):
        masks = [token_mask(encoding, b, spans, num_tokens) for spans in d["tokens_positive"]]
        masks = torch.stack(masks) if masks else torch.zeros(0, num_tokens, dtype=torch.bool)
        boxes = torch.tensor(d["boxes"]).view(-1, 4)
        targets.append({"boxes": boxes, "positive_map": maps[b], "token_mask": masks})
    return arrays, outputs, targets


def compute(outputs, targets, **options):
    heads = {name: outputs[name] for name in ("pred_logits", "pred_boxes", "proj_queries")}
    return rec_losses(heads, targets, proj_tokens=outputs["proj_tokens"], **options)


@pytest.mark.parametrize("case", ["one", "multi", "empty", "space"])
def test_golden_rec_losses_and_gradients(golden, case):
    arrays, outputs, targets = rec_case(golden, case)
    indices = hungarian_matcher({k: outputs[k] for k in ("pred_logits", "pred_boxes")}, targets)
    batch = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(indices)])
    assert torch.equal(batch, arrays["match_batch"])
    assert torch.equal(torch.cat([q for q, _ in indices]), arrays["match_src"])
    assert torch.equal(torch.cat([n for _, n in indices]), arrays["match_tgt"])
    losses = compute(outputs, targets)
    fixed = json.loads((golden / "loss_contrastive_align_fixed.json").read_text())[case]
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert losses[name].item() == pytest.approx(arrays[name].item(), rel=1e-5), name
    assert losses["loss_contrastive_align"].item() == pytest.approx(fixed["batch_index_fixed"], rel=1e-5)
    # where a span begins or ends on a blank the reference reads another text's tokens; we don't
    assert (fixed["published"] == fixed["batch_index_fixed"]) == (case != "space")
    total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
    if case != "space":
        assert total.item() == pytest.approx(arrays["total"].item(), rel=1e-5)
    total.backward()
    checked = ["pred_logits", "pred_boxes"] + (["proj_queries", "proj_tokens"] if case != "space" else [])
    for name in checked:
        expected = arrays[f"grad_{name}"]
        assert torch.allclose(outputs[name].grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item()), name


def slipped_mask(encoding, index, spans, length):
    """The reference's token look-up: beside a blank it looks on in the batch's first text."""
    mask = torch.zeros(length, dtype=torch.bool)
    for begin, end in spans:
        first = [encoding.char_to_token(index, begin), *(encoding.char_to_token(begin + k) for k in (1, 2))]
        last = [encoding.char_to_token(index, end - 1), *(encoding.char_to_token(end - k) for k in (2, 3))]
        first, last = (next(t for t in tokens if t is not None) for tokens in (first, last))
        mask[first : last + 1] = True
    return mask


def test_golden_token_lookup_with_the_reference_s_slip(golden):
    """With its masks the losses are the published ones to the digit, gradients included."""
    arrays, outputs, targets = rec_case(golden, "space")
    described = json.loads((golden / "loss_criterion_space.targets.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(golden / "roberta")
    encoding = tokenizer([d["caption"] for d in described], padding="longest", return_tensors="pt")
    for b, (d, target) in enumerate(zip(described, targets, strict=True)):
        masks = [slipped_mask(encoding, b, spans, target["token_mask"].shape[1]) for spans in d["tokens_positive"]]
        target["token_mask"] = torch.stack(masks) if masks else target["token_mask"]
    losses = compute(outputs, targets)
    assert losses["loss_contrastive_align"].item() == pytest.approx(arrays["loss_contrastive_align"].item(), rel=1e-5)
    total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
    assert total.item() == pytest.approx(arrays["total"].item(), rel=1e-5)
    total.backward()
    for name in ("pred_logits", "pred_boxes", "proj_queries", "proj_tokens"):
        expected = arrays[f"grad_{name}"]
        assert torch.allclose(outputs[name].grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item()), name


@pytest.mark.parametrize("case", ["one", "multi", "empty"])
def test_golden_positive_maps_in_both_modes(golden, case):
    arrays, _, targets = rec_case(golden, case)
    masks = torch.cat([target["token_mask"] for target in targets])
    assert torch.equal(positive_map(masks, normalize=False), arrays["positive_map"])
    assert torch.allclose(positive_map(masks), arrays["positive_map_normalised"], rtol=1e-5)


def test_normalised_maps_change_the_loss_only_where_phrases_have_several_tokens(golden):
    _, outputs, targets = rec_case(golden, "multi")
    plain = compute(outputs, targets)["loss_ce"]
    for target in targets:
        target["positive_map"] = positive_map(target["token_mask"])
    assert compute(outputs, targets)["loss_ce"] < plain


def half_precision_error(loss, scale):
    """How far a three-way cross-entropy that is computed in half precision may lie from the exact one.

    Half's unit roundoff is u = 2^-11. A logit is scale x cosine: both factors and the product are rounded, so it is off
    by 3 u scale at most. The loss moves by |softmax - one-hot|_1 = 2 (1 - p) times that, and over a batch the mean of
    1 - p is at most 1 - exp(-loss), p = exp(-loss) being convex. The sum of exponentials, rounded too, moves its
    logarithm by u, and the loss itself is rounded by u loss.
    """
    return 2**-11 * (6 * scale * (1 - math.exp(-loss)) + 1 + loss)


def test_the_half_precision_error_bounds_losses_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(500, 3, 3, generator=generator) * 1.6 - 0.8
    cosines[:, :, 0] += torch.rand(500, 1, generator=generator)  # losses from 0.0001 to 8
    scale, labels = torch.tensor(1 / 0.07), torch.zeros(3, dtype=torch.long)
    for one in cosines.clamp(-1, 1):
        exact = torch.nn.functional.cross_entropy(scale * one, labels).item()
        rounded = torch.nn.functional.cross_entropy(scale.half() * one.half(), labels).item()
        assert abs(exact - rounded) < half_precision_error(exact, scale.item())
    assert abs(0.0786 - 0.0788) < half_precision_error(0.0786, scale.item())  # other arrays of the reference
    assert half_precision_error(0.0786, scale.item()) < 0.05 * 0.0786


def test_golden_itm_losses(golden):
    arrays = load(golden, "loss_contrastive")
    losses = itm_loss(
        arrays["img_cond_different_txt"],
        arrays["all_txt"],
        arrays["different_img_cond_same_txt"],
        arrays["all_txt"][:, 0],
        arrays["logit_scale"],
    )
    assert losses["loss_itm_i2t"].item() == pytest.approx(arrays["i2t"].item(), rel=1e-5)
    assert losses["loss_itm_t2i"].item() == pytest.approx(arrays["t2i"].item(), rel=1e-5)
    for name, key in (("loss_itm_i2t", "i2t_published_half"), ("loss_itm_t2i", "t2i_published_half")):
        ours, published = losses[name].item(), arrays[key].item()
        assert ours != published  # we don't round
        assert abs(ours - published) < half_precision_error(ours, arrays["logit_scale"].item()), name
    texts = arrays["all_txt"]
    for embeddings, pooled, key in (
        (arrays["img_cond_different_txt"], texts, "i2t_max_ids"),
        (arrays["different_img_cond_same_txt"], texts[:, :1].expand_as(texts), "t2i_max_ids"),
    ):
        queries, text = (torch.nn.functional.normalize(x, dim=-1) for x in (embeddings, pooled))
        chosen = torch.einsum("bkqp,bkp->bkq", queries, text).argmax(-1)
        assert torch.equal(chosen.flatten(), arrays[key].flatten().long()), key


def test_golden_denoising_loss(golden):
    arrays = load(golden, "loss_mse")
    scheduler = DDIMScheduler.from_pretrained(golden / "sd21/scheduler")
    assert torch.allclose(scheduler.alphas_cumprod, arrays["alphas_cumprod"])
    assert torch.allclose(signal_to_noise_ratio(scheduler, arrays["t"]), arrays["snr"])
    noisy = scheduler.add_noise(arrays["pred"], arrays["noise"], arrays["t"])
    assert torch.allclose(noisy, arrays["add_noise"], rtol=1e-5, atol=1e-6)
    inputs = (arrays["pred"], arrays["noise"], arrays["t"], scheduler)
    assert denoising_loss(*inputs)["loss_denoise"].item() == pytest.approx(arrays["mse"].item(), rel=1e-5)
    weighted = denoising_loss(*inputs, snr_gamma=5.0)["loss_denoise"].item()
    assert weighted == pytest.approx(arrays["mse_snr5"].item(), rel=1e-5)


def test_min_snr_of_velocities_divides_by_snr_plus_one():
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    pred, target, timesteps = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.tensor([1, 300, 600, 990])
    snr = signal_to_noise_ratio(scheduler, timesteps)
    expected = ((pred - target).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean()
    result = denoising_loss(pred, target, timesteps, scheduler, snr_gamma=5.0)["loss_denoise"]
    assert torch.allclose(result, expected)


def test_no_boxes_at_all_still_has_finite_gradients():
    outputs = {
        "pred_logits": torch.randn(2, 5, 256, requires_grad=True),
        "pred_boxes": torch.rand(2, 5, 4, requires_grad=True),
        "proj_queries": torch.randn(2, 5, 8, requires_grad=True),
    }
    empty = {
        "boxes": torch.zeros(0, 4),
        "positive_map": torch.zeros(0, 256),
        "token_mask": torch.zeros(0, 6, dtype=torch.bool),
    }
    losses = rec_losses(outputs, [empty, empty], proj_tokens=torch.randn(2, 6, 8))
    assert losses["loss_bbox"] == losses["loss_giou"] == losses["loss_contrastive_align"] == 0
    assert losses["loss_ce"] > 0
    sum(losses.values()).backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in outputs.values())


def test_losses_are_float32_under_autocast_and_half_inputs():
    embeddings, texts = torch.randn(2, 3, 4, 8).half(), torch.randn(2, 3, 8).half()
    with torch.autocast("cpu", torch.bfloat16):
        losses = itm_loss(embeddings, texts, embeddings, texts[:, 0], torch.tensor(14.3))
    assert all(value.dtype == torch.float32 for value in losses.values())
    expected = itm_loss(embeddings.float(), texts.float(), embeddings.float(), texts[:, 0].float(), torch.tensor(14.3))
    assert losses["loss_itm_i2t"].item() == pytest.approx(expected["loss_itm_i2t"].item(), rel=1e-6)
    heads = {"pred_logits": torch.randn(1, 5, 256), "pred_boxes": torch.rand(1, 5, 4) * 0.3 + 0.3}
    heads["proj_queries"] = torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1)
    mask = torch.arange(6)[None] == 1
    target = {"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "positive_map": positive_map(mask), "token_mask": mask}
    tokens = torch.nn.functional.normalize(torch.randn(1, 6, 8), dim=-1)
    halves = {name: value.bfloat16() for name, value in heads.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = rec_losses(halves, [target], proj_tokens=tokens.bfloat16())
        scheduler = DDIMScheduler()
        noise = torch.randn(2, 4, 8, 8)
        found |= denoising_loss(noise.bfloat16(), noise, torch.tensor([3, 900]), scheduler, snr_gamma=5.0)
    assert all(value.dtype == torch.float32 for value in found.values())
    rounded = {name: value.float() for name, value in halves.items()}
    expected = rec_losses(rounded, [target], proj_tokens=tokens.bfloat16().float())
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_true_pairs_first_have_a_small_itm_loss():
    texts = torch.eye(8)[None, :3]
    right = texts[:, :, None].expand(1, 3, 2, 8).clone()
    right[0, 1:] = -right[0, 1:]
    losses = itm_loss(right, texts, right, texts[:, 0], torch.tensor(100.0))
    assert losses["loss_itm_i2t"] < 1e-6
    assert itm_loss(-right, texts, right, texts[:, 0], torch.tensor(100.0))["loss_itm_i2t"] > 50


def test_padding_is_left_out_of_alignment():
    """A sample's loss alone equals its loss beside a longer expression, unless padding is asked for."""
    torch.manual_seed(0)
    outputs = {"pred_logits": torch.randn(1, 5, 256), "pred_boxes": torch.rand(1, 5, 4) * 0.3 + 0.3}
    outputs["proj_queries"] = torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1)
    tokens = torch.nn.functional.normalize(torch.randn(1, 9, 8), dim=-1)
    valid = torch.arange(9)[None] < 4
    mask, positive = torch.arange(9)[None] == 1, torch.zeros(1, 256)
    target = [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "positive_map": positive, "token_mask": mask}]
    alone = rec_losses(outputs, [target[0] | {"token_mask": mask[:, :4]}], proj_tokens=tokens[:, :4])
    padded = rec_losses(outputs, target, proj_tokens=tokens, token_valid=valid)
    counted = rec_losses(outputs, target, proj_tokens=tokens)
    name = "loss_contrastive_align"
    torch.testing.assert_close(padded[name], alone[name])
    assert counted[name] > alone[name] + 0.01
