import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small models are many times slower with several threads on busy cores

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays that the reference produced; `.ci/run` fails where it is expected and missing."""
    given = os.environ.get("DPT_GOLDEN")
    folder = Path(given) if given else REPOSITORY.parent / "shared/golden"
    if not folder.is_dir():
        if given:
            pytest.fail(f"DPT_GOLDEN names {given}, which is no folder")
        pytest.skip("no golden arrays: set DPT_GOLDEN")
    return folder
