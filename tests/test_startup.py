"""Help and bad arguments are answered before anything heavy is imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "open_clip", "scipy", "numpy")
CASES = [
    ("txt2img", ["--help"], 0),
    ("txt2img", ["--n_samples", "0"], 2),
    ("txt2img", ["--candidates", "2", "--choose_at", "7"], 2),
    ("txt2img", ["--prompt", "a star", "--model", "shapes", "--correct_candidates"], 2),
    ("train_probe", ["--help"], 0),
    ("train_probe", ["configs/shapes/probe.yaml", "optim.lr=-1"], 2),
    ("train_tune", ["configs/shapes/tune.yaml", "no.such=1"], 2),
    ("train_tune", ["configs/shapes/tune.yaml"], 2),
    ("train_tune", ["configs/shapes/tune.yaml", "init_from=nowhere"], 2),
    ("evaluate", ["--help"], 0),
    ("evaluate", ["generate", "--help"], 0),
    ("evaluate", ["choose", "--candidates", "1"], 2),
    ("evaluate", ["generate", "--arms", "configs/shapes/arms.yaml:own", "--prompts", "shapes:val", "--outdir", "o"], 2),
    ("evaluate", ["experiment", "configs/shapes/experiment.yaml", "per_category=0"], 2),
    ("evaluate", ["experiment", "configs/shapes/experiment.yaml", "--dry-run"], 0),
    ("dpt.data", ["--help"], 0),
    ("dpt.data", ["cache-latents", "--size", "3"], 2),
    ("dpt.demo", ["--help"], 0),
    ("dpt.demo", ["--port", "0"], 2),
    ("dpt.verify", ["--help"], 0),
    ("dpt.verify", ["--dpt", "ckpt/shapes-dpt", "--coco", "nowhere"], 2),
    ("dpt.verify", ["--dpt", "nowhere"], 2),
    ("dpt.benchmark", ["--help"], 0),
    ("dpt.benchmark", ["sampling", "--repeats", "4"], 2),
    ("dpt.benchmark", ["startup", "--model", "shapes"], 2),
    ("dpt.checkpoint", ["inspect", "--help"], 0),
    ("dpt.checkpoint", ["inspect", "nowhere"], 2),
    ("dpt.shapes.pretrain", ["--help"], 0),
    ("dpt.shapes.pretrain", ["configs/shapes/pretrain.yaml", "unet.train.lr=-1"], 2),
    ("dpt.shapes.quality", ["--help"], 0),
    ("dpt.shapes.quality", ["base", "--seeds", "0"], 2),
    ("dpt.shapes.label", ["--help"], 0),
    ("dpt.shapes.label", ["collect", "folder", "--count", "0"], 2),
]


def run_and_list(module, arguments, names):
    """The exit code of a module run with these arguments, and which of the names are imported at its end."""
    code = (
        "import runpy, sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: code = stop.code or 0\n"
        f"print(code, [name for name in {names!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("module", "arguments", "expected"), CASES)
def test_nothing_heavy_is_imported(module, arguments, expected):
    assert run_and_list(module, arguments, HEAVY) == f"{expected} []"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train_probe", ["configs/shapes/probe.yaml"]),
        ("train_tune", ["configs/shapes/tune_converged.yaml", "init_from=ckpt/shapes-dpt/verifier"]),
        (
            "train_tune",
            [
                "configs/shapes/reward.yaml",
                "init_from=new",
                "lora.only=false",
                "loss.weights.reward=0",
                "loss.weights.ce=1",
            ],
        ),
    ],
)
def test_a_dry_run_of_training_imports_torch_alone(module, arguments):
    """It needs numbers of parameters, not the models: everything else is seconds of imports."""
    names = ("diffusers", "transformers", "peft", "torchvision", "scipy", "torch._dynamo")
    assert run_and_list(module, [*arguments, "--dry-run"], names) == "0 []"


@pytest.mark.parametrize(
    ("module", "arguments", "beginning"),
    [
        ("txt2img", ["--model", "shapes", "--prompt", "a star"], "1 prompt(s) x 3 = 3 picture(s)\n"),
        ("train_probe", ["configs/shapes/probe.yaml", "--dry-run"], "run_name: "),
    ],
)
def test_what_a_run_will_do_is_said_before_anything_heavy_is_imported(module, arguments, beginning):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        f"import {module}\n"
        f"try: {module}.main({arguments!r})\n"
        "except ImportError: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(beginning)


def test_the_package_alone_is_light():
    code = f"import sys, dpt; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installed_package_needs_what_the_requirements_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    lines = [
        *(ROOT / "requirements.txt").read_text().split(),
        *(ROOT / "requirements-demo.txt").read_text().splitlines(),
    ]
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for word in words:
        name, least = word.split(">=")
        found = [tuple(map(int, text.split("."))) for text in (least, pinned[name])]
        assert found[0] <= found[1], word
    ours = {"pytest", "pytest-xdist", "selenium", "ruff", "tokenizers", "tensorboardX"}  # tests', or came with others
    assert {word.split(">=")[0] for word in words} == pinned.keys() - ours
