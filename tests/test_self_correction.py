from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpt.adapter.adapter import Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.loading import load_stable_diffusion
from dpt.drawing import counted_passes
from dpt.guidance.self_correction import SelfCorrection
from dpt.lora import load_lora, lora_key
from dpt.matching_score import ScoreReader, matching_score, score_gradient
from dpt.sampling import ClassifierFreeGuidance, sample
from dpt.sampling_settings import Sampling
from dpt.schedulers import make_scheduler, set_timesteps
from tests.test_adapter import load_golden_adapter

CASES = {"cf05": 0.5, "cf0": 0.0, "cf05_lora": 0.5, "cf50": 50.0}


def load(golden, case):
    return {k: torch.from_numpy(v) for k, v in np.load(golden / f"sample_{case}.npz").items()}


def setting(golden, case, *, parity=False, **changes):
    """The model, plain denoiser and corrected one of a golden trajectory."""
    arrays = load(golden, case)
    sd = load_stable_diffusion(str(golden / "sd21"))
    if case.endswith("lora"):
        state = load_file(golden / "lora_only.safetensors")
        state = {lora_key(key): value for key, value in state.items()}
        load_lora(sd.denoiser, state, alpha=next(v.shape[0] for k, v in state.items() if ".lora_A." in k))
    adapter, blocks, _ = load_golden_adapter(golden, "up1", sd.denoiser.config)
    negative, context = arrays["context"].chunk(2)
    scheduler = make_scheduler(sd.scheduler, "ddim", parity=parity)
    set_timesteps(scheduler, 10, "cpu")
    conditioning = Conditioning(context, arrays["context_pooled"].chunk(2)[1])
    denoise = ClassifierFreeGuidance(sd.denoiser, scheduler, conditioning, Conditioning(negative), guidance_scale=7.5)
    sampling = Sampling(**{"correction_factor": CASES[case]} | {f"correction_{k}": v for k, v in changes.items()})
    correct = SelfCorrection(denoise, Scorer(adapter.requires_grad_(False), blocks), sampling)
    return arrays, sd, denoise, correct


@pytest.mark.parametrize("case", CASES)
def test_golden_trajectories_in_parity_mode(golden, case):
    arrays, sd, denoise, correct = setting(golden, case, parity=True)
    scheduler, trajectory, predictions = denoise.scheduler, [arrays["init"]], []

    def observed(*inputs):
        result = correct(*inputs)
        predictions.append(result[0])
        return result

    decoded = sample(observed, scheduler, arrays["init"], on_step=lambda step, latents: trajectory.append(latents))
    trajectory[-1] = scheduler.discarded
    assert torch.equal(scheduler.timesteps, arrays["timesteps"])
    for step, expected in enumerate(arrays["latents"]):
        assert torch.allclose(trajectory[step], expected, rtol=1e-4, atol=1e-3), step
    for step, expected in enumerate(arrays["noise_pred"]):
        assert torch.allclose(predictions[step], expected, rtol=1e-4, atol=1e-3), step
    assert torch.allclose(decoded, arrays["decoded_latent"], rtol=1e-4, atol=1e-3)
    image = (sd.decode_latents(decoded) * 255).round().permute(0, 2, 3, 1)
    assert (image - arrays["image"].float()).abs().max() <= 1
    if CASES[case]:
        scores = torch.tensor([sum(record["score"]) for record in correct.trace])
        published = arrays["score"]
        assert torch.allclose(scores, published, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [name for name, factor in CASES.items() if factor])
def test_golden_gradients_of_the_score(golden, case, monkeypatch):
    """In double precision: in single, rounding decides on some CPUs on which side of zero a ReLU's input falls
    (`cf05_lora`, step 3), which moves the gradient by 1e-3 of its largest value."""
    arrays, sd, _, correct = setting(golden, case)
    sd.denoiser.double()
    correct.scorer.adapter.double()
    conditioning = correct.conditioning
    conditioning = Conditioning(conditioning.encoder_hidden_states.double(), conditioning.pooled_prompt_embeds.double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for step in range(10):
        inputs = arrays["latents"][step], arrays["timesteps"][step], conditioning
        _, gradient = score_gradient(sd.denoiser, correct.scorer, *inputs)
        assert gradient.dtype == torch.float64
        unconditional, expected = arrays["grad"][step].double().chunk(2)
        assert not unconditional.any()
        assert torch.allclose(gradient, expected, rtol=0, atol=5e-5 * expected.abs().max().item()), step


@pytest.mark.parametrize("case", CASES)
def test_golden_proper_last_step(golden, case):
    arrays, _, denoise, correct = setting(golden, case)
    expected = torch.from_numpy(np.load(golden / "sample_final_ddim.npz")[f"sample_{case}"])
    latents = sample(correct, denoise.scheduler, arrays["init"])
    assert torch.allclose(latents, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(latents, arrays["decoded_latent"], rtol=1e-4, atol=1e-3)


def run(golden, case="cf05", **changes):
    arrays, _, denoise, correct = setting(golden, case, **changes)
    return sample(correct, denoise.scheduler, arrays["init"]), correct.trace


def test_factor_zero_is_no_correction_to_the_bit(golden):
    arrays, _, denoise, _ = setting(golden, "cf0")
    plain = sample(denoise, denoise.scheduler, arrays["init"])
    for changes in ({"factor": 0.0}, {"factor": 0.5, "norm": 0.0}, {"factor": 0.5, "stop": 0.0}):
        latents, trace = run(golden, **changes)
        assert torch.equal(latents, plain)
        assert not trace


def test_the_latent_target_goes_on_from_the_corrected_latent(golden):
    arrays, sd, denoise, correct = setting(golden, "cf50", target="latent")
    latents = sample(correct, denoise.scheduler, arrays["init"])
    z = arrays["init"]
    for step, timestep in enumerate(denoise.scheduler.timesteps):  # the figure's algorithm, written out
        z = z + 50 * score_gradient(sd.denoiser, correct.scorer, z, timestep, correct.conditioning)[1]
        z = denoise.scheduler.step(denoise(z, timestep, step)[0], timestep, z).prev_sample
    assert torch.allclose(latents, z, rtol=1e-4, atol=1e-3)
    conditional, _ = run(golden, "cf50")
    assert not torch.allclose(latents, conditional, rtol=1e-2, atol=1e-1)
    with pytest.raises(ValueError, match="correction_target is 'both'"):
        run(golden, target="both")


def test_window_and_norm(golden):
    _, trace = run(golden, norm=0.01, start=0.2, stop=0.5)
    assert [record["step"] for record in trace] == [2, 3, 4]
    for record in trace:
        assert record["relative_length"] == pytest.approx([0.01, 0.01], rel=1e-4)
    _, trace = run(golden)
    assert len(trace) == 10
    assert all(x > 0 for record in trace for x in record["relative_length"])


def test_the_score_rises_along_its_gradient(golden):
    arrays, sd, _, correct = setting(golden, "cf05")
    z, t = arrays["latents"][3], arrays["timesteps"][3]
    before, gradient = score_gradient(sd.denoiser, correct.scorer, z, t, correct.conditioning)
    unit = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    after, _ = score_gradient(sd.denoiser, correct.scorer, z + 0.05 * unit, t, correct.conditioning)
    assert (after > before).all()
    assert not any(p.grad is not None for p in [*sd.denoiser.parameters(), *correct.scorer.adapter.parameters()])


def test_each_image_has_its_own_gradient(golden):
    arrays, sd, _, correct = setting(golden, "cf05")
    z, t = arrays["latents"][3], arrays["timesteps"][3]
    gradients = [
        score_gradient(sd.denoiser, correct.scorer, z[rows], t, correct.conditioning[rows])[1]
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2))
    ]
    expected = torch.cat(gradients[1:])
    assert torch.allclose(gradients[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def half_cosines(golden, dtype, input_scale=1.0):
    """Cosines of half-precision gradients to float32 ones, (steps, B)."""
    arrays, sd, _, correct = setting(golden, "cf05")
    correct.scorer.adapter.input_proj.weight.mul_(input_scale)
    half = load_stable_diffusion(str(golden / "sd21"), dtype=dtype)
    rows, own = [], correct.conditioning
    for step in range(10):
        inputs = arrays["latents"][step], arrays["timesteps"][step]
        gradients = [
            score_gradient(
                unet,
                correct.scorer,
                *inputs,
                Conditioning(own.encoder_hidden_states.to(unet.dtype), own.pooled_prompt_embeds),
            )[1].flatten(1)
            for unet in (sd.denoiser, half.denoiser)
        ]
        rows.append(torch.cosine_similarity(*(g / g.norm(dim=1, keepdim=True).clamp(min=1e-30) for g in gradients)))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_give_nearly_the_same_gradient(golden, dtype):
    cosines = half_cosines(golden, dtype).flatten()
    assert cosines.median() >= 0.99
    assert (cosines >= 0.99).float().mean() >= 0.9  # a unit of the adapter's ReLU may lie at its kink


def test_float16_gradients_do_not_underflow(golden, monkeypatch):
    """Features that matter a ten-thousandth as much: without scaling their gradient is lost in float16."""
    scaled = half_cosines(golden, torch.float16, 1e-4).median()
    assert scaled >= 0.99
    monkeypatch.setattr("dpt.matching_score.HALF_GRADIENT_SCALE", 1.0)
    assert half_cosines(golden, torch.float16, 1e-4).median() < scaled - 0.01


def test_non_finite_scores_stop_or_are_skipped(golden):
    arrays, _, denoise, correct = setting(golden, "cf05")
    correct.conditioning.pooled_prompt_embeds[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"at step 0 \(timestep 901\).*--on_nan skip"):
        sample(correct, denoise.scheduler, arrays["init"])
    correct.sampling = replace(correct.sampling, on_nan="skip")
    latents = sample(correct, denoise.scheduler, arrays["init"])
    assert latents.isfinite().all()
    assert torch.allclose(latents[0], run(golden)[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"start": 0.6, "stop": 0.5}, {"norm": -1.0}, {"factor": float("nan")}, {"on_nan": "ignore"}]
)
def test_impossible_settings(changes):
    with pytest.raises(ValueError, match=r"correction|on_nan"):
        Sampling(**{name if name == "on_nan" else f"correction_{name}": value for name, value in changes.items()})


def test_the_noise_target_moves_the_predicted_clean_latent_as_the_latent_target_does(golden):
    """By the same step; the prediction itself would change too where the latent moves."""
    arrays, sd, denoise, correct = setting(golden, "cf05", target="noise", norm=0.02)
    z, timestep = arrays["init"], denoise.scheduler.timesteps[0]
    _, gradient = score_gradient(sd.denoiser, correct.scorer, z, timestep, correct.conditioning)
    step = 0.02 * (z.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1))[:, None, None, None] * gradient
    plain, (moved, latents) = denoise(z, timestep, 0)[0], correct(z, timestep, 0)
    assert torch.equal(latents, z)
    expected = denoise.scheduler.step(plain, timestep, z + step).pred_original_sample
    found = denoise.scheduler.step(moved, timestep, z).pred_original_sample
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert correct.trace[0]["relative_length"] == pytest.approx([0.02, 0.02], rel=1e-4)
    assert not any(p.grad is not None for p in [*sd.denoiser.parameters(), *correct.scorer.adapter.parameters()])


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_the_score_read_off_the_pass_is_the_matching_score(golden, guidance_scale):
    arrays, sd, denoise, correct = setting(golden, "cf0")
    denoise.guidance_scale, trace = guidance_scale, []
    reader = ScoreReader(denoise, denoise, correct.scorer, trace, range(10))
    seen = [arrays["init"]]
    with counted_passes(sd.denoiser) as passes:
        sample(reader, denoise.scheduler, arrays["init"], on_step=lambda step, latents: seen.append(latents))
    assert passes == {"whole_passes": 20 if guidance_scale == 1 else 40, "truncated_passes": 0}
    for record, latents, timestep in zip(trace, seen, denoise.scheduler.timesteps, strict=False):
        expected = matching_score(sd.denoiser, correct.scorer, latents, timestep, correct.conditioning)
        assert record["score"] == pytest.approx(expected.tolist(), abs=1e-6)
