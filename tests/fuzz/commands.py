"""Good command lines of every command, of which targets spoil one thing each."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.inputs import MAP, OWN, PRETRAIN, RELEASED, REPOSITORY, TINY

Spoil = Callable[[Path, random.Random], tuple[str, bool | None, list[str]]]


@dataclass(frozen=True)
class Command:
    """A good command line.

    Attributes:
        words: "{base}" stands for the folder of good inputs, "{here}" for the case's own.
        copies: inputs that lie in the case's folder.
        changes: patterns of files that it is there to change; a "+" before one: to add to, "~": to move aside.
        good: its exit codes on good input.
        reports: it ends with 1 where it reports what is wrong.
        passes_over: it goes on from an older file where the newest is damaged, and says so.
        blocks: it serves or measures for long, so that only what must be refused is tried.
    """

    module: str
    words: tuple[str, ...]
    copies: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    good: tuple[int, ...] = (0,)
    reports: bool = False
    passes_over: bool = False
    blocks: bool = False


@dataclass(frozen=True)
class Target:
    """Something to be spoilt: a file, or a flag, `number` where it takes one.

    `spoil` changes the case's folder, and returns what it did, whether that has to be refused, and words to add to the
    command.
    """

    name: str
    command: str
    spoil: Spoil
    number: bool = False


def _command(module: str, text: str, *copies: str, **more) -> Command:
    return Command(module, tuple(text.split()), copies, **more)


CONFIG = f"{REPOSITORY}/configs/sd21/probe.yaml"
TRAINING = f"{CONFIG} {' '.join(TINY)} model.name={{base}}/model data.kind=coco optim.steps=1"
SHAPES = f"{REPOSITORY}/configs/shapes"
DRAW = "--model {base}/model --ddim_steps 1 --skip_grid --device cpu"
ONE = f"{DRAW} --prompt circle --n_samples 1"
ITM = f"--config {CONFIG} --num_samples 2 --timesteps 500"
OF_COCO = f"{' '.join(TINY)} model.name={{base}}/model data.kind=coco data.root={{base}}/coco"
RUN_FILES = (
    "+run/run/log.txt",
    *(f"run/run/{name}" for name in ("config.yaml", "metrics.jsonl", "curves.png", "checkpoints/step_*")),
)
COMMANDS = {
    "txt2img": _command("txt2img", f"{ONE} --outdir {{here}}/out"),
    "txt2img, prompts": _command(
        "txt2img", f"{DRAW} --n_samples 1 --from-file {{here}}/prompts/prompts.txt --outdir {{here}}/out", "prompts"
    ),
    "txt2img, going on": _command(
        "txt2img",
        f"{DRAW} --prompt star --n_samples 1 --skip_existing --outdir {{here}}/pictures",
        "pictures",
        changes=("+pictures/metadata.jsonl",),
    ),
    "txt2img, dpt": _command("txt2img", f"{ONE} --outdir {{here}}/out --dpt {{here}}/dpt", "dpt"),
    "txt2img, lora": _command("txt2img", f"{ONE} --outdir {{here}}/out --lora {{here}}/lora", "lora"),
    "txt2img, model": _command("txt2img", f"{ONE} --outdir {{here}}/out --model {{here}}/model", "model"),
    "dpt.checkpoint inspect": _command("dpt.checkpoint.__main__", "inspect {here}/dpt", "dpt"),
    "dpt.checkpoint inspect, released": _command(
        "dpt.checkpoint.__main__", f"inspect {{here}}/released {' '.join(RELEASED)}", "released"
    ),
    "dpt.checkpoint convert": _command(
        "dpt.checkpoint.__main__", f"convert {{here}}/released {{here}}/out/dpt {' '.join(RELEASED)}", "released"
    ),
    "dpt.data check": _command("dpt.data.__main__", "check {here}/coco", "coco", good=(0, 1), reports=True),
    "dpt.data check, leak_free": _command(
        "dpt.data.__main__",
        "check {here}/coco --leak_free {here}/list.json",
        "coco",
        good=(0, 1),
        reports=True,
    ),
    "dpt.data cache-latents": _command(
        "dpt.data.__main__",
        "cache-latents --model {base}/model --images {here}/coco/train2014 --output {here}/coco/latents --device cpu",
        "coco",
        changes=("coco/latents/latents.json", "+coco/latents/checksums_*"),
    ),
    "dpt.data mine-negatives": _command(
        "dpt.data.__main__",
        "mine-negatives --captions {here}/coco/annotations/captions_train2014.json --images {here}/coco/train2014 "
        "--clip {here}/clip/tiny.json --pretrained {here}/clip/weights.pt --num_texts 3 --num_images 2 "
        "--output {here}/out/itm",
        *("coco", "clip"),
    ),
    "dpt.data trajectories": _command(
        "dpt.data.__main__",
        "trajectories --device cpu {here}/own/settings.yaml prompts={here}/own/prompts.txt output={here}/out/own "
        + " ".join(OWN).replace("[0, 1]", "[0,1]"),
        "own",
    ),
    "dpt.data trajectories, going on": _command(
        "dpt.data.__main__",
        "trajectories --device cpu {base}/own/settings.yaml prompts={base}/own/prompts.txt output={here}/own/drawn "
        + " ".join(OWN).replace("[0, 1]", "[0,1]"),
        "own",
        changes=("+own/drawn/shards.jsonl", "+own/drawn/labels_shapes-clip.jsonl", "own/drawn/00*"),
    ),
    "train_probe, trajectories": _command(
        "train_probe",
        f"{REPOSITORY}/configs/sd21/verifier.yaml {' '.join(TINY)} model.name={{base}}/model optim.steps=1 "
        "data.labels=shapes-clip data.trajectories={here}/own/drawn output_folder={here}/out",
        "own",
    ),
    "dpt.verify": _command(
        "dpt.verify.__main__",
        "--model {base}/model --dpt {here}/dpt --coco {here}/coco --num_pairs 2 --steps 1 --device cpu "
        "--outdir {here}/out",
        *("coco", "dpt"),
        good=(0, 1),
        reports=True,
    ),
    "train_probe": _command("train_probe", f"{TRAINING} data.root={{here}}/coco output_folder={{here}}/out", "coco"),
    "train_probe, latents": _command(
        "train_probe", f"{TRAINING} data.root={{here}}/coco data.latents=latents output_folder={{here}}/out", "coco"
    ),
    "train_probe, going on": _command(
        "train_probe",
        f"{TRAINING} data.root={{base}}/coco output_folder={{here}}/run resume=true optim.steps=3",
        "run",
        changes=RUN_FILES,
        passes_over=True,
    ),
    "train_probe, dry run": _command("train_probe", f"--dry-run {TRAINING} data.root={{base}}/coco", "coco"),
    "train_tune, dry run": _command(
        "train_tune", f"--dry-run {TRAINING} data.root={{base}}/coco init_from={{here}}/run/run", "run"
    ),
    "evaluate generate": _command(
        "evaluate",
        "generate --arms {here}/arms/base.yaml --prompts {here}/prompts/prompts.txt --seeds 0 --outdir {here}/out",
        *("arms", "prompts"),
    ),
    "evaluate generate, nss1k": _command(
        "evaluate",
        "generate --arms {here}/arms/base.yaml --prompts nss1k:{here}/prompts --seeds 0 --outdir {here}/out",
        *("arms", "prompts"),
    ),
    "evaluate generate, compbench": _command(
        "evaluate",
        "generate --arms {here}/arms/base.yaml --prompts compbench:{here}/prompts/compbench --seeds 0 --compbench "
        "--outdir {here}/out",
        *("arms", "prompts"),
    ),
    "evaluate generate, going on": _command(
        "evaluate",
        "generate --arms {base}/arms/base.yaml --prompts {base}/prompts/prompts.txt --seeds 0 1 2 "
        "--outdir {here}/drawn",
        "drawn",
        changes=("+drawn/base/metadata.jsonl", "~drawn/base/samples/0000[01]_00000[01]_0.png"),
    ),
    "evaluate align": _command(
        "evaluate", "align {here}/drawn/base --metrics oracle", "drawn", changes=("+drawn/base/oracle.jsonl",)
    ),
    "evaluate align, clip": _command(  # these weights are of another model, so that all of it is refused
        "evaluate",
        "align {here}/drawn/base --metrics clip --clip_model ViT-S-32-alt --clip_weights {here}/clip/weights.pt",
        *("drawn", "clip"),
        good=(2,),
    ),
    "evaluate choose": _command(
        "evaluate",
        "choose --prompts {here}/prompts/prompts.txt --model {base}/model --dpt {here}/dpt --candidates 2 --steps 2 "
        "--scale 1 --where 0.5 1 --dtype float32 --outdir {here}/out",
        *("prompts", "dpt"),
    ),
    "evaluate choose, going on": _command(
        "evaluate",
        "choose --prompts {base}/prompts/prompts.txt --model {base}/model --dpt {base}/dpt --candidates 2 --steps 2 "
        "--scale 1 --where 0.5 1 --dtype float32 --outdir {here}/choices",
        "choices",
        changes=("+choices/candidates.jsonl", "choices/choose.*"),
    ),
    "evaluate quality": _command(
        "evaluate", "quality {here}/drawn/base", "drawn", changes=("drawn/base/quality.json",)
    ),
    "evaluate pack": _command("evaluate", "pack {here}/drawn/base --output {here}/out/packed.json", "drawn"),
    "evaluate pack, going on": _command(
        "evaluate",
        "pack {here}/drawn/base --output {here}/figures/packed.json",
        *("drawn", "figures"),
        changes=("figures/packed.json",),
    ),
    "evaluate table": _command("evaluate", "table {here}/drawn/base --output {here}/out", "drawn"),
    "evaluate table, packed": _command(
        "evaluate", "table {here}/figures/packed.json --output {here}/out --by correct", "figures"
    ),
    "evaluate report": _command(
        "evaluate",
        "report {here}/drawn/base --tables {here}/figures/tables/table.json --figures {here}/figures/figure.png "
        "--probes {here}/figures/probes/itm.json --output {here}/out/page.html",
        *("drawn", "figures"),
    ),
    "evaluate pareto": _command(
        "evaluate", "pareto {here}/figures/packed.json --output {here}/out/pareto.png", "figures"
    ),
    "evaluate worth": _command("evaluate", "worth {here}/figures/choices --output {here}/out/worth.png", "figures"),
    "evaluate overoptimization": _command(
        "evaluate",
        "overoptimization {here}/figures/arms/near {here}/figures/arms/far --output {here}/out/over.png",
        "figures",
    ),
    "evaluate experiment": _command("evaluate", "experiment --dry-run {here}/arms/experiment.yaml", "arms"),
    "evaluate experiment, packed": _command(
        "evaluate",
        "experiment {here}/arms/experiment.yaml packed={here}/figures/packed.json folder={here}/out --steps table",
        *("arms", "figures"),
    ),
    "evaluate itm": _command(
        "evaluate",
        f"itm {{here}}/run/run {ITM} --output {{here}}/figures/probes --set {OF_COCO}",
        *("run", "figures"),
        changes=("figures/probes/itm.*", "figures/probes/records/*"),
    ),
    "evaluate rec": _command("evaluate", f"rec {{here}}/run/run {ITM} --output {{here}}/out --set {OF_COCO}", "run"),
    "evaluate probe-map": _command(
        "evaluate",
        f"probe-map {CONFIG} {OF_COCO} {' '.join(MAP)} --controls constant_text --num_samples 2 --timesteps 500 "
        "--output {here}/map",
        "map",
        changes=("map/*", "map.png"),
    ),
    "dpt.shapes.label collect": _command(
        "dpt.shapes.label", "collect {here}/labelled/samples/step_0000001 --count 2 --folder {here}/out", "labelled"
    ),
    "dpt.shapes.label sheets": _command(
        "dpt.shapes.label", "sheets {here}/out --folder {here}/labelled/set", "labelled"
    ),
    "dpt.shapes.quality": _command(
        "dpt.shapes.quality", "curve --run {here}/pretrained --record {here}/results.md", "pretrained"
    ),
    "dpt.shapes.pretrain": _command(
        "dpt.shapes.pretrain",
        f"{SHAPES}/pretrain.yaml stages=[] threads=1 folder={{here}}/out output={{here}}/out/model",
    ),
    "dpt.shapes.pretrain, going on": _command(
        "dpt.shapes.pretrain",
        f"{SHAPES}/pretrain.yaml {' '.join(PRETRAIN)} folder={{here}}/pretrained output={{here}}/out/model",
        "pretrained",
        changes=("pretrained/clip.*",),
    ),
    "dpt.demo": _command("dpt.demo.__main__", "--model {base}/model --device cpu", blocks=True),
    "dpt.benchmark": _command("dpt.benchmark.__main__", "sampling --model shapes", blocks=True),
}
