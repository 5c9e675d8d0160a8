import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small models are many times slower with several threads on busy cores

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shapes_dpt(tmp_path_factory) -> Path:
    """A checkpoint folder for the shapes model: a random adapter of its size and a random LoRA."""
    from dpt.adapter.adapter import DiscriminativeAdapter
    from dpt.backbones.loading import load_stable_diffusion
    from dpt.checkpoint.checkpoint import DPTCheckpoint, save_checkpoint
    from dpt.config import AdapterConfig, DPTConfig

    torch.manual_seed(0)
    sd = load_stable_diffusion("shapes")
    adapter = AdapterConfig(
        in_channels=[sd.denoiser.config.block_out_channels[-2]],
        hidden_dim=64,
        dim_feedforward=128,
        num_queries_itm=4,
        num_queries_rec=12,
        text_dim=sd.text_encoder.config.hidden_size,
        rec_text_dim=sd.text_encoder.config.hidden_size,
    )
    lora = {}
    for name, module in sd.denoiser.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            lora[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features) * 0.05
            lora[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4) * 0.05
    config = DPTConfig("shapes", "up1", -1, adapter, lora_rank=4, lora_alpha=4.0)
    folder = tmp_path_factory.mktemp("weights") / "shapes-dpt"
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(adapter), lora), folder)
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays that the reference produced: tests/golden, or what DPT_GOLDEN names."""
    folder = Path(os.environ.get("DPT_GOLDEN") or REPOSITORY / "tests/golden")
    if not folder.is_dir():
        pytest.fail(f"{folder}, of golden arrays, is no folder; DPT_GOLDEN names another than tests/golden")
    return folder


@pytest.fixture(scope="session")
def coco_tree(tmp_path_factory) -> Path:
    """A small data folder in the layouts that users have; not to be changed."""
    from tests.coco_tree import make_tree

    return make_tree(tmp_path_factory.mktemp("coco") / "data")
