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
