import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

import dpt
from dpt.sampling import CorrectionSettings, SelfCorrection, initial_noise, score_gradient
from dpt.stable_diffusion import CKPT_FOLDER


@pytest.fixture(scope="module")
def pipe(shapes_dpt):
    pipe = dpt.SelfCorrectionPipeline.from_pretrained(CKPT_FOLDER / "shapes", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.load_dpt(shapes_dpt)


@pytest.fixture(scope="module")
def stock(shapes_dpt):
    pipe = StableDiffusionPipeline.from_pretrained(CKPT_FOLDER / "shapes", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(shapes_dpt / "lora")
    return pipe


SCHEDULERS = [None, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
CALL = {"num_inference_steps": 6, "output_type": "latent"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_factor_zero_equals_the_stock_pipeline(pipe, stock, scheduler):
    original = pipe.scheduler
    if scheduler:
        pipe.scheduler, stock.scheduler = (scheduler.from_config(original.config) for _ in range(2))
    noise = initial_noise([1, 2], (4, 16, 16))
    prompts = ["a red circle", "two blue stars"]
    ours = pipe(prompts, latents=noise, negative_prompt="a cross", correction_factor=0, **CALL).images
    theirs = stock(prompts, latents=noise, negative_prompt=["a cross"] * 2, **CALL).images
    pipe.scheduler = stock.scheduler = original
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_one_factor_moves_the_unet_s_input_alike_with_every_scheduler(pipe, scheduler):
    """The step is taken in the variance-preserving space, whatever scale the scheduler's own latents have."""
    sd = pipe._as_stable_diffusion()
    noisy_latents, (context, pooled) = initial_noise([1], (4, 16, 16)), sd.encode_prompts(["a red circle"])
    scheduler = scheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[4]
    scale = scheduler.scale_model_input(torch.ones(1), timestep)
    assert (scale < 0.9) == isinstance(scheduler, EulerDiscreteScheduler)
    texts = {"encoder_hidden_states": context, "pooled_prompt_embeds": pooled}
    _, gradient = score_gradient(pipe.unet, pipe._scorer, noisy_latents, timestep, **texts)
    for settings in ({"factor": 5.0}, {"norm": 0.05}):
        correct = SelfCorrection(pipe.unet, pipe._scorer, scheduler, context, pooled, CorrectionSettings(**settings))
        move = (correct(noisy_latents / scale, timestep, 4, 10) - noisy_latents / scale) * scale
        factor = settings.get("factor", 0.05 * noisy_latents.norm() / gradient.norm())
        expected = factor * gradient
        assert torch.allclose(move, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_usual_call(pipe):
    steps = []
    out = pipe(
        "a red circle",
        num_images_per_prompt=2,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        correction_norm=0.01,
        callback_on_step_end=lambda p, i, t, kwargs: steps.append((i, tuple(kwargs["latents"].shape))),
    )
    assert [image.size for image in out.images] == [(128, 128)] * 2
    assert steps == [(0, (2, 4, 16, 16)), (1, (2, 4, 16, 16))]
    again, _ = pipe("a red circle", num_inference_steps=2, output_type="np", return_dict=False, height=64, width=64)
    assert again.shape == (1, 64, 64, 3)


def test_what_a_callback_is_given(pipe, capsys):
    seen = {}
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    pipe.set_progress_bar_config(disable=False)
    pipe(
        "a red circle",
        callback_on_step_end=lambda p, i, t, tensors: seen.update({n: tuple(x.shape) for n, x in tensors.items()}),
        callback_on_step_end_tensor_inputs=names,
        **CALL,
    )
    pipe.set_progress_bar_config(disable=True)
    assert seen == {"latents": (1, 4, 16, 16)} | dict.fromkeys(names[1:], (1, 32, pipe.text_encoder.config.hidden_size))
    assert "6/6" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds noise_pred, which is not there"):
        pipe("a red circle", callback_on_step_end_tensor_inputs=["noise_pred"], **CALL)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_whole_corrected_trajectories(pipe, scheduler):
    """Both targets, with every scheduler: finite, and each another picture."""
    original, noise = pipe.scheduler, initial_noise([1], (4, 16, 16))
    pipe.scheduler = scheduler.from_config(original.config)
    ends = [
        pipe("a red circle", latents=noise, correction_norm=norm, correction_target=target, **CALL).images
        for norm, target in ((0.0, "conditional"), (0.05, "conditional"), (0.05, "latent"))
    ]
    pipe.scheduler = original
    assert all(end.isfinite().all() for end in ends)
    for k, a in enumerate(ends):
        assert all((a - b).abs().max() > 1e-3 for b in ends[:k])


def test_a_correction_keeps_no_activation_of_a_later_block(pipe):
    """What autograd saves for the gradient of the score is what the truncated pass keeps, not the whole pass."""
    sd = pipe._as_stable_diffusion()
    z, (context, pooled) = initial_noise([1, 2], (4, 16, 16)), sd.encode_prompts(["a red circle"] * 2)

    def saved_bytes(function):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
        weights = {p.untyped_storage().data_ptr() for p in [*sd.unet.parameters(), *pipe._scorer.adapter.parameters()]}
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    timestep = torch.tensor(500)
    texts = {"encoder_hidden_states": context, "pooled_prompt_embeds": pooled}
    corrected = saved_bytes(lambda: score_gradient(sd.unet, pipe._scorer, z, timestep, **texts))
    leaf = z.clone().requires_grad_()
    whole = saved_bytes(lambda: sd.unet(leaf, timestep, context))
    assert corrected < 0.6 * whole


def test_embeddings_stand_for_prompts(pipe):
    noise = initial_noise([1], (4, 16, 16))
    expected = pipe("a red circle", latents=noise, negative_prompt="a cross", correction_norm=0.01, **CALL).images
    sd = pipe._as_stable_diffusion()
    context, pooled = sd.encode_prompts(["a red circle"])
    embeddings = {"prompt_embeds": context, "negative_prompt_embeds": sd.encode_prompts(["a cross"])[0]}
    found = pipe(latents=noise, correction_norm=0.01, pooled_prompt_embeds=pooled, **embeddings, **CALL).images
    assert torch.equal(found, expected)
    for arguments, message in (
        (embeddings, "needs pooled_prompt_embeds"),
        ({}, "either prompt or prompt_embeds"),
        (embeddings | {"prompt": "a red circle"}, "either prompt or prompt_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)


def test_a_callback_may_change_the_latents(pipe, stock):
    def halve(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] / 2} if step == 2 else {}

    noise = initial_noise([1], (4, 16, 16))
    arguments = {"latents": noise, "callback_on_step_end": halve} | CALL
    ours, theirs = pipe("a star", correction_factor=0, **arguments).images, stock("a star", **arguments).images
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item())
    assert not torch.allclose(ours, pipe("a star", correction_factor=0, latents=noise, **CALL).images, atol=0.01)


def test_from_pipe_and_a_missing_adapter(stock):
    pipe = dpt.SelfCorrectionPipeline.from_pipe(stock)
    assert pipe.unet is stock.unet
    with pytest.raises(ValueError, match="call load_dpt first"):
        pipe("a red circle")
    assert pipe("a red circle", correction_factor=0, **CALL).images.shape == (1, 4, 16, 16)
