import json

import pytest

from dpt.benchmark import main

KEYS = {"plain_step_s", "corrected_step_s", "feature_share", "plain_peak_mb", "corrected_peak_mb"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shapes", "random-145m"])
def test_a_corrected_step_costs_at_most_1_10_times_1_plus_f(model, capsys):
    """Timings on a busy machine vary: the best of three runs counts."""
    ratios = []
    for _ in range(3):
        assert main(["sampling", "--model", model, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result.keys() >= KEYS
        assert result["repeats"] >= 5
        ratios.append(result["ratio"] / result["allowed_ratio"])
        if ratios[-1] <= 1:
            break
    assert min(ratios) <= 1, ratios


@pytest.mark.slow
def test_batched_passes_and_gradient_checkpointing_pay(capsys):
    """Timings on a busy machine vary: the best of three runs counts."""
    speedups = []
    for _ in range(3):
        assert main(["training", "--model", "random-145m", "--json", "--repeats", "5"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["loss_batched"] == pytest.approx(result["loss_sequential"], rel=1e-4)
        assert result["checkpointed_share"] <= 0.6
        speedups.append(result["speedup"])
        if speedups[-1] >= 1.15:
            break
    assert max(speedups) >= 1.15, speedups


@pytest.mark.slow
def test_a_probe_and_a_tune_step_of_stable_diffusion_s_size(capsys):
    """SD 2.1's architecture with random weights: bfloat16, batch 1, 32x32 latents."""
    assert main(["training", "--model", "random-sd21", "--json", "--repeats", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["probe_step_s"] > 0
    assert result["probe_peak_mb"] < result["tune_peak_mb"] < 12_000
