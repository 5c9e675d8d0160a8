"""Run folders, and what of them is somebody else's."""

import json

import pytest

from dpt.checkpoint.checkpoint import checkpoints
from dpt.config import save_config
from dpt.training.curves import drop_metrics_after, plot_curves, read_metrics
from dpt.training.run_folder import RunLog, check_run, set_damaged_aside
from dpt.training.settings import TrainConfig


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "curves.png"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_others_files_is_no_run_s(tmp_path, name, resume):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(ValueError, match=f"holds {name} but no run's config.yaml"):
        check_run(tmp_path, resume=resume)
    assert (tmp_path / name).read_text() == "somebody's"


def test_another_program_s_config_is_no_run_s(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 3\n")
    with pytest.raises(ValueError, match=r"config\.yaml: unknown key learning_rate"):
        check_run(tmp_path, resume=True)
    save_config(TrainConfig(), tmp_path / "config.yaml")
    check_run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="pass resume=true"):
        check_run(tmp_path, resume=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1}\nnotes\n', "line 2: "),
        ('{"step": 1}\n{"loss": 3}\n', "record 2: object is missing required field step"),
        ('{"step": null}\n', "line 1: "),
        ('{"step": 1, "loss": "low"}\n', "line 1: "),
        ("[1, 2]\n", "line 1: expected object, got array"),
        ("7\n", "line 1: expected object, got int"),
        ("somebody's", "line 1: "),
    ],
)
def test_metrics_of_others_are_named_and_stay(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    for use in (
        lambda: RunLog(tmp_path, 0),
        lambda: drop_metrics_after(path, 0),
        lambda: plot_curves(path, tmp_path / "x.png"),
    ):
        with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
            use()
    assert path.read_text() == content


def test_metrics_after_a_step_are_dropped_and_the_others_stay_to_the_digit(tmp_path):
    path, kept = tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "lr": 1e-05, "loss": 3}]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    path.write_text(text + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    drop_metrics_after(path, 2)
    assert path.read_text() == text
    assert read_metrics(path) == kept


def test_a_damaged_checkpoint_takes_no_other_s_place(tmp_path):
    steps = tmp_path / "checkpoints"
    for k in range(3):
        (steps / "step_0000005").mkdir(parents=True)
        (steps / "step_0000005/notes.txt").write_text(str(k))
        with pytest.raises(ValueError, match="none of the 1 checkpoints"):
            set_damaged_aside(tmp_path, lambda message: None)
    names = ("damaged_step_0000005", "damaged_step_0000005-2", "damaged_step_0000005-3")
    assert [(steps / name / "notes.txt").read_text() for name in names] == ["0", "1", "2"]


def test_a_copy_beside_a_run_s_checkpoints_is_none_of_them(tmp_path):
    for name in ("step_0000004", "step_0000004-best", "step_0000002"):  # nor is it removed as too old
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000004", "step_0000002"]
