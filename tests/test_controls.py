import pytest
import torch

from dpt.backbones.loading import load_stable_diffusion
from dpt.data.collate import collate, encode_batch
from dpt.rec_text import load_rec_text_encoder
from dpt.training.controls import control_batch, control_inputs, control_unet
from tests.test_collate import make


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture(scope="module")
def batch():
    return collate([make(k) for k in range(12)])


def inputs_of(sd, batch, control, *, training=True):
    batch = control_batch(control, batch, sd)
    inputs = encode_batch(batch, sd, load_rec_text_encoder("clip", sd, with_model=False), seed=0)
    return control_inputs(control, inputs, batch, sd, training=training)


def test_what_each_control_takes_away(sd, batch):
    plain = inputs_of(sd, batch, "none")
    empty = sd.encode_prompts([""])[0]
    texts = ("caption_context", "expression_context", "caption_pooled")
    for control, context_gone, pooled_gone in (
        ("empty_prompt", True, False),
        ("constant_text", False, True),
        ("text_blind", True, True),
        ("image_blind", False, False),
    ):
        inputs = inputs_of(sd, batch, control)
        for name in texts[:2]:
            assert torch.equal(inputs[name], empty.expand_as(inputs[name]) if context_gone else plain[name]), control
        assert (inputs["caption_pooled"].std() == 0) == pooled_gone
        blind = control == "image_blind"
        assert torch.equal(inputs["noisy_latents"], plain["noisy_latents"]) != blind
        if blind:  # nothing but the noise, the same for all three
            assert torch.equal(inputs["noisy_latents"][:, 0], inputs["noisy_latents"][:, 1])
        assert "itm_labels" not in inputs


def test_shuffled_labels_are_chance_once_for_each_sample(sd, batch):
    plain, shuffled = inputs_of(sd, batch, "none"), inputs_of(sd, batch, "shuffled_labels")
    assert set(shuffled["itm_labels"].flatten().tolist()) == {0, 1, 2}
    later = collate([make(k) for k in range(12)][::-1], [3] * 12)
    assert torch.equal(inputs_of(sd, later, "shuffled_labels")["itm_labels"].flip(0), shuffled["itm_labels"])
    for true, target in zip(plain["targets"], shuffled["targets"], strict=True):
        assert torch.equal(true["boxes"][:, 2:], target["boxes"][:, 2:])
        assert not torch.equal(true["boxes"], target["boxes"])
    assert "itm_labels" not in inputs_of(sd, batch, "shuffled_labels", training=False)


def test_a_random_unet_is_another_one_and_always_the_same():
    unets = []
    for control in ("none", "random_unet", "random_unet"):
        sd = load_stable_diffusion("shapes")
        control_unet(control, sd)
        unets.append(sd.denoiser.state_dict())
    assert all(torch.equal(value, unets[2][name]) for name, value in unets[1].items())
    assert not torch.equal(unets[0]["conv_in.weight"], unets[1]["conv_in.weight"])
