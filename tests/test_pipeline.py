import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

import dpt
from dpt.backbones.conditioning import Conditioning
from dpt.base_models import CKPT_FOLDER
from dpt.guidance.attend_and_excite import subject_tokens
from dpt.guidance.self_correction import SelfCorrection
from dpt.matching_score import score_gradient
from dpt.sampling import ClassifierFreeGuidance, initial_noise
from dpt.sampling_settings import Sampling


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


def stock_of(pipe):
    """The stock pipeline of the very same modules: equal weights elsewhere in memory give other last bits."""
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


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
    texts = Conditioning(context, pooled)
    _, gradient = score_gradient(pipe.unet, pipe._scorer, noisy_latents, timestep, texts)
    for settings in ({"correction_factor": 5.0}, {"correction_norm": 0.05}):
        guidance = ClassifierFreeGuidance(pipe.unet, scheduler, texts, texts, guidance_scale=1)
        correct = SelfCorrection(guidance, pipe._scorer, Sampling(**settings, correction_target="latent"))
        _, moved = correct(noisy_latents / scale, timestep, 4)
        move = (moved - noisy_latents / scale) * scale
        factor = settings.get("correction_factor", 0.05 * noisy_latents.norm() / gradient.norm())
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
    width = pipe.text_encoder.config.hidden_size
    assert seen == {
        "latents": (1, 4, 16, 16),
        "prompt_embeds": (2, 32, width),  # the negative prompt's first, as in the stock pipeline
        "negative_prompt_embeds": (1, 32, width),
    }
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
        weights = {
            p.untyped_storage().data_ptr() for p in [*sd.denoiser.parameters(), *pipe._scorer.adapter.parameters()]
        }
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    timestep = torch.tensor(500)
    texts = Conditioning(context, pooled)
    corrected = saved_bytes(lambda: score_gradient(sd.denoiser, pipe._scorer, z, timestep, texts))
    leaf = z.clone().requires_grad_()
    whole = saved_bytes(lambda: sd.denoiser(leaf, timestep, context))
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


def test_the_signature_is_the_stock_pipeline_s():
    ours, theirs = (
        [(p.name, tuple(p.default) if isinstance(p.default, list) else p.default) for p in parameters]
        for parameters in (
            inspect.signature(cls.__call__).parameters.values()
            for cls in (dpt.SelfCorrectionPipeline, StableDiffusionPipeline)
        )
    )
    assert theirs[-1][0] == "kwargs"
    assert ours[: len(theirs) - 1] == theirs[:-1]
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        dpt.SelfCorrectionPipeline.__call__(None, "a star", guidance=3)


PROMPTS = ["a red circle", "two blue stars"]


def at_step(step, change):
    """A callback that calls change(pipe, tensors) after one step and returns what that does."""

    def callback(pipe, i, t, tensors):
        return (change(pipe, tensors) if i == step else None) or {}

    return callback


def switch_guidance_off(pipe, tensors):
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def changing(change, *names, step=1):
    return {"callback_on_step_end": at_step(step, change), "callback_on_step_end_tensor_inputs": list(names)}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def halved(name):
    return changing(lambda pipe, tensors: {name: tensors[name] / 2}, name)


def setting(name, value):
    return changing(lambda pipe, tensors: setattr(pipe, name, value))


# What is given beside `PROMPTS` and their latents, made anew for each call; a scheduler other than DDIM.
AS_STOCK = {
    "eta": (lambda: {"eta": 0.7, "generator": seeded(3, 4)}, None),
    "clip_skip": (lambda: {"clip_skip": 1}, None),
    "guidance_rescale": (lambda: {"guidance_rescale": 0.7}, None),
    "cross_attention_kwargs": (lambda: {"cross_attention_kwargs": {"scale": 0.3}}, None),
    "timesteps": (lambda: {"timesteps": [900, 600, 300, 20]}, EulerDiscreteScheduler),
    "sigmas": (lambda: {"sigmas": [9.0, 3.0, 1.0, 0.2]}, EulerDiscreteScheduler),
    "generator": (lambda: {"generator": torch.Generator().manual_seed(3)}, EulerAncestralDiscreteScheduler),
    "two_evaluations_a_step": (lambda: {}, HeunDiscreteScheduler),
    "guidance_scale": (lambda: {"guidance_scale": 1.0}, None),
    "negative_prompt": (lambda: {"negative_prompt": ["a cross", "a square"]}, None),
    "num_images_per_prompt": (
        lambda: {
            "num_images_per_prompt": 2,
            "negative_prompt": ["a cross", "a square"],
            "latents": initial_noise([1, 2, 3, 4], (4, 8, 8)),
        },
        None,
    ),
    "latents_of_a_callback": (lambda: halved("latents"), None),
    "prompt_embeds_of_a_callback": (lambda: halved("prompt_embeds"), None),
    "guidance_off": (lambda: changing(switch_guidance_off, "prompt_embeds"), None),
    "guidance_changed": (lambda: setting("_guidance_scale", 2.0), None),
    "guidance_rescale_changed": (lambda: setting("_guidance_rescale", 0.7), None),
    "lora_scale_changed": (lambda: setting("_cross_attention_kwargs", {"scale": 0.3}), None),
    "interrupt": (lambda: setting("_interrupt", True), None),
}


@pytest.fixture(scope="module")
def plain(pipe):
    noise = initial_noise([1, 2], (4, 8, 8))
    return pipe(PROMPTS, latents=noise, num_inference_steps=4, output_type="latent", correction_factor=0).images


@pytest.mark.parametrize("case", AS_STOCK)
def test_arguments_are_the_stock_pipeline_s(pipe, plain, case, monkeypatch):
    # The stock pipeline's clip_skip looks for the layer norm where transformers 4 had it.
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    arguments, scheduler = AS_STOCK[case]
    monkeypatch.setattr(pipe, "scheduler", (scheduler or DDIMScheduler).from_config(pipe.scheduler.config))
    call = {"num_inference_steps": 4, "output_type": "latent", "latents": initial_noise([1, 2], (4, 8, 8))}
    ours = pipe(PROMPTS, correction_factor=0, **call | arguments()).images
    theirs = stock_of(pipe)(PROMPTS, **call | arguments()).images
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    assert (ours[:2] - plain).abs().max() > 0.01


@pytest.mark.parametrize("together", [False, True])
def test_official_callbacks_cut_guidance_off(pipe, plain, together):
    def callback():
        cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
        return MultiPipelineCallbacks([cut]) if together else cut

    call = {"num_inference_steps": 4, "output_type": "latent", "latents": initial_noise([1], (4, 8, 8))}
    ours = pipe(PROMPTS[0], correction_factor=0, callback_on_step_end=callback(), **call).images
    theirs = stock_of(pipe)(PROMPTS[0], callback_on_step_end=callback(), **call).images
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - plain[:1]).abs().max() > 0.01
    assert pipe.num_timesteps == 4
    assert not pipe.do_classifier_free_guidance


def test_guidance_may_be_switched_off_by_its_scale_alone_and_on_again(pipe):
    """The stock pipeline ends in a shape error here."""

    def draw(arguments):
        call = {"num_inference_steps": 4, "output_type": "latent", "latents": initial_noise([1, 2], (4, 8, 8))}
        return pipe(PROMPTS, correction_factor=0, **call | arguments).images

    def on_again(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0 if step == 1 else 7.5

    off = draw(setting("_guidance_scale", 0.0))
    assert torch.equal(off, draw(changing(switch_guidance_off, "prompt_embeds")))
    assert (draw({"callback_on_step_end": on_again}) - off).abs().max() > 0.01


def test_negative_embeddings_of_a_callback_are_not_read_as_in_the_stock_pipeline(pipe, plain):
    call = {"num_inference_steps": 4, "output_type": "latent", "latents": initial_noise([1, 2], (4, 8, 8))}
    theirs = stock_of(pipe)(PROMPTS, **call, **halved("negative_prompt_embeds")).images
    with pytest.warns(UserWarning, match="change the first half of prompt_embeds"):
        ours = pipe(PROMPTS, correction_factor=0, **call, **halved("negative_prompt_embeds")).images
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours, plain)


FOUR, THREE = ["a star"] * 4, ["a star"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": FOUR, "negative_prompt": ["a", "b"]}, "negative_prompt holds 2; 4 prompts"),
        ({"prompt": THREE, "negative_prompt": ["a", "b"]}, "negative_prompt holds 2; 3 prompts"),
        ({"prompt": FOUR, "negative_prompt": []}, "negative_prompt holds 0; 4 prompts"),
        ({"prompt": FOUR, "generator": seeded(1, 2)}, "generator holds 2; 4 pictures"),
        ({"num_images_per_prompt": 2, "generator": seeded(1)}, "generator holds 1; 2 pictures"),
        ({"prompt": THREE, "negative_prompt_embeds": torch.zeros(2, 32, 128)}, "must be as many and as long"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 20, 128)}, "must be as many and as long"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"latents are \(2, 4, 16, 16\); they must be \(1, 4, h, w\)"),
        ({"pooled_prompt_embeds": torch.zeros(2, 128)}, "pooled_prompt_embeds holds 2; 1 prompts"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 32, 128)}, "either negative_prompt or"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 7}, "`prompt` has to be of type"),
        ({"height": 100}, "height is 100; it must be a positive multiple of 8"),
        ({"width": -8}, "width is -8"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2000}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"clip_skip": 9}, "clip_skip is 9; the text encoder has 4 layers"),
        ({"clip_skip": -1}, "clip_skip is -1"),
        ({"timesteps": [900, 20]}, "does not support custom"),
        ({"sigmas": [3.0, 0.2]}, "does not support custom"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": [9], "sigmas": [0.2]}, "Only one of"),
        ({"ip_adapter_image": torch.zeros(1, 3, 8, 8)}, "ip_adapter_image needs load_ip_adapter first"),
        ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 8)]}, "ip_adapter_image needs load_ip_adapter first"),
        ({"ip_adapter_image": 1, "correction_factor": 1}, "correction_factor cannot be used with ip_adapter_image"),
        (changing(lambda pipe, tensors: [1], step=0), "returned a list; it must be a dict or None"),
        (
            changing(lambda pipe, tensors: {"prompt_embeds": tensors["prompt_embeds"][1:]}, "prompt_embeds", step=0),
            "prompt_embeds after callback_on_step_end are 1; 1 pictures with guidance need 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a star", "correction_factor": 0} | CALL | arguments)


def test_a_correction_follows_the_embeddings_of_a_callback(pipe, monkeypatch):
    """The features of the score are conditioned on the changed prompt, and compared with the changed pooled text."""
    sd = pipe._as_stable_diffusion()
    (context, pooled), (negative, _) = (sd.encode_prompts([text]) for text in ("a blue star", ""))
    contexts, texts = [], []

    def recorded(*inputs, **options):
        contexts.append(inputs[-1].encoder_hidden_states)
        texts.append(inputs[-1].pooled_prompt_embeds)
        return score_gradient(*inputs, **options)

    monkeypatch.setattr("dpt.guidance.self_correction.score_gradient", recorded)
    changed = {"prompt_embeds": torch.cat([negative, context]), "pooled_prompt_embeds": pooled}
    pipe("a red circle", **CALL | changing(lambda pipe, tensors: changed))
    before, pooled_before = sd.encode_prompts(["a red circle"])
    assert all(torch.equal(x, y) for x, y in zip(contexts, [before] * 2 + [context] * 4, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(texts, [pooled_before] * 2 + [pooled] * 4, strict=True))
    contexts.clear()
    pipe("a red circle", **CALL | changing(switch_guidance_off, "prompt_embeds"))
    assert len(contexts) == 6
    assert all(torch.equal(x, before) for x in contexts)


def test_the_score_is_read_at_the_lora_scale_of_the_call(pipe):
    def score(scale):
        sd = pipe._as_stable_diffusion()
        texts = Conditioning(*sd.encode_prompts(["a red circle"]))
        noisy_latents, options = initial_noise([1], (4, 8, 8)), {"cross_attention_kwargs": scale and {"scale": scale}}
        return score_gradient(pipe.unet, pipe._scorer, noisy_latents, torch.tensor(500), texts, **options)[0]

    assert score(1.0) == score(None)
    assert score(0.3) != score(None)


def test_a_loaded_safety_checker_blacks_out_what_it_flags(pipe):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=16))
    checker.eval().concept_embeds.data.normal_()
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    call = {"num_inference_steps": 2, "latents": initial_noise([1, 2], (4, 8, 8))}
    pictures = pipe(PROMPTS, correction_factor=0, **call).images
    pixels = extractor(pictures, return_tensors="pt").pixel_values
    states = checker.visual_projection(checker.vision_model(pixels)[1])
    likeness = torch.cosine_similarity(states, checker.concept_embeds[:1])
    checker.concept_embeds_weights.data.fill_(2.0)
    checker.concept_embeds_weights.data[0] = likeness.mean()  # flags one of the two
    checked = dpt.SelfCorrectionPipeline(
        **pipe.components | {"safety_checker": checker, "feature_extractor": extractor}
    )
    checked.set_progress_bar_config(disable=True)
    for output_type in ("np", "pt"):
        ours, theirs = (
            draw(PROMPTS, output_type=output_type, **call, **options)
            for draw, options in ((checked, {"correction_factor": 0}), (stock_of(checked), {}))
        )
        assert sorted(ours.nsfw_content_detected) == [False, True]
        assert ours.nsfw_content_detected == theirs.nsfw_content_detected
        assert abs(ours.images - theirs.images).max() < 1e-4
        assert not ours.images[ours.nsfw_content_detected.index(True)].any()
    assert checked(PROMPTS, correction_factor=0, **call | {"output_type": "latent"}).nsfw_content_detected is None


def test_pictures_of_an_ip_adapter(shapes_dpt):
    pipe = dpt.SelfCorrectionPipeline.from_pretrained(CKPT_FOLDER / "shapes", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_dpt(shapes_dpt)
    width, weights = pipe.unet.config.cross_attention_dim, {}
    cross_attentions = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for k, name in enumerate(cross_attentions):
        keys = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * k + 1}.{part}.weight"] = torch.randn(keys.out_features, width)
    projection = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": weights})
    call = {"num_inference_steps": 4, "output_type": "latent", "latents": initial_noise([1, 2], (4, 8, 8))}
    seen = {"ip_adapter_image_embeds": [torch.randn(2, 1, 8)]}
    ours, theirs = (
        pipe(PROMPTS, correction_factor=0, **call, **seen).images,
        stock_of(pipe)(PROMPTS, **call, **seen).images,
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    other = pipe(PROMPTS, correction_factor=0, **call, ip_adapter_image_embeds=[torch.randn(2, 1, 8)]).images
    assert (ours - other).abs().max() > 0.01
    off = changing(switch_guidance_off, "prompt_embeds")
    assert pipe(PROMPTS, correction_factor=0, **call, **seen, **off).images.isfinite().all()
    with pytest.raises(ValueError, match="ip_adapter_image is missing"):
        pipe(PROMPTS, correction_factor=0)
    with pytest.raises(ValueError, match="correction_factor cannot be used with ip_adapter_image"):
        pipe(PROMPTS, **seen)


def test_a_u_net_of_distilled_guidance(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(pipe.unet.config | {"time_cond_proj_dim": 16})
    distilled = dpt.SelfCorrectionPipeline(**pipe.components | {"unet": unet}, requires_safety_checker=False)
    distilled.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": initial_noise([1, 2], (4, 8, 8))}
    ours = distilled(PROMPTS, correction_factor=0, **call).images
    assert torch.allclose(ours, stock_of(distilled)(PROMPTS, **call).images, rtol=0, atol=1e-4)
    distilled._scorer = pipe._scorer
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        distilled(PROMPTS)


def test_a_text_encoder_is_not_needed_for_embeddings(pipe):
    context, _ = pipe._as_stable_diffusion().encode_prompts(["a star", ""])
    without = dpt.SelfCorrectionPipeline(
        **pipe.components | {"text_encoder": None, "tokenizer": None}, requires_safety_checker=False
    )
    without.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": context[:1], "negative_prompt_embeds": context[1:]}
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": initial_noise([1], (4, 8, 8))}
    ours, expected = (p(correction_factor=0, **embeds, **call).images for p in (without, pipe))
    assert torch.equal(ours, expected)


def test_the_text_encoder_s_lora_is_scaled():
    pipe = dpt.SelfCorrectionPipeline.from_pretrained(CKPT_FOLDER / "shapes", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    noise = initial_noise([1, 2], (4, 8, 8))
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": noise}
    scaled = {"cross_attention_kwargs": {"scale": 0.3}}
    whole = pipe(PROMPTS, correction_factor=0, **call).images
    ours = pipe(PROMPTS, correction_factor=0, **call, **scaled).images
    assert torch.allclose(ours, stock_of(pipe)(PROMPTS, **call, **scaled).images, rtol=0, atol=1e-4)
    assert (ours - whole).abs().max() > 1e-3
    assert torch.equal(pipe(PROMPTS, correction_factor=0, **call).images, whole)


def test_what_is_not_read_of_a_prompt_is_said(pipe):
    with pytest.warns(UserWarning, match="reads 32 tokens a prompt; not read: 'star'"):
        pipe("red " * 30 + "star", correction_factor=0, num_inference_steps=1, output_type="latent")


def test_a_word_of_several_vectors():
    """A textual inversion's word stands for all of its vectors, in the pipeline and in `encode_prompts`."""
    pipe = dpt.SelfCorrectionPipeline.from_pretrained(CKPT_FOLDER / "shapes", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.load_textual_inversion({"<cat>": torch.randn(3, pipe.text_encoder.config.hidden_size)})
    sd, stock = pipe._as_stable_diffusion(), stock_of(pipe)
    prompts, negative = ["a red <cat>", "a star"], ["a <cat>", ""]
    expected, _ = stock.encode_prompt(prompts, "cpu", 1, False)
    assert torch.allclose(sd.encode_prompts(prompts)[0], expected, rtol=0, atol=1e-5)
    call = {"num_inference_steps": 4, "output_type": "latent", "latents": initial_noise([1, 2], (4, 8, 8))}
    theirs = stock(prompts, negative_prompt=negative, **call).images
    ours = pipe(prompts, negative_prompt=negative, correction_factor=0, **call).images
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    read = "red " * 28  # of 30 tokens beside those of the text's beginning and end
    assert sd.truncated_part(read + "red star") == ""
    assert sd.truncated_part(read + "<cat> star") == "<cat>_2 star"
    assert {2, 3, 4} < {*subject_tokens(sd, "a <cat> and a dog")}


def test_the_best_of_several_candidates(pipe):
    """The candidate of the highest score goes on; its picture is what its own noise draws."""
    shape, generator = (4, 4, 16, 16), torch.Generator().manual_seed(5)
    noise = torch.randn(shape, generator=generator)
    call = {"num_inference_steps": 4, "output_type": "latent", "correction_norm": 0.0}
    chosen = pipe(
        ["a red circle", "two green stars"],
        generator=torch.Generator().manual_seed(5),
        candidates=2,
        choose_at=(0.5,),
        **call,
    ).images
    assert chosen.shape == (2, 4, 16, 16)
    rows = [2 * picture + kept for picture, kept in enumerate(pipe.kept)]
    alone = pipe(["a red circle", "two green stars"], latents=noise[rows], **call).images
    assert torch.allclose(chosen, alone, atol=1e-4 * alone.abs().max().item())
    own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pipe(["a red circle", "two green stars"], generator=own, candidates=2, choose_at=(0.5,), **call)
    assert len(pipe.kept) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latents": torch.zeros(2, 4, 16, 16)}, "latents cannot be used with candidates"),
        ({"callback_on_step_end": print}, "callback_on_step_end cannot be used with candidates"),
        ({"eta": 0.5}, "eta cannot be used with candidates"),
        ({"choose_at": (2.0,)}, "choose_at is"),
        ({"candidates": 1, "choose_at": (0.5,)}, "candidates is 1"),
    ],
)
def test_candidates_exclude_what_belongs_to_one_picture(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe("a red circle", **{"candidates": 2, "choose_at": (0.5,), "num_inference_steps": 2} | given)


def test_the_adapter_follows_the_pipeline_to_its_device(pipe, monkeypatch):
    """As after `pipe.to("cuda")`: the adapter that was loaded before is moved when a call needs it."""
    moved = []
    monkeypatch.setattr(pipe._scorer.adapter, "to", lambda device: moved.append(device))
    pipe("a red circle", num_inference_steps=1, correction_norm=0.01, output_type="latent")
    assert moved == [pipe._execution_device]
