"""States and folders of the pretraining that are damaged, or somebody else's."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from dpt.shapes.pretraining_loop import read_state, train_stage
from dpt.shapes.pretraining_stages import save_folder

OPTIONS = {"steps": 1, "lr": 1e-3, "warmup": 0, "decay": 1.0, "ema": 0.0}


class Code:
    def __reduce__(self):
        return (print, ("code was run",))


def train(folder, model):
    return train_stage("stage", folder, model, lambda step: {"loss": model.weight.sum()}, **OPTIONS)


def with_code(path):
    torch.save({"model": Code()}, path)


def deep(path):
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02" + b"]" * 20_000_000 if name.endswith("data.pkl") else content)


def truncated(path):
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "empty": lambda path: path.write_bytes(b""),
    "pickle with code": lambda path: path.write_bytes(pickle.dumps(Code())),
    "zip with code": with_code,
    "deep": deep,
    "truncated": truncated,
    "other zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "other keys": lambda path: torch.save({"weights": {}}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "step of text": lambda path: torch.save({"model": {}, "average": {}, "optimizer": {}, "step": "1"}, path),
    "of another model": lambda path: torch.save({"model": {}, "average": {}, "optimizer": {}, "step": 1}, path),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_state_is_named_and_no_code_is_run(tmp_path, capsys, damage):
    damage(tmp_path / "stage.pt")
    with pytest.raises(ValueError, match=r"(?s)stage\.pt .*remove it to begin anew"):
        train(tmp_path, nn.Linear(2, 1, bias=False))
    assert "code was run" not in capsys.readouterr().out


def test_a_state_is_gone_on_with(tmp_path):
    train(tmp_path, nn.Linear(2, 1, bias=False))
    assert read_state(tmp_path / "stage.pt")["step"] == 1
    train(tmp_path, nn.Linear(2, 1, bias=False))


def test_a_model_s_folder_takes_no_other_s_place(tmp_path, capsys):
    def write(folder):
        folder.mkdir()
        (folder / "config.json").write_text("new")

    folder = tmp_path / "model"
    save_folder(folder, write)
    save_folder(folder, write)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (folder / "notes.txt").write_text("mine")
    save_folder(folder, write)
    assert (tmp_path / "model-before-1/notes.txt").read_text() == "mine"
    assert "model-before-1" in capsys.readouterr().out
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="photos is there, and no model's folder"):
        save_folder(photos, write)
    assert (photos / "a.jpg").read_bytes() == b"x"
