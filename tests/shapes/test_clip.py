import pytest
import torch

from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import CKPT_FOLDER
from dpt.shapes.clip import MAX_TOKENS, load_clip, make_tokenizer, tokenize
from dpt.shapes.settings import PretrainConfig


@pytest.fixture(scope="module")
def shapes():
    return load_stable_diffusion("shapes")


def test_words_of_the_grammar_are_single_tokens():
    tokenizer = make_tokenizer()
    text = "a picture of two small red crosses, and one big orange triangle to the left of an object"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]
    assert [token.removesuffix("</w>") for token in tokens] == text.replace(",", " ,").split()


@pytest.mark.parametrize("text", ["🙂 naïve\n日本", "", "antidisestablishmentarianism", "x" * 500, "\t\u200b\x00"])
def test_any_text_tokenizes_with_offsets(text):
    tokenizer = make_tokenizer()
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert all(0 <= begin <= end <= len(text) for begin, end in encoded.offset_mapping)
    assert tokenize(tokenizer, [text]).shape == (1, MAX_TOKENS)


def test_offsets_find_a_phrase():
    text = "a Red  circle\nand a blue square"
    encoded = make_tokenizer()(text)
    tokens = encoded.tokens()
    assert tokens[encoded.char_to_token(text.index("Red"))] == "red</w>"
    assert tokens[encoded.char_to_token(text.index("square") + 3)] == "square</w>"


def test_the_committed_tokenizer_is_the_made_one(shapes):
    made, text = make_tokenizer(), "a red circle left of two big yellow stars 🙂"
    assert shapes.tokenizer(text).input_ids == made(text).input_ids
    assert len(shapes.tokenizer) == len(made)


def test_end_of_text_is_the_highest_id_and_pools(shapes):
    assert shapes.tokenizer.eos_token_id == len(shapes.tokenizer) - 1
    assert shapes.text_encoder.config.eos_token_id == shapes.tokenizer.eos_token_id
    context, pooled = shapes.encode_prompts(["a red circle", "a red square", "a red circle and a blue star"])
    assert context.shape == (3, MAX_TOKENS, PretrainConfig().clip.width)
    for other in pooled[1:]:  # pooled at another token, they would agree to rounding
        assert torch.cosine_similarity(pooled[0], other, dim=0) < 0.9995
    position = 1 + 3  # start, three words, end
    assert torch.equal(pooled[0], context[0, position])


def test_the_committed_clip_agrees_with_the_text_encoder(shapes):
    clip, tokenizer = load_clip(CKPT_FOLDER / "shapes/clip")
    texts = ["a red circle", "two big yellow stars"]
    pooled = clip.text_model(tokenize(tokenizer, texts)).pooler_output
    assert torch.allclose(pooled, shapes.encode_prompts(texts)[1], atol=1e-5)
