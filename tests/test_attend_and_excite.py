from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionAttendAndExcitePipeline

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.loading import load_stable_diffusion
from dpt.drawing import Artist
from dpt.guidance.attend_and_excite import AttendAndExcite, stored_attention, subject_tokens
from dpt.sampling import ClassifierFreeGuidance, initial_noise, sample
from dpt.sampling_settings import Sampling
from dpt.schedulers import set_timesteps
from dpt.training.controls import control_unet

PROMPTS = ["a red circle and a blue square", "two green stars"]
STEPS = 10
STEP = 1.0
SAMPLING = Sampling(attend_and_excite=True)


def guidance(sd, scale, prompts=PROMPTS):
    texts = (Conditioning(*sd.encode_prompts(words)) for words in (prompts, [""] * len(prompts)))
    return ClassifierFreeGuidance(sd.denoiser, sd.scheduler, *texts, guidance_scale=scale)


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture(scope="module")
def random_sd(sd):
    """With a U-Net of random weights: a trained one's sharp maps amplify what float32 leaves open."""
    random = replace(sd)
    control_unet("random_unet", random)
    return random


def test_subjects_are_shapes_or_else_content_words(sd):
    tokens = sd.tokenizer.convert_ids_to_tokens(sd.tokenizer(PROMPTS[0]).input_ids)
    found = subject_tokens(sd, PROMPTS[0])
    assert [tokens[k].removesuffix("</w>") for k in found] == ["circle", "square"]
    assert len(subject_tokens(sd, PROMPTS[1])) == 1
    assert len(subject_tokens(sd, "a dog and two cats on the sofa")) == 3


def test_attention_maps_are_the_plain_processor_s(sd):
    noise = initial_noise([0, 1], sd.latent_shape())
    context, _ = sd.encode_prompts(PROMPTS)
    plain = sd.denoiser(noise, 500, encoder_hidden_states=context).sample
    before = sd.denoiser.attn_processors
    with torch.no_grad(), stored_attention(sd.denoiser, 4) as maps:
        stored = sd.denoiser(noise, 500, encoder_hidden_states=context).sample
    assert sd.denoiser.attn_processors == before
    torch.testing.assert_close(stored, plain, atol=1e-4, rtol=1e-4)
    assert all(m.shape[0] == 2 and m.shape[2:] == (16, context.shape[1]) for m in maps)
    message = r"attention_resolution is 5; .* the sides 2, 4, 8"
    with pytest.raises(ValueError, match=message), stored_attention(sd.denoiser, 5):
        sd.denoiser(noise, 500, encoder_hidden_states=context)


@pytest.mark.slow
def test_latents_are_those_of_diffusers_own_class(random_sd):
    """The deprecated pipeline, image by image: same gradient steps and refinements."""
    sd = random_sd
    scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    pipe = StableDiffusionAttendAndExcitePipeline(
        sd.vae, sd.text_encoder, sd.tokenizer, sd.denoiser, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([3, 4], sd.latent_shape())
    thresholds = {0: 0.05, 2: 0.5, 4: 0.8}
    expected = [
        pipe(
            prompt,
            token_indices=subject_tokens(sd, prompt),
            latents=noise[k : k + 1].clone(),
            guidance_scale=5.0,
            num_inference_steps=STEPS,
            max_iter_to_alter=STEPS // 2,
            thresholds=thresholds,
            scale_factor=20,
            attn_res=(4, 4),
            output_type="latent",
        ).images
        for k, prompt in enumerate(PROMPTS)
    ]
    denoise = guidance(sd, 5.0)
    set_timesteps(sd.scheduler, STEPS, "cpu")
    tokens = [subject_tokens(sd, prompt) for prompt in PROMPTS]
    latents = sample(AttendAndExcite(denoise, tokens, SAMPLING), sd.scheduler, noise)
    set_timesteps(sd.scheduler, STEPS, "cpu")
    plain = sample(denoise, sd.scheduler, noise)
    assert (latents - plain).abs().max() > 0.02
    torch.testing.assert_close(latents, torch.cat(expected), atol=2e-3, rtol=1e-3)


def test_what_is_neglected_is_attended_to(random_sd):
    sd = random_sd
    noise, denoise = initial_noise([5, 6], sd.latent_shape()), guidance(sd, 1.0)
    tokens = [subject_tokens(sd, prompt) for prompt in PROMPTS]
    rival = AttendAndExcite(denoise, tokens, SAMPLING)
    before, gradient = rival.loss_gradient(noise, 900)
    after, _ = rival.loss_gradient(noise - STEP * gradient, 900)
    expected = STEP * gradient.flatten(1).square().sum(1)
    torch.testing.assert_close(before - after, expected, atol=1e-6, rtol=0.1)
    assert (expected > 1e-5).all()
    alone = AttendAndExcite(guidance(sd, 1.0, PROMPTS[:1]), tokens[:1], SAMPLING)
    torch.testing.assert_close(alone.loss_gradient(noise[:1], 900)[1], gradient[:1], atol=1e-5, rtol=1e-3)
    without, _ = AttendAndExcite(denoise, [[], []], SAMPLING).loss_gradient(noise, 900)
    assert (without == 0).all()
    plain, excited = (
        np.stack([drawing.image for drawing in Artist(sd).draw(PROMPTS, [0, 1], sampling)])
        for sampling in (Sampling(num_inference_steps=2), replace(SAMPLING, num_inference_steps=2))
    )
    assert (excited != plain).any()
    assert excited.dtype == np.uint8


def test_a_step_means_the_same_with_every_scheduler(random_sd):
    """The move is made in the scale of the U-Net's input, which Euler's latents are not in."""
    sd, moves = random_sd, []
    noise = initial_noise([5, 6], sd.latent_shape())
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        scheduler = kind.from_config(sd.scheduler.config)
        set_timesteps(scheduler, STEPS, "cpu")
        texts = (Conditioning(*sd.encode_prompts(words)) for words in (PROMPTS, ["", ""]))
        denoise = ClassifierFreeGuidance(sd.denoiser, scheduler, *texts, guidance_scale=5.0)
        tokens = [subject_tokens(sd, prompt) for prompt in PROMPTS]
        scale = scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[1])
        latents = noise / scale
        moved = AttendAndExcite(denoise, tokens, SAMPLING).moved(latents, scheduler.timesteps[1], 1)
        moves.append((moved - latents) * scale)
    torch.testing.assert_close(moves[0], moves[1], atol=1e-3, rtol=0.05)
    assert moves[0].abs().max() > 0.01
