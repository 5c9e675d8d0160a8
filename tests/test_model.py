import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.backbones.loading import load_stable_diffusion
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.checkpoint.released import adapter_key
from dpt.config import AdapterConfig
from dpt.lora import ADAPTER_NAME, lora_key
from dpt.model import DPT
from dpt.tasks import LossWeights, all_tasks
from dpt.tasks.task import TRUE_PAIR, Task
from tests.test_adapter import load_golden_adapter

GOLDEN_LOSSES = {
    "loss_itm_i2t": "loss_contrastive_i2t",
    "loss_itm_t2i": "loss_contrastive_t2i",
    "loss_ce": "loss_ce",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_contrastive_align": "loss_contrastive_align",
    "loss_denoise": "loss_mse",
}


def golden_step(golden, stage):
    """The model and batch of a golden training step."""
    arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / f"train_stage{stage}.npz").items()}
    sd = load_stable_diffusion(str(golden / "sd21"))
    if stage == 1:
        adapter, blocks, _ = load_golden_adapter(golden, "up1", sd.denoiser.config)
    else:
        options = json.loads((golden / "adapter_up1.args.json").read_text())
        given = {"num_queries_itm": options["num_queries_matching"], "nheads": options["nheads"]}
        checkpoint = load_checkpoint(golden / "stage2_pytorch_model.bin", **given)
        adapter, blocks = checkpoint.adapter, checkpoint.attach(sd).blocks
        for name, parameter in sd.denoiser.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    adapter.requires_grad_(True)
    described = json.loads((golden / "loss_criterion_multi.targets.json").read_text())[:2]
    tokenizer = AutoTokenizer.from_pretrained(golden / "roberta")
    encoding = tokenizer([d["caption"] for d in described], padding="longest", return_tensors="pt")
    roberta = AutoModel.from_pretrained(golden / "roberta", dtype=torch.float32).eval()
    with torch.no_grad():
        token_states = roberta(**encoding).last_hidden_state
    sizes = [len(d["boxes"]) for d in described]
    maps, boxes = arrays["positive_map"].split(sizes), arrays["boxes"].split(sizes)
    targets = [
        {"boxes": b, "positive_map": m, "token_mask": m[:, : token_states.shape[1]] > 0}
        for b, m in zip(boxes, maps, strict=True)
    ]
    batch = {
        "noisy_latents": torch.stack([arrays["noisy"], arrays["noisy_neg"], arrays["noisy_rand"]], dim=1),
        "timesteps": arrays["t"],
        "caption_context": torch.stack([arrays["ctx_global"], arrays["ctx_neg"], arrays["ctx_rand"]], dim=1),
        "caption_pooled": torch.stack([arrays["pooled_global"], arrays["pooled_neg"], arrays["pooled_rand"]], dim=1),
        "expression_context": arrays["ctx_local"],
        "targets": targets,
        "token_states": token_states,
        "noise_target": arrays["noise"],
    }
    return arrays, batch, DPT(sd.denoiser, adapter, blocks, sd.scheduler, train_denoiser=stage == 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_golden_training_step(golden, stage):
    arrays, batch, model = golden_step(golden, stage)
    losses = model(batch)
    expected = {name: arrays[theirs].item() for name, theirs in GOLDEN_LOSSES.items() if theirs in arrays}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name
    total = model.weights.total(losses)
    assert total.item() == pytest.approx(arrays["total"].item(), rel=1e-5)
    total.backward()
    found = {name: p.grad for name, p in model.adapter.named_parameters()}
    found |= {
        name.replace(f".{ADAPTER_NAME}.", "."): p.grad
        for name, p in model.denoiser.named_parameters()
        if p.requires_grad
    }
    gradients = {
        lora_key(k) or adapter_key(k): v for k, v in load_file(golden / f"train_stage{stage}_grads.safetensors").items()
    }
    assert found.keys() == gradients.keys()
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        tolerance = 1e-4 * gradient.abs().max().item() + 1e-7 * largest
        assert torch.allclose(found[name], gradient, rtol=0, atol=tolerance), name
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    assert norm.item() == pytest.approx(arrays["grad_norm"].item(), rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.05)])
def test_golden_training_step_in_half_precision(golden, dtype, tolerance):
    """Frozen weights in half precision under autocast, as on a GPU; LoRA and its gradients are float32."""
    arrays, batch, model = golden_step(golden, 2)
    for module in model.denoiser.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
    with torch.autocast("cpu", dtype):
        losses = model(batch)
    assert all(value.dtype == torch.float32 for value in losses.values())
    for name, theirs in GOLDEN_LOSSES.items():
        assert losses[name].item() == pytest.approx(arrays[theirs].item(), rel=tolerance, abs=tolerance), name
    (model.weights.total(losses) * 2**10).backward()
    gradients = [p.grad for p in [*model.denoiser.parameters(), *model.adapter.parameters()] if p.requires_grad]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_probe_leaves_no_graph_in_the_unet(golden):
    _, batch, model = golden_step(golden, 1)
    model.denoiser.requires_grad_(True)
    sum(model(batch).values()).backward()
    assert all(p.grad is None for p in model.denoiser.parameters())


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        (LossWeights(ce=0, bbox=0, giou=0, contrastive_align=0), {"loss_itm_i2t", "loss_itm_t2i", "loss_denoise"}),
        (LossWeights(itm_i2t=0, itm_t2i=0, contrastive_align=0), {"loss_ce", "loss_bbox", "loss_giou", "loss_denoise"}),
        (LossWeights(itm_i2t=0, denoise=0, ce=0, bbox=0, giou=0, contrastive_align=0), {"loss_itm_t2i"}),
    ],
)
def test_weights_of_zero_switch_losses_off_and_leave_the_others(golden, weights, names):
    _, batch, model = golden_step(golden, 2)
    everything = model(batch)
    model.weights = weights
    some = model(batch)
    assert some.keys() == names
    for name in names:
        assert some[name].item() == pytest.approx(everything[name].item(), rel=1e-5)


class MeanQuery(Task):
    """A third task, as one would add it."""

    name, losses, passes, figures = "mean", ("mean",), (TRUE_PAIR,), ()

    def head(self, config):
        return torch.nn.Linear(config.hidden_dim, 1)

    def loss(self, adapter, hs, inputs):
        return {"loss_mean": adapter.mean_head(hs[TRUE_PAIR][-1]).mean()}


def test_a_further_task_has_a_head_and_a_loss_and_leaves_the_others(golden, monkeypatch):
    _, batch, model = golden_step(golden, 1)
    before, paper = model.eval()(batch), all_tasks()
    monkeypatch.setattr("dpt.tasks.all_tasks", lambda *args, **options: (*paper, MeanQuery()))
    adapter = DiscriminativeAdapter(replace(model.adapter.config, heads=["itm", "rec", "mean"]))
    found = adapter.load_state_dict(model.adapter.state_dict(), strict=False)
    assert found.missing_keys == ["mean_head.weight", "mean_head.bias"]
    more = DPT(model.denoiser, adapter, model.blocks, model.scheduler, train_denoiser=False)
    more.weights.mean = 1.0
    losses = more.eval()(batch)
    assert losses.pop("loss_mean").isfinite()
    assert losses.keys() == before.keys()
    for name, value in before.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("heads", [["itm", "rec", "another"], ["itm"], []])
def test_heads_that_there_are_not_are_refused(heads):
    with pytest.raises(ValueError, match=r"adapter\.heads is .* itm"):
        DiscriminativeAdapter(AdapterConfig(heads=heads))


def test_golden_text_encoders_and_autoencoder(golden):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / "text_vae.npz").items()}
    sd = load_stable_diffusion(str(golden / "sd21"))
    prompts = json.loads((golden / "prompts.json").read_text())
    for suffix, texts in (("", prompts), ("_uncond", [""])):
        context, pooled = sd.encode_prompts(texts)
        tokens = sd.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(tokens, arrays[f"clip{suffix}_ids"])
        assert torch.allclose(context, arrays[f"clip{suffix}_last"], rtol=1e-5, atol=2e-5)
        assert torch.allclose(pooled, arrays[f"clip{suffix}_pooled"], rtol=1e-5, atol=2e-5)
    posterior = sd.vae.encode(arrays["vae_in"]).latent_dist
    decoded = sd.vae.decode(arrays["vae_lat"]).sample
    for found, name in ((posterior.mean, "vae_mean"), (posterior.logvar, "vae_logvar"), (decoded, "vae_dec")):
        expected = arrays[name]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()), name
    tokenizer = AutoTokenizer.from_pretrained(golden / "roberta")
    captions = json.loads((golden / "captions.json").read_text())
    for texts in (captions, prompts):
        encoding = tokenizer(texts, padding="longest", return_tensors="pt")
        if encoding.input_ids.shape == arrays["rob_ids"].shape:
            break
    assert torch.equal(encoding.input_ids, arrays["rob_ids"])
    roberta = AutoModel.from_pretrained(golden / "roberta", dtype=torch.float32).eval()
    states = roberta(**encoding).last_hidden_state
    mask = arrays["rob_mask"].bool()
    assert torch.allclose(states[mask], arrays["rob_last"][mask], rtol=1e-5, atol=2e-5)
