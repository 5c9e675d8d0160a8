import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import AutoModel

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.adapter.transformer import attend
from dpt.backbones.blocks import block_channels, parse_feature
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features
from dpt.checkpoint.released import adapter_key, infer_adapter_config
from dpt.config import AdapterConfig
from dpt.tasks.itm import itm_score

CASES = ["up1", "mid", "bottom1_up0", "all"]


def close(actual, expected, rtol=1e-5):
    expected = torch.as_tensor(expected)
    return torch.allclose(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def load_golden_adapter(golden, case, unet_config):
    """The adapter of a golden file, its blocks, and the reference's options."""
    options = json.loads((golden / f"adapter_{case}.args.json").read_text())
    name, *fusion = options["unet_feature"].split("-")
    blocks = parse_feature(name.replace("bottom", "down").replace("_", "+"), unet_config)
    state = {adapter_key(k): v for k, v in load_file(golden / f"adapter_{case}.safetensors").items()}
    config = infer_adapter_config(
        state,
        num_queries_itm=options["num_queries_matching"],
        nheads=options["nheads"],
        in_channels=[block_channels(block, unet_config) for block in blocks],
        **({"fusion_size": int(fusion[1])} if fusion else {}),
    )
    adapter = DiscriminativeAdapter(config)
    adapter.load_state_dict(state)
    return adapter.eval(), blocks, options


@pytest.fixture(scope="module")
def unet(golden):
    return UNet2DConditionModel.from_pretrained(golden / "sd21/unet").eval().requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_golden_adapter_outputs(golden, unet, case):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / f"adapter_{case}.npz").items()}
    adapter, blocks, options = load_golden_adapter(golden, case, unet.config)
    assert adapter.config.num_queries_rec == options["num_queries_rec"]
    features, _ = denoiser_features(unet, blocks, arrays["latent"], arrays["t"], Conditioning(arrays["context"]))
    kept = {}
    adapter.input_proj.register_forward_hook(lambda m, a, out: kept.update(src=out))
    adapter.timestep_embedder.register_forward_hook(lambda m, a, out: kept.update(time=out))
    adapter.transformer.register_forward_hook(lambda m, a, out: kept.update(memory=out[1]))
    with torch.no_grad():
        hs = adapter(features, arrays["t"])
        pos_embed = adapter.position_embedding(kept["src"]).expand_as(kept["src"])
        assert close(kept["src"], arrays["input_proj"])
        assert close(pos_embed, arrays["pos_embed"])
        assert close(kept["time"], arrays["time_embed"])
        assert close(kept["memory"].transpose(0, 1), arrays["memory"])
        assert close(hs, arrays["query_out"])
        for layer in range(len(hs)):
            assert close(adapter.itm_embeddings(hs, layer), arrays["q_emb"][layer])
        assert close(adapter.itm_head.logit_scale.exp(), arrays["logit_scale"])
        for name, value in adapter.rec_outputs(hs).items():
            assert close(value, arrays[name]), name
        roberta = AutoModel.from_pretrained(golden / "roberta", dtype=torch.float32).eval()
        states = roberta(arrays["rob_ids"], attention_mask=arrays["rob_mask"]).last_hidden_state
        assert close(adapter.rec_head.project_tokens(states), arrays["proj_tokens"])


def small(**changes):
    settings = {"in_channels": [8], "hidden_dim": 32, "nheads": 4, "dim_feedforward": 64, "text_dim": 16}
    return AdapterConfig(**settings | {"num_queries_itm": 3, "num_queries_rec": 5, "rec_text_dim": 12} | changes)


def test_paper_sizes_are_the_defaults():
    adapter = DiscriminativeAdapter(AdapterConfig())
    hs = adapter([torch.randn(1, 1280, 8, 8)], torch.tensor(500))
    assert hs.shape == (1, 1, 110, 256)
    assert adapter.itm_embeddings(hs).shape == (1, 10, 1024)
    outputs = adapter.rec_outputs(hs)
    assert outputs["pred_logits"].shape == (1, 100, 256)
    assert outputs["pred_boxes"].shape == (1, 100, 4)
    assert outputs["proj_queries"].shape == (1, 100, 64)
    assert adapter.itm_head.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "changes", [{}, {"pre_norm": True}, {"position_embedding": "learned"}, {"dec_layers": 3}, {"value_positions": True}]
)
def test_a_batch_equals_its_items(changes):
    torch.manual_seed(0)
    adapter = DiscriminativeAdapter(small(**changes)).eval()
    feature, timesteps = torch.randn(3, 8, 5, 7), torch.tensor([1, 400, 999])
    together = adapter([feature], timesteps)
    assert together.shape == (changes.get("dec_layers", 1), 3, 8, 32)
    for b in range(3):
        assert torch.allclose(adapter([feature[b : b + 1]], timesteps[b]), together[:, b : b + 1], atol=1e-5)


def test_timestep_and_place_matter():
    adapter = DiscriminativeAdapter(small()).eval()
    feature = torch.randn(1, 8, 6, 6)
    base = adapter([feature], torch.tensor([10]))
    assert not torch.allclose(base, adapter([feature], torch.tensor([900])), atol=1e-3)
    assert not torch.allclose(base, adapter([feature.flip(-1)], torch.tensor([10])), atol=1e-4)


def test_features_are_standardised_by_what_was_measured():
    torch.manual_seed(0)
    plain, adapter = (DiscriminativeAdapter(small(normalize_features=on)).eval() for on in (False, True))
    adapter.load_state_dict(plain.state_dict(), strict=False)
    features, timestep = torch.randn(4, 8, 5, 7) * torch.arange(1, 9)[:, None, None] + 3, torch.tensor(9)
    assert torch.equal(adapter([features], timestep), plain([features], timestep))  # before anything is measured
    adapter.measure_features([features])
    standardised = (features - features.mean((0, 2, 3), keepdim=True)) / features.std((0, 2, 3), keepdim=True)
    assert torch.allclose(adapter([features], timestep), plain([standardised], timestep), atol=1e-4)


def test_values_may_have_positions():
    torch.manual_seed(0)
    without, with_positions = (DiscriminativeAdapter(small(value_positions=on)).eval() for on in (False, True))
    with_positions.load_state_dict(without.state_dict())
    alike = torch.ones(1, 8, 5, 7)
    memory, positions = torch.randn(1, 35, 32), torch.randn(1, 35, 32)
    layers = [adapter.transformer.decoder_layers[0] for adapter in (without, with_positions)]
    queries = torch.randn(1, 8, 32)
    none = torch.zeros_like(positions)
    assert torch.equal(*(layer(queries, memory, none, queries) for layer in layers))
    assert not torch.allclose(*(layer(queries, memory, positions, queries) for layer in layers), atol=1e-2)
    assert not torch.allclose(*(adapter([alike], torch.tensor(9)) for adapter in (without, with_positions)), atol=1e-3)


def test_score_is_the_best_query_s_cosine():
    queries = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[0.0, -2.0], [-1.0, 0.0]]])
    text = torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    assert torch.allclose(itm_score(queries, text), torch.tensor([0.8, 0.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding": "rope"}, "position_embedding is 'rope'"),
        ({"hidden_dim": 30}, "hidden_dim is 30"),
        ({"num_queries_rec": 0}, "num_queries_rec is 0"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_learned_positions_end_at_their_table():
    adapter = DiscriminativeAdapter(small(position_embedding="learned"))
    with pytest.raises(ValueError, match="the feature map is 51x8"):
        adapter([torch.randn(1, 8, 51, 8)], torch.tensor([1]))


def test_plain_attention_is_the_fused_one():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(attention.in_proj_bias)
    query, key, value = torch.randn(2, 3, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    plain = attend(attention, query, key, value)  # with gradients
    fused = attention(query, key, value, need_weights=False)[0]
    assert torch.allclose(plain, fused, atol=1e-6)
    attention.dropout = 0.5
    assert not torch.allclose(attend(attention, query, key, value), fused, atol=1e-2)
    assert torch.allclose(attend(attention.eval(), query, key, value), fused, atol=1e-6)
