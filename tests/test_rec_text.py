import json
import pickle
import shutil

import pytest
import torch

from dpt.backbones.loading import load_stable_diffusion
from dpt.rec_text import load_rec_text_encoder
from dpt.tasks.rec import token_mask


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


def test_clip_is_the_model_s_own(sd):
    encoder = load_rec_text_encoder("clip", sd, with_model=True)
    assert encoder.model is sd.text_encoder
    texts = ["the red circle", "the star above the blue square"]
    encoding = encoder.tokenize(texts)
    states = encoder.encode(encoding)
    assert states.shape == (2, encoding.input_ids.shape[1], sd.text_encoder.config.hidden_size)
    mask = token_mask(encoding, 1, [(0, 8)], states.shape[1])
    assert encoder.tokenizer.convert_ids_to_tokens(encoding.input_ids[1][mask]) == ["the</w>", "star</w>"]


def test_roberta_is_frozen_and_loaded_only_where_needed(sd, golden):
    encoder = load_rec_text_encoder(str(golden / "roberta"), sd, with_model=True)
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training
    assert encoder.encode(encoder.tokenize(["a green kite"])).dtype == torch.float32
    assert load_rec_text_encoder(str(golden / "roberta"), sd, with_model=False).model is None
    assert load_rec_text_encoder("clip", sd, with_model=False).model is None


def test_spans_on_blanks_are_narrowed(sd):
    encoding = load_rec_text_encoder("clip", sd, with_model=False).tokenize(["a cross", "the red circle left of it"])
    length = encoding.input_ids.shape[1]
    exact = token_mask(encoding, 1, [(4, 14)], length)
    assert torch.equal(token_mask(encoding, 1, [(3, 15)], length), exact)
    assert exact.sum() == 2
    assert not token_mask(encoding, 1, [(3, 4)], length).any()


def config(**changes):
    def write(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def weights(content, name="model.safetensors"):
    def write(folder):
        before = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(before[:500] if content is None else content)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weights(None), "header"),
        (weights(b"version https://git-lfs.github.com/spec/v1"), "header"),
        (weights(b"e" * 300, "pytorch_model.bin"), "cannot be loaded"),
        (weights(pickle.dumps(exit), "pytorch_model.bin"), "Weights only load failed"),
        (config(hidden_size=-1), "its hidden_size is -1"),
        (config(hidden_size="x"), "hidden_size"),
        (config(num_hidden_layers=10**7), "its num_hidden_layers is 10000000"),
        (config(num_hidden_layers=9), "of its weights are missing, such as encoder.layer."),
        (config(intermediate_size=3), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "cannot be loaded"),
    ],
)
def test_damaged_encoders_are_one_line(sd, golden, tmp_path, damage, message):
    shutil.copytree(golden / "roberta", tmp_path / "roberta")
    damage(tmp_path / "roberta")
    with pytest.raises(ValueError, match=message) as error:
        load_rec_text_encoder(str(tmp_path / "roberta"), sd, with_model=True)
    assert str(error.value).startswith(f"rec_text_encoder '{tmp_path / 'roberta'}' cannot be loaded")
    assert "\n" not in str(error.value)


def test_missing_weights_say_what_to_do(sd):
    with pytest.raises(ValueError, match=r"rec_text_encoder 'roberta-base' cannot be loaded.*or use clip"):
        load_rec_text_encoder("roberta-base", sd, with_model=True, local_files_only=True)
