"""Settings: their bounds, and what becomes of what is typed."""

import pytest

from dpt.config import AdapterConfig, DPTConfig


@pytest.mark.parametrize(
    "name",
    [
        *("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_queries_itm", "num_queries_rec"),
        *("contrastive_dim", "fusion_dim", "fusion_size", "text_dim", "rec_text_dim"),
    ],
)
def test_sizes_of_an_adapter_are_bounded_on_both_sides(name):
    """A file's config may say anything, and memory is taken for it."""
    for value in (-1, 0, 10**7, 10**400):
        with pytest.raises(ValueError, match=f"adapter.{name} is {value}; it must be"):
            AdapterConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"in_channels": [-1]}}, "adapter.in_channels is -1"),
        ({"adapter": {"in_channels": [1280, 10**9]}}, "adapter.in_channels is 1000000000"),
        ({"adapter": {"in_channels": []}}, "adapter.in_channels are 0"),
        ({"adapter": {"in_channels": [1] * 10**5}}, "adapter.in_channels are 100000"),
        ({"itm_layer": -99}, "itm_layer is -99; the adapter has 1 decoder layers"),
        ({"itm_layer": 1}, "itm_layer is 1"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_rank": 10**9}, "lora_rank is 1000000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"control": "luck"}, "control is 'luck'; it must be none, random_unet"),
    ],
)
def test_configs_of_weights_are_checked(settings, message):
    DPTConfig(itm_layer=1, adapter=AdapterConfig(dec_layers=2))
    with pytest.raises(ValueError, match=message):
        DPTConfig(**settings | {"adapter": AdapterConfig(**settings.get("adapter", {}))})
