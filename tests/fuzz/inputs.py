"""Good inputs, small and quickly made: each is a folder under one root, made when first asked for."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import evaluate
import train_probe
import txt2img
from dpt.checkpoint.__main__ import main as checkpoint_main
from dpt.data.__main__ import main as data_main
from dpt.files import append_line
from dpt.shapes.label import main as label_main
from dpt.shapes.pretrain import main as pretrain_main
from tests.coco_tree import make_tree

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests/golden"
PROMPTS = ("a red circle", "two green stars")
RELEASED = ["--num_queries_itm", "4", "--nheads", "4"]  # what the shapes of the golden adapter do not tell
TINY = [
    *("model.feature=up1", "model.rec_text_encoder=clip", "adapter.hidden_dim=32", "adapter.nheads=4"),
    *("adapter.dim_feedforward=32", "adapter.num_queries_itm=2", "adapter.num_queries_rec=4", "adapter.dropout=0"),
    *("optim.mixed_precision=no", "optim.batch_size=2", "optim.steps=2", "optim.warmup_steps=0", "checkpoints.every=1"),
    *("validation.num_samples=2", "validation.timesteps=[500]", "samples.every=-1", "log_every=1"),
    "data.num_workers=0",
]

MAP = ["optim.steps=1", "optim.mixed_precision=bf16"]

PRETRAIN = ["stages=[clip]", "threads=1", "clip.width=32", "clip.layers=1", "clip.heads=2", "clip.train.steps=1"]
PRETRAIN += ["clip.train.batch_size=8"]


def succeeds(main: Callable, argv: list) -> None:
    """Runs a command that must do what it is asked for."""
    code = main([str(word) for word in argv])
    if code != 0:
        raise RuntimeError(f"a good input cannot be made: exit code {code} of {argv[0]}")


def of_coco(root: Path) -> list[str]:
    """Settings of a training on the tree."""
    return [f"model.name={root}/model", "data.kind=coco", f"data.root={root}/coco", *TINY]


def make_model(root: Path) -> None:
    """The golden base model, which by default draws 128 x 128 pixels."""
    shutil.copytree(GOLDEN / "sd21", root / "model", copy_function=shutil.copyfile)
    path = root / "model/unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}, indent=1))


def make_released(root: Path) -> None:
    (root / "released").mkdir()
    shutil.copyfile(GOLDEN / "stage2_pytorch_model.bin", root / "released/pytorch_model.bin")


def make_dpt(root: Path) -> None:
    """The released file as our folder."""
    succeeds(checkpoint_main, ["convert", GOLDEN / "stage2_pytorch_model.bin", root / "dpt", *RELEASED])


def make_lora(root: Path) -> None:
    shutil.copytree(given(root, "dpt") / "lora", root / "lora")


def make_pictures(root: Path) -> None:
    """What `txt2img.py` leaves."""
    words = ["--model", given(root, "model"), "--prompt", PROMPTS[0], "--n_samples", "1", "--ddim_steps", "1"]
    succeeds(txt2img.main, [*words, "--skip_grid", "--device", "cpu", "--outdir", root / "pictures"])


def make_coco(root: Path) -> None:
    """A data folder, latents included."""
    given(root, "model")
    tree = make_tree(root / "coco", num_train=4, num_val=2)
    where = ["--images", tree / "train2014", "--output", tree / "latents"]
    succeeds(data_main, ["cache-latents", "--model", root / "model", *where, "--device", "cpu"])


OWN = ["noises=2", "num_inference_steps=2", "steps=[0, 1]", "prompts_per_shard=5", "scorer=shapes-clip"]


def make_own(root: Path) -> None:
    """Trajectories of ten prompts, and the config that drew them."""
    (root / "own").mkdir()
    texts = [f"a {color} {shape}" for color in ("red", "blue", "green", "black", "cyan") for shape in ("star", "cross")]
    (root / "own/prompts.txt").write_text("\n".join(texts) + "\n")
    (root / "own/settings.yaml").write_text(json.dumps({"model": str(given(root, "model")), "dtype": "float32"}))
    places = [f"prompts={root}/own/prompts.txt", f"output={root}/own/drawn"]
    succeeds(data_main, ["trajectories", root / "own/settings.yaml", *OWN, *places, "--device", "cpu"])
    path = root / "own/drawn/labels_shapes-clip.jsonl"  # the small model's pictures are all alike
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"value": k}) + "\n" for k, row in enumerate(rows)))


def make_prompts(root: Path) -> None:
    """Prompt sets in three of their layouts."""
    folder = root / "prompts"
    (folder / "compbench").mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "compbench/color_val.txt").write_text("\n".join(PROMPTS) + "\n")
    entries = [{"captions": text, "image_id": k} for k, text in enumerate(PROMPTS)]
    (folder / "part.json").write_text(json.dumps(entries))


def make_arms(root: Path) -> None:
    """An arm's file, and an experiment's."""
    (root / "arms").mkdir()
    settings = {"model": str(given(root, "model")), "num_inference_steps": 1, "guidance_scale": 1}
    (root / "arms/base.yaml").write_text(json.dumps(settings))
    experiment = {
        "folder": "outputs/experiment",
        "arms": [f"{root}/arms/base.yaml"],
        "prompts": f"{given(root, 'prompts')}/prompts.txt",
        "image_seeds": [0, 1],
        "metrics": ["oracle"],
        "quality": False,
    }
    (root / "arms/experiment.yaml").write_text(json.dumps(experiment))


def make_drawn(root: Path) -> None:
    """An arm's folder: pictures, scores, the quality guard's figures."""
    arms, prompts = given(root, "arms"), given(root, "prompts") / "prompts.txt"
    where = ["--prompts", prompts, "--seeds", "0", "1", "--outdir", root / "drawn"]
    succeeds(evaluate.main, ["generate", "--arms", arms / "base.yaml", *where])
    succeeds(evaluate.main, ["align", root / "drawn/base", "--metrics", "oracle", "shapes-clip"])
    succeeds(evaluate.main, ["quality", root / "drawn/base"])


def make_choices(root: Path) -> None:
    """Candidates that were drawn, judged and compared."""
    words = ["choose", "--prompts", given(root, "prompts") / "prompts.txt", "--model", given(root, "model")]
    words += ["--dpt", given(root, "dpt"), "--candidates", "2", "--steps", "2", "--scale", "1", "--where", "0.5", "1"]
    succeeds(evaluate.main, [*words, "--dtype", "float32", "--outdir", root / "choices"])


def make_figures(root: Path) -> None:
    """What is made of an arm's folder: packed figures, tables, a picture for reports; and figures of a probe."""
    drawn, folder = given(root, "drawn"), root / "figures"
    (folder / "choices").mkdir(parents=True)
    succeeds(evaluate.main, ["pack", drawn / "base", "--output", folder / "packed.json"])
    succeeds(evaluate.main, ["table", drawn / "base", "--by", "correct", "--output", folder / "tables"])
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "figure.png")
    for prompt, seed in itertools.product("abcd", range(2)):
        scores = {f"adapter-{k}": [0.1 * k * seed, float(seed**k)] for k in range(5)}
        record = {"prompt": prompt, "category": "size", "seed": seed, "value": float(seed), "scores": scores}
        append_line(folder / "choices/candidates.jsonl", record | {"settings": "same"})
    for name, length in (("near", 1e-6), ("far", 0.1)):  # arms that follow a score
        arm = Path(shutil.copytree(drawn / "base", folder / "arms" / name))
        settings = json.loads((arm / "arm.json").read_text())
        (arm / "arm.json").write_text(json.dumps(settings | {"dpt": "adapter", "correction_norm": length}))
        lines = (arm / "metadata.jsonl").read_text().splitlines()
        lines = [json.dumps(json.loads(line) | {"scores": [0.1 * k]}) for k, line in enumerate(lines)]
        (arm / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run, config = given(root, "run"), REPOSITORY / "configs/sd21/probe.yaml"
    words = ["itm", run / "run", "--config", config, "--num_samples", "2", "--timesteps", "500"]
    succeeds(evaluate.main, [*words, "--output", folder / "probes", "--set", *of_coco(root)])


def make_run(root: Path) -> None:
    """A training run of two steps."""
    given(root, "model"), given(root, "coco")
    places = [f"output_folder={root}/run", "run_name=run"]
    succeeds(train_probe.main, [REPOSITORY / "configs/sd21/probe.yaml", *of_coco(root), *places])


def make_map(root: Path) -> None:
    """A map of probes, of one step each."""
    given(root, "coco")
    words = ["probe-map", REPOSITORY / "configs/sd21/probe.yaml", *of_coco(root), *MAP]
    more = ["--controls", "constant_text", "--num_samples", "2", "--timesteps", "500", "--output", root / "map"]
    succeeds(evaluate.main, [*words, *more])


def make_clip(root: Path) -> None:
    """A small random OpenCLIP model: the file of its config, and that of its weights."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (root / "clip").mkdir()
    (root / "clip/tiny.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**config).state_dict(), root / "clip/weights.pt")


def make_labelled(root: Path) -> None:
    """Pictures with verdicts, as pretraining leaves them, and a set of them to label."""
    folder = root / "labelled/samples/step_0000001"
    folder.mkdir(parents=True)
    records = []
    for k, prompt in enumerate(PROMPTS):
        Image.fromarray(np.full((128, 128, 3), 200, np.uint8)).save(folder / f"{k:04d}.png")
        records.append({"category": "single", "prompt": prompt, "seed": k, "label": "correct", "reason": ""})
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    succeeds(label_main, ["collect", folder, "--count", "2", "--folder", root / "labelled/set"])


def make_pretrained(root: Path) -> None:
    """What a pretraining leaves that others read: the curve of its U-Net, and the state of a stage that was killed."""
    succeeds(pretrain_main, [REPOSITORY / "configs/shapes/pretrain.yaml", *PRETRAIN, f"folder={root}/pretrained"])
    shutil.rmtree(root / "pretrained/clip")
    losses = {"val_loss": 0.5, "val_loss_unweighted": 0.5, "loss": 0.5}
    record = {"step": 10, "grad_norm": 1.0} | losses | {"correct": 0.5, "misaligned": 0.3, "malformed": 0.2}
    (root / "pretrained/unet.metrics.jsonl").write_text(2 * (json.dumps(record) + "\n"))


MAKERS = {
    name.removeprefix("make_"): made
    for name, made in list(globals().items())
    if name.startswith("make_") and name != "make_tree"
}


def given(root: Path, name: str) -> Path:
    """The folder of a good input, made now where it is not there yet."""
    if not (root / name).exists():
        MAKERS[name](root)
    return root / name
