import pytest
import torch

from dpt.backbones.loading import load_stable_diffusion
from dpt.config import LossSettings
from dpt.data.collate import Sample, as_latents, collate, encode_batch, sample_generator
from dpt.rec_text import load_rec_text_encoder
from dpt.tasks.rec import ReferringExpressions, positive_map


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture(scope="module")
def rec_text(sd):
    return load_rec_text_encoder("clip", sd, with_model=True)


def make(sample_id, *, pixels=False, boxes=1):
    generator = torch.Generator().manual_seed(sample_id)
    shape = (3, 3, 128, 128) if pixels else (3, 4, 16, 16)
    return Sample(
        sample_id,
        torch.rand(shape, generator=generator) * 2 - 1,
        ("a red circle", "a blue circle", "two green stars"),
        "the star above the red circle",
        torch.rand(boxes, 4, generator=generator),
        [[(0, 8)]] * boxes,
    )


def test_latents_may_be_drawn_from_the_posterior(sd, rec_text):
    """By (seed, sample, epoch) alone; timesteps and noise are those without it, and cached latents stay."""

    def latents(sample_ids, seed=1, epoch=0, **options):
        batch = collate([make(k, pixels=True) for k in sample_ids], [epoch] * len(sample_ids))
        inputs = encode_batch(batch, sd, rec_text, seed=seed, timesteps=(0, 0), **options)
        return inputs["noisy_latents"][-1], inputs["noise_target"][-1]

    mean, drawn = latents([4, 9]), latents([4, 9], posterior=True)
    assert torch.equal(mean[1], drawn[1])
    assert not torch.allclose(mean[0], drawn[0], atol=1e-4)
    torch.testing.assert_close(latents([9], posterior=True)[0], drawn[0], atol=1e-4, rtol=1e-4)
    for other in (latents([9], posterior=True, epoch=1), latents([9], posterior=True, seed=2)):
        assert not torch.allclose(other[0], drawn[0], atol=1e-4)
    cached = collate([make(4)])
    assert as_latents(cached.images, sd, [torch.Generator()]) is cached.images


def test_a_sample_s_numbers_do_not_depend_on_its_batch(sd, rec_text):
    together = encode_batch(collate([make(4), make(9)]), sd, rec_text, seed=1)
    alone = encode_batch(collate([make(9)]), sd, rec_text, seed=1)
    for name in ("noisy_latents", "timesteps", "noise_target", "caption_context", "token_states"):
        assert torch.allclose(together[name][1:], alone[name], atol=1e-5), name
    assert not torch.equal(together["noise_target"][0], together["noise_target"][1])
    other_epoch = encode_batch(collate([make(9)], [1]), sd, rec_text, seed=1)
    assert not torch.equal(other_epoch["noise_target"], alone["noise_target"])


def test_the_three_images_share_noise_and_timestep(sd, rec_text):
    sample = make(3)
    inputs = encode_batch(collate([sample]), sd, rec_text, seed=0)
    alpha = sd.scheduler.alphas_cumprod[inputs["timesteps"]].sqrt().view(-1, 1, 1, 1)
    for k in range(3):
        noise = (inputs["noisy_latents"][:, k] - alpha * sample.images[k]) / (1 - alpha**2).sqrt()
        assert torch.allclose(noise, inputs["noise_target"], atol=1e-4)


def test_pixels_become_the_latents_they_encode_to(sd, rec_text):
    sample = make(5, pixels=True)
    inputs = encode_batch(collate([sample]), sd, rec_text, seed=0, timesteps=(0, 0))
    latents = sd.encode_images(sample.images)
    assert inputs["noisy_latents"].shape == (1, 3, 4, 16, 16)
    assert (inputs["noisy_latents"][0] - latents).abs().max() < 0.3  # almost no noise at t = 0


def test_options(sd, rec_text):
    batch = collate([make(k) for k in range(20)])
    window = encode_batch(batch, sd, rec_text, seed=0, timesteps=(100, 120))["timesteps"]
    assert window.min() >= 100
    assert window.max() <= 120
    assert len(window.unique()) > 5
    plain = encode_batch(batch, sd, rec_text, seed=0)
    offset = encode_batch(batch, sd, rec_text, seed=0, noise_offset=0.5)
    difference = offset["noise_target"] - plain["noise_target"]
    assert difference.std() > 0.3
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6)
    no_model = load_rec_text_encoder("clip", sd, with_model=False)
    assert "token_states" not in encode_batch(batch, sd, no_model, seed=0)


def test_targets(sd, rec_text):
    batch = collate([make(1, boxes=2), make(2, boxes=0)])
    inputs = encode_batch(batch, sd, rec_text, seed=0)
    assert inputs["num_boxes"] == 2
    first, second = inputs["targets"]
    assert first["token_mask"].sum(1).tolist() == [2, 2]
    assert torch.allclose(first["positive_map"].sum(1), torch.ones(2))
    assert second["boxes"].shape == (0, 4)
    assert second["positive_map"].shape == (0, 256)
    plain = encode_batch(
        batch, sd, rec_text, seed=0, tasks=[ReferringExpressions(LossSettings(normalize_positive_map=False))]
    )["targets"][0]
    assert plain["positive_map"].sum(1).tolist() == [2, 2]


def test_long_expressions_keep_the_no_object_slot_free():
    assert positive_map(torch.ones(1, 400, dtype=torch.bool), normalize=False)[0, -1] == 0


def test_streams_of_random_numbers_are_independent():
    """What is drawn of a sample tells nothing of the noise that it is trained under."""
    draws = {p: torch.randn(1000, generator=sample_generator(0, 5, 1, p)) for p in ("noise", "draw")}
    for shift in range(-3, 4):
        a, b = draws["noise"], draws["draw"].roll(shift)
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.15


def test_equal_texts_are_encoded_once(sd, rec_text, monkeypatch):
    rows = []
    forward = type(sd.text_encoder).forward
    monkeypatch.setattr(
        type(sd.text_encoder),
        "forward",
        lambda self, input_ids, **kwargs: rows.append(len(input_ids)) or forward(self, input_ids, **kwargs),
    )
    encode_batch(collate([make(k) for k in range(5)]), sd, rec_text, seed=0)
    assert rows == [4, 1]  # three captions and an expression; the expression once more for REC
