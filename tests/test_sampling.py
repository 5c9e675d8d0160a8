import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import CKPT_FOLDER
from dpt.drawing import Artist
from dpt.sampling import ClassifierFreeGuidance, initial_noise, sample
from dpt.sampling_settings import Sampling
from dpt.schedulers import set_timesteps

PROMPTS = ["a red circle", "two blue stars above a green square"]


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture(scope="module")
def stock(sd):
    """Of the very same modules: equal weights elsewhere in memory give other last bits, which guidance amplifies."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        CKPT_FOLDER / "shapes", unet=sd.denoiser, text_encoder=sd.text_encoder, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("negative", [None, "a yellow cross"])
def test_latents_equal_the_stock_pipeline(sd, stock, guidance_scale, negative):
    noise = initial_noise([3, 4], sd.latent_shape())
    context, negative_context = stock.encode_prompt(PROMPTS, "cpu", 1, True, [negative or ""] * 2)
    torch.testing.assert_close(sd.encode_prompts(PROMPTS)[0], context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sd.encode_prompts([negative or ""] * 2)[0], negative_context, atol=1e-5, rtol=1e-5)
    expected = stock(
        PROMPTS,
        negative_prompt=[negative] * 2 if negative else None,
        latents=noise,
        guidance_scale=guidance_scale,
        num_inference_steps=8,
        output_type="latent",
    ).images
    texts = Conditioning(context), Conditioning(negative_context)
    denoise = ClassifierFreeGuidance(sd.denoiser, sd.scheduler, *texts, guidance_scale=guidance_scale)
    set_timesteps(sd.scheduler, 8, "cpu")
    latents = sample(denoise, sd.scheduler, noise)
    assert (latents - expected).abs().max() < 1e-4


def test_noise_belongs_to_the_seed():
    shape = (4, 16, 16)
    both = initial_noise([7, 8], shape)
    assert torch.equal(both[1], initial_noise([8], shape)[0])
    assert both.dtype == torch.float32
    assert not torch.equal(both[0], both[1])


def test_the_loop_reports_every_step_and_keeps_no_graph(sd):
    steps = []
    weight = torch.ones(1, requires_grad=True)
    set_timesteps(sd.scheduler, 5, "cpu")
    latents = sample(
        lambda latents, timestep, step: (latents * weight, latents),
        sd.scheduler,
        initial_noise([1], (4, 16, 16)),
        on_step=lambda step, latents: steps.append((step, tuple(latents.shape))),
    )
    assert steps == [(k, (1, 4, 16, 16)) for k in range(5)]
    assert not latents.requires_grad


def test_the_loop_stops_when_told_and_goes_along_the_scheduler_s_timesteps(sd):
    seen, noise = [], initial_noise([1], (4, 16, 16))
    sd.scheduler.set_timesteps(5)
    latents = sample(
        lambda latents, timestep, step: (latents, latents),
        sd.scheduler,
        noise,
        step_options={"eta": 0.5, "generator": torch.Generator().manual_seed(0)},
        on_step=lambda step, latents: seen.append(latents),
        stop=lambda: len(seen) == 2,
    )
    assert len(seen) == 2
    assert torch.equal(latents, seen[-1])
    scheduler = EulerDiscreteScheduler.from_config(sd.scheduler.config)
    with pytest.raises(ValueError, match="2 timesteps begin at 1500, and the schedule has 1000"):
        set_timesteps(scheduler, None, "cpu", timesteps=[1500, 20])


def test_as_many_seeds_as_prompts_are_needed(sd):
    with pytest.raises(ValueError, match="seeds holds 1; 2 prompts need as many"):
        Artist(sd).draw(PROMPTS, [1], Sampling(num_inference_steps=2))


def test_draw_gives_uint8_pictures(sd):
    drawings = Artist(sd).draw(PROMPTS, [1, 2], Sampling(num_inference_steps=2, height=64, width=128))
    assert [drawing.image.shape for drawing in drawings] == [(64, 128, 3)] * 2
    assert all(drawing.image.dtype == "uint8" for drawing in drawings)
