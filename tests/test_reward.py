"""Reward: LoRA that raises the matching score of the model's own half-drawn pictures."""

import json

import pytest
import torch

import train_tune
from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import recommended
from dpt.config import AdapterConfig
from dpt.data.collate import Batch, sample_generator
from dpt.lora import add_lora
from dpt.matching_score import matching_score
from dpt.sampling import ClassifierFreeGuidance, sample
from dpt.schedulers import make_scheduler, set_timesteps
from dpt.tasks.reward import reward_inputs, reward_loss

CAPTIONS = ["a red circle", "two green stars"]
SAMPLING = recommended("shapes").changed(num_inference_steps=6)


@pytest.fixture
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture
def scorer(sd):
    torch.manual_seed(0)
    width = sd.pooled_width
    config = AdapterConfig(in_channels=[128], hidden_dim=32, nheads=4, text_dim=width, rec_text_dim=width, dropout=0.5)
    return Scorer(DiscriminativeAdapter(config).requires_grad_(False).train(), ("up1",))


def batch_of(captions, epoch=0):
    empty = [[] for _ in captions]
    triples = [(caption, "", "") for caption in captions]
    boxes, texts = [torch.zeros(0, 4) for _ in captions], list(captions)
    return Batch([3, 4], torch.zeros(2, 3, 4, 16, 16), triples, texts, boxes, empty, texts, [epoch] * 2)


def inputs_of(sd, epoch=0, until=0.5):
    return reward_inputs(batch_of(CAPTIONS, epoch), sd, SAMPLING, until=until, seed=0)


def test_pictures_are_those_of_their_samples_noise(sd, scorer):
    own = inputs_of(sd)
    generators = [sample_generator(0, number, 0, "reward") for number in (3, 4)]
    noise = torch.stack([torch.randn(sd.latent_shape(), generator=generator) for generator in generators])
    assert torch.equal(own["noise"], noise)
    assert {inputs_of(sd, epoch)["step"] for epoch in range(20)} == {0, 1, 2}
    assert {inputs_of(sd, epoch, until=0.01)["step"] for epoch in range(5)} == {0}
    assert max(inputs_of(sd, epoch, until=0.99)["step"] for epoch in range(40)) == 4  # behind the last step is no other

    add_lora(sd.denoiser, rank=2, alpha=2.0)  # its update is 0 yet
    loss = reward_loss(sd.denoiser, scorer, sd.scheduler, **own | {"step": 2})["loss_reward"]
    scheduler = make_scheduler(sd.scheduler, "ddim")
    set_timesteps(scheduler, 6, "cpu")
    guidance = ClassifierFreeGuidance(
        sd.denoiser, scheduler, own["conditioning"], own["negative"], guidance_scale=SAMPLING.guidance_scale
    )
    latents = sample(guidance, scheduler, noise, steps=range(3))
    scorer.adapter.eval()  # as the loss reads it
    with torch.no_grad():
        score = matching_score(sd.denoiser, scorer, latents, scheduler.timesteps[3], own["conditioning"])
    assert loss.item() == pytest.approx(1 - score.mean().item(), abs=1e-5)


def test_gradients_reach_lora_alone_and_raise_the_score(sd, scorer):
    add_lora(sd.denoiser, rank=2, alpha=2.0)
    own = inputs_of(sd) | {"step": 2}
    parameters = [parameter for parameter in sd.denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(6):
        loss = reward_loss(sd.denoiser, scorer, sd.scheduler, **own)["loss_reward"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in parameters)
    assert all(parameter.grad is None for parameter in scorer.adapter.parameters())
    assert losses[-1] < losses[0] - 0.002
    assert scorer.adapter.training  # as it was


def test_features_cannot_please_the_score(sd, scorer):
    """Whatever LoRA does, the score of given latents is that of the model without it."""
    own = inputs_of(sd, until=0.01)
    add_lora(sd.denoiser, rank=2, alpha=2.0)
    with torch.no_grad():
        for parameter in sd.denoiser.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        changed = reward_loss(sd.denoiser, scorer, sd.scheduler, **own)["loss_reward"]
    scheduler = make_scheduler(sd.scheduler, "ddim")
    set_timesteps(scheduler, 6, "cpu")
    guidance = ClassifierFreeGuidance(
        sd.denoiser, scheduler, own["conditioning"], own["negative"], guidance_scale=SAMPLING.guidance_scale
    )
    latents = sample(guidance, scheduler, own["noise"], steps=range(1))  # with LoRA
    plain = load_stable_diffusion("shapes").denoiser
    scorer.adapter.eval()
    with torch.no_grad():
        score = matching_score(plain, scorer, latents, scheduler.timesteps[1], own["conditioning"])
    assert changed.item() == pytest.approx(1 - score.mean().item(), abs=1e-5)


SETTINGS = [
    *("configs/shapes/reward.yaml", "init_from=ckpt/shapes-dpt/verifier", "optim.batch_size=2", "optim.steps=2"),
    *(
        "validation.num_samples=2",
        "validation.timesteps=[500]",
        "data.num_samples=4",
        "log_every=1",
        "optim.mixed_precision=no",
    ),
]


def test_from_the_command_line(tmp_path):
    assert train_tune.main([*SETTINGS, f"output_folder={tmp_path}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss_reward"] for row in rows if "loss_denoise" in row]
    assert len(losses) == 2
    assert all(0 < loss < 2 for loss in losses)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["lora.only=false"], "loss.weights.reward is set; an adapter that is trained would please itself"),
        (["model.gradient_checkpointing=true"], "model.gradient_checkpointing is true"),
        (["control=empty_prompt"], "control is 'empty_prompt'; loss.weights.reward draws pictures"),
        (["loss.reward_until=0"], "loss.reward_until is 0"),
        (["loss.weights.reward=-1"], "loss.weights.reward is -1"),
    ],
)
def test_settings_that_do_not_go_together(more, message, tmp_path, capsys):
    assert train_tune.main([*SETTINGS, f"output_folder={tmp_path}", *more]) == 2
    assert message in capsys.readouterr().err
