"""`evaluate.py overoptimization`: rises of scores against gains, from arms of a real drawing."""

import json

import pytest

import evaluate

ARMS = """
arms:
  near: &near
    {dpt: ckpt/shapes-dpt/verifier, guidance_scale: 5, num_inference_steps: 10, correction_norm: 1.0e-6,
     correction_target: latent, correction_stop: 0.5}
  far: {<<: *near, correction_norm: 0.03}
  other: {<<: *near, correction_norm: 0.03, num_inference_steps: 2}
  plain: {num_inference_steps: 2}
"""


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    (folder / "arms.yaml").write_text(ARMS)
    words = ["--prompts", "shapes:val", "--per_category", "1", "--seeds", "0", "--outdir", str(folder)]
    assert evaluate.main(["generate", "--arms", str(folder / "arms.yaml"), *words]) == 0
    folders = [str(folder / name) for name in ("near", "far", "other", "plain")]
    assert evaluate.main(["align", *folders, "--metrics", "oracle"]) == 0
    return folder


def test_the_score_rises_with_the_length(arms, capsys):
    output = arms / "figure.png"
    words = ["overoptimization", str(arms / "near"), str(arms / "far"), "--output", str(output)]
    assert evaluate.main(words) == 0
    ((adapter, (row,)),) = json.loads(output.with_suffix(".json").read_text()).items()
    assert adapter == "ckpt/shapes-dpt/verifier"
    assert row["length"] == 0.03
    assert row["score"] > 0.1
    assert row["correct"][1] <= row["correct"][0] <= row["correct"][2]
    assert output.stat().st_size > 10_000
    assert evaluate.main(words) == 0  # its own files may be replaced


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["near"], "near stands alone: its adapter needs a shorter length beside it"),
        (["near", "plain"], "plain is of no correction_norm"),
        (["near", "nowhere"], "nowhere"),
        (["near", "other"], "other differs from the other arms of its adapter in more than correction_norm"),
    ],
)
def test_bad_input_is_one_line(arms, folders, message, capsys):
    words = [*(str(arms / name) for name in folders), "--output", str(arms / "other.png")]
    assert evaluate.main(["overoptimization", *words]) == 2
    assert message in capsys.readouterr().err
