import pytest
import torch

from dpt.data.collate import token_mask
from dpt.rec_text import load_rec_text_encoder
from dpt.stable_diffusion import load_stable_diffusion


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


def test_missing_weights_say_what_to_do(sd):
    with pytest.raises(ValueError, match=r"rec_text_encoder 'roberta-base' cannot be loaded.*or use clip"):
        load_rec_text_encoder("roberta-base", sd, with_model=True, local_files_only=True)
