"""What can be spoilt: files of every reader, number flags and settings of every command, words in place of others.

Flags are found by walking the commands' parsers, settings by walking their dataclasses; so what is added is tried too.
"""

import argparse
import importlib
import inspect
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

from dpt.bounds import Bounds
from dpt.config import DPTConfig, TrainConfig
from dpt.evaluation.arms import Arm
from dpt.evaluation.experiment import Experiment
from dpt.shapes.pretrain import PretrainConfig
from tests.fuzz import damage
from tests.fuzz.inputs import MAP, PRETRAIN, RELEASED, REPOSITORY, TINY

Spoil = Callable[[Path, random.Random], tuple[str, bool | None, list[str]]]


@dataclass(frozen=True)
class Command:
    """A good command line.

    Attributes:
        words: "{base}" stands for the folder of good inputs, "{here}" for the case's own.
        copies: inputs that lie in the case's folder.
        changes: patterns of files that it is there to change; a "+" before one: to add to, "~": to move aside.
        good: its exit codes on good input, another than 2 also on what it reports.
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
    "dpt.checkpoint inspect": _command("dpt.checkpoint", "inspect {here}/dpt", "dpt"),
    "dpt.checkpoint inspect, released": _command(
        "dpt.checkpoint", f"inspect {{here}}/released {' '.join(RELEASED)}", "released"
    ),
    "dpt.checkpoint convert": _command(
        "dpt.checkpoint", f"convert {{here}}/released {{here}}/out/dpt {' '.join(RELEASED)}", "released"
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
    "dpt.verify": _command(
        "dpt.verify",
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
        "dpt.shapes.quality", "curve --run {here}/pretrained --output {here}/results.md", "pretrained"
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
    "dpt.demo": _command("dpt.demo", "--model {base}/model --device cpu", blocks=True),
    "dpt.benchmark": _command("dpt.benchmark", "sampling --model shapes", blocks=True),
}


# Files

MANIFEST = ("file:str", "prompt:str", "seed:int", "category:any", "noise_seed:any", "seconds:any", ":any")
CAPTIONS = ("images.*.id:id", "images.*.file_name:str", "annotations.*.image_id:id", "annotations.*.caption:str")
SIZES = ("images.*.width:any", "images.*.height:any")
REFERRED = (
    *("images.*.id:id", "images.*.file_name:str", "images.*.caption:str", *SIZES, "images.*.original_id:any"),
    *("annotations.*.image_id:id", "annotations.*.bbox.*:float", "annotations.*.bbox:list"),
    *("annotations.*.tokens_positive.*.*:int", "annotations.*.tokens_positive:any", "annotations:list", ":any"),
)
ITEM = ("title:str", "filepath:str", "neg_caption:str", "neg_image:str")
LATENTS = ("vae:list", "vae.*:float", "scaling_factor:float", "size:int", "model:any", ":any")
SCORES = ("file:str", "sha256:any", "label:any", "objects:any", "scorer:any", ":any")
PACKED = ("@0.pictures:list", "@0.categories:any", "@1.arm:str", "@1.settings:any", "@1.costs:any", "@1.figures:any")
MODEL_CONFIGS = {
    "unet/config.json": (
        "block_out_channels.*",
        "sample_size",
        "in_channels",
        "cross_attention_dim",
        "norm_num_groups",
    ),
    "vae/config.json": ("block_out_channels.*", "scaling_factor", "latent_channels", "layers_per_block"),
    "text_encoder/config.json": ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"),
    "scheduler/scheduler_config.json": ("beta_start", "num_train_timesteps", "beta_schedule", "prediction_type"),
    "tokenizer/tokenizer_config.json": ("model_max_length", "unk_token"),
    "model_index.json": ("unet.1", "vae", "_class_name"),
}
TREE = "coco/annotations"
ALL_LINES = ("drawn/base/metadata.jsonl", MANIFEST), ("drawn/base/oracle.jsonl", SCORES)
GOING_ON = (*ALL_LINES, ("drawn/base/quality.json", ("frechet:any", "diversity:any", "pictures:any", ":any")))
JSON_FILES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "txt2img, going on": (("pictures/metadata.jsonl", (*MANIFEST, "settings:any")),),
    "txt2img, model": tuple((f"model/{name}", tuple(f"{k}:any" for k in keys)) for name, keys in MODEL_CONFIGS.items()),
    "dpt.data check": (
        (f"{TREE}/captions_train2014.json", CAPTIONS),
        (f"{TREE}/finetune_refall_train.json", REFERRED),
        ("coco/itm/train/00003.json", ITEM),
        ("coco/itm/train/imgname2txtid.json", ("*:list", "*.*:int", ":any")),
        ("coco/latents/latents.json", LATENTS),
        ("coco/latents/checksums_0_of_1.jsonl", ("file:str", "sha256:str")),
    ),
    "dpt.data check, leak_free": ((f"{TREE}/finetune_refall_train.json", REFERRED),),
    "dpt.data cache-latents": (("coco/latents/latents.json", LATENTS),),
    "dpt.data mine-negatives": ((f"{TREE}/captions_train2014.json", CAPTIONS), ("clip/tiny.json", ("embed_dim:any",))),
    "dpt.verify": (
        (f"{TREE}/captions_val2014.json", ("images.*.file_name:str", "annotations.*.caption:str")),
        (f"{TREE}/finetune_refcoco_val.json", ("annotations.*.bbox.*:float", "annotations.*.tokens_positive.*.*:any")),
    ),
    "train_probe": (
        (f"{TREE}/finetune_refall_train.json", REFERRED),
        (f"{TREE}/finetune_refcoco_val.json", REFERRED),
        ("coco/itm/train/imgname2txtid.json", ("*:list", "*.*:int", ":any")),
    ),
    "train_probe, latents": (("coco/latents/latents.json", LATENTS),),
    "train_probe, going on": (
        ("run/run/metrics.jsonl", ("step:any", "loss_ce:any", ":any")),
        ("run/run/checkpoints/step_0000002/training_state/state.json", ("step:any", ":any")),
    ),
    "evaluate generate, nss1k": (("prompts/part.json", ("*.captions:str", ":any")),),
    "evaluate generate, going on": (ALL_LINES[0], ("drawn/base/arm.json", ("model:any", "weights:any", ":any"))),
    "evaluate align": ALL_LINES,
    "evaluate quality": (GOING_ON[0], GOING_ON[2]),
    "evaluate pack": (*GOING_ON, ("drawn/base/arm.json", (":any",))),
    "evaluate pack, going on": (("figures/packed.json", PACKED),),
    "evaluate table": GOING_ON,
    "evaluate table, packed": (("figures/packed.json", PACKED),),
    "evaluate report": (
        *ALL_LINES,
        ("figures/tables/table.json", ("arms:any", "arms.*:any", "by_category:any", ":any")),
        ("figures/probes/itm.json", ("*:any", "*.*:any", ":any")),
    ),
    "evaluate pareto": (("figures/packed.json", PACKED),),
    "evaluate experiment, packed": (("figures/packed.json", PACKED),),
    "evaluate itm": (("figures/probes/records/itm_run_all_val.json", ("identity:any", "records:any", ":any")),),
    "dpt.shapes.label collect": (
        ("labelled/samples/step_0000001/verdicts.jsonl", ("prompt:any", "category:any", "seed:any", ":any")),
    ),
    "dpt.shapes.label sheets": (("labelled/set/labels.jsonl", ("prompt:any", "label:any", ":any")),),
    "dpt.shapes.quality": (("pretrained/unet.metrics.jsonl", ("step:any", "val_loss:any", "correct:any", ":any")),),
}
OTHER_FILES: dict[str, tuple[tuple[Callable, tuple[str, ...]], ...]] = {
    "txt2img, prompts": ((damage.text_lines, ("prompts/prompts.txt",)),),
    "txt2img, dpt": ((damage.of_tensors, ("dpt/adapter.safetensors", "dpt/lora/pytorch_lora_weights.safetensors")),),
    "txt2img, lora": ((damage.of_tensors, ("lora/pytorch_lora_weights.safetensors",)),),
    "txt2img, model": (
        (
            damage.of_tensors,
            tuple(f"model/{p}/diffusion_pytorch_model.safetensors" for p in ("unet", "vae"))
            + ("model/text_encoder/model.safetensors",),
        ),
    ),
    "txt2img, going on": ((damage.foreign("samples"), ("pictures",)),),
    "dpt.checkpoint inspect": ((damage.of_tensors, ("dpt/adapter.safetensors",)),),
    "dpt.checkpoint inspect, released": ((damage.of_tensors, ("released/pytorch_model.bin",)),),
    "dpt.checkpoint convert": ((damage.of_tensors, ("released/pytorch_model.bin",)),),
    "dpt.data check": (
        (damage.literal, ("coco/itm/train/00002.json", "coco/itm/val.tsv")),
        (damage.of_array, ("coco/latents/COCO_train2014_000000000000.npy",)),
        (damage.of_image, ("coco/train2014/COCO_train2014_000000000000.jpg",)),
    ),
    "dpt.data cache-latents": ((damage.foreign("."), ("coco/latents",)),),
    "dpt.data mine-negatives": (
        (damage.of_tensors, ("clip/weights.pt",)),
        (damage.of_image, ("coco/train2014/COCO_train2014_000000000000.jpg",)),
    ),
    "dpt.verify": ((damage.of_tensors, ("dpt/adapter.safetensors",)),),
    "train_probe": (
        (damage.literal, ("coco/itm/val.tsv",)),
        (damage.of_image, ("coco/train2014/COCO_train2014_000000000000.jpg",)),
    ),
    "train_probe, latents": ((damage.of_array, ("coco/latents/COCO_train2014_000000000000.npy",)),),
    "train_probe, going on": (
        (damage.of_tensors, ("run/run/checkpoints/step_0000002/training_state/optimizer.safetensors",)),
        (damage.of_tensors, ("run/run/checkpoints/step_0000002/adapter.safetensors",)),
        (damage.foreign("checkpoints/damaged_step_0000002"), ("run/run",)),
        (damage.text_lines, ("run/run/log.txt",)),
    ),
    "evaluate generate": ((damage.text_lines, ("prompts/prompts.txt", "arms/base.yaml")),),
    "evaluate generate, compbench": ((damage.text_lines, ("prompts/compbench/color_val.txt",)),),
    "evaluate generate, going on": ((damage.foreign("samples"), ("drawn/base",)),),
    "evaluate align": ((damage.of_image, ("drawn/base/samples/00000_000000_0.png",)),),
    "evaluate align, clip": ((damage.of_tensors, ("clip/weights.pt",)),),
    "evaluate report": ((damage.of_image, ("figures/figure.png", "drawn/base/samples/00000_000000_0.png")),),
    "evaluate itm": ((damage.of_tensors, ("run/run/checkpoints/step_0000002/adapter.safetensors",)),),
    "evaluate rec": ((damage.of_tensors, ("run/run/checkpoints/step_0000002/adapter.safetensors",)),),
    "dpt.shapes.label collect": ((damage.of_image, ("labelled/samples/step_0000001/0000.png",)),),
    "dpt.shapes.label sheets": ((damage.of_image, ("labelled/set/pictures.png",)),),
}
# Files that are read, of which any damage to the whole is tried; in those of True, any text is one.
WHOLE: dict[str, dict[str, bool]] = {
    "evaluate probe-map": {"map/probe_map.pt": False, "map/config.yaml": False},
    "dpt.shapes.pretrain, going on": {"pretrained/clip.pt": False, "pretrained/clip.yaml": False},
    "dpt.checkpoint inspect": {"dpt/config.yaml": False},
    "evaluate experiment": {"arms/experiment.yaml": False},
    "train_tune, dry run": {"run/run/checkpoints/step_0000002/config.yaml": False},
    "train_probe, going on": {"run/run/config.yaml": False},
}


def of_files() -> Iterator[Target]:
    """Damages of files."""
    for command, entries in JSON_FILES.items():
        for path, keys in entries:
            yield _file(command, path, _whole(path))
            for key in keys:
                yield _file(command, path, damage.of_json(key), key.partition(":")[0])
    for command, entries in OTHER_FILES.items():
        for spoil, paths in entries:
            for path in paths:
                yield _file(command, path, spoil, spoil.__name__)
                if Path(path).suffix and spoil is not damage.text_lines:
                    yield _file(command, path, _whole(path))
    for command, files in WHOLE.items():
        for path, any_text in files.items():
            yield _file(command, path, _whole(path, any_text))


def _whole(path: str, any_text: bool = False) -> Callable:
    lines = any_text or Path(path).suffix in (".jsonl", ".txt", ".tsv", ".yaml")

    def spoil(file: Path, rng: random.Random, *, folder: Path):
        return damage.whole(file, rng, lines=lines, folder=folder)

    return spoil


def _file(command: str, path: str, spoil: Callable, what: str = "as a whole") -> Target:
    def apply(folder: Path, rng: random.Random):
        what, refused = spoil(folder / path, rng, folder=folder)
        return what, None if COMMANDS[command].passes_over else refused, []

    return Target(f"{path} {what}", command, apply)


# Flags

FAR = ("0", "-1", "1000000000", str(2**63), "-0.5", "1e30")
NO_NUMBER = ("nan", "inf", "-inf", "1e400", "text", "", "1.5.2", "0x10")
WORDS = ("", "a\0b", "x" * 5000, "\udcff", "~nobody/x", "a\nb", "$x^{", "../..", "\u2028")
DEVICES = ("bogus", "meta", "cuda:9", "cuda", "", "xpu:-1", "cpu:7")
MODULES = dict.fromkeys(command.module for command in COMMANDS.values())
NO_WORDS = ("--output", "--outdir", "--record", "--work", "--folder", "--leak_free")  # a place of their own, below


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a command builds, caught when it begins to parse."""
    caught = []

    class Caught(Exception):
        pass

    def catch(self, *args, **kwargs):
        caught.append(self)
        raise Caught

    original = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = catch
    try:
        importlib.import_module(module).main([])
    except Caught:
        return caught[0]
    finally:
        argparse.ArgumentParser.parse_known_args = original
    raise AssertionError(f"{module} parses no arguments")


def actions(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    """Every flag, with the command and subcommand that it belongs to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from actions(command, f"{name} {word}")
        else:
            yield name, action


def of_flags() -> Iterator[Target]:
    """Every number flag of every command, and words and devices in place of other flags' values."""
    for module in MODULES:
        for name, action in actions(parser_of(module), module.removesuffix(".__main__")):
            if not action.option_strings or action.nargs == 0:
                continue
            command = _of_parser(name)
            flag = max(action.option_strings, key=len)
            if kind := _number_kind(action.type):
                for values in (FAR, NO_NUMBER):
                    spoil = _flag(flag, kind, values, _bounds(action.type), only_refused=COMMANDS[command].blocks)
                    yield Target(flag, command, spoil, number=True)
            elif not COMMANDS[command].blocks and not action.choices and flag not in NO_WORDS:
                yield Target(flag, command, _word(flag, DEVICES if flag == "--device" else WORDS))


def _of_parser(name: str) -> str:
    """The command that tries a parser's flags: that of its name, else the first whose name begins so."""
    found = [command for command in COMMANDS if command == name or command.startswith(f"{name},")]
    if not found:
        raise AssertionError(f"tests/fuzz/targets.py has no command for the parser of {name}")
    return next((command for command in found if "dry run" in command), found[0])


def _number_kind(of: object) -> type | None:
    """int or float, where a flag's type is one of them or `dpt.bounds.number` of one."""
    if of in (int, float):
        return of
    kind = inspect.getclosurevars(of).nonlocals.get("kind") if inspect.isfunction(of) else None
    return kind if kind in (int, float) else None


def _bounds(of: object) -> Bounds | None:
    return inspect.getclosurevars(of).nonlocals.get("bounds") if inspect.isfunction(of) else None


def _flag(flag: str, kind: type, values: tuple[str, ...], bounds: Bounds | None, *, only_refused: bool) -> Spoil:
    chosen = [text for text in values if not only_refused or out_of_range(kind, text, bounds)]

    def spoil(folder: Path, rng: random.Random):
        text = rng.choice(chosen)
        return f"{flag}={text}", out_of_range(kind, text, bounds), [f"{flag}={text}"]

    return spoil


def out_of_range(kind: type, text: str, bounds: Bounds | None) -> bool | None:
    """True where the text is no number of the flag, or one that it must refuse: without bounds, any below zero."""
    try:
        value = kind(text)
    except ValueError:
        return True
    if not math.isfinite(value):
        return True
    return (value not in bounds if bounds else value < 0) or None


def _word(flag: str, words: tuple[str, ...]) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        word = rng.choice(words)
        return f"{flag}={word[:30]!r}", None, [f"{flag}={word}"]

    return spoil


# Settings

VALUES = (
    "-1",
    "0",
    "1000000000",
    str(2**63),
    ".nan",
    ".inf",
    "-.inf",
    "text",
    "[]",
    "{}",
    "[-1]",
    "null",
    "1e400",
    "[[[",
)
NEGATIVE = {"samples.every", "itm_layer"}  # have a meaning below zero, where their bounds do not say so
SETTINGS = {
    ("train_probe, dry run", "train_tune, dry run"): (TrainConfig, ()),
    ("dpt.shapes.pretrain",): (PretrainConfig, ()),
    ("evaluate generate",): (Arm, ("--set",)),
    ("evaluate experiment",): (Experiment, ()),
}
PLACES = {"folder", "output", "output_folder", "cache_folder", "stages"}  # where a command writes, and whether at all


def numbers_of(schema: type, prefix: str = "") -> Iterator[tuple[str, type | None, Bounds | None]]:
    """Every setting: its dotted key; int or float where it is a number or a list of numbers; its bounds."""
    for entry in fields(schema):
        key = prefix + entry.name
        if is_dataclass(entry.type):
            yield key, None, None
            yield from numbers_of(entry.type, f"{key}.")
        elif key not in PLACES:
            kinds = {entry.type, *get_args(entry.type)} & {int, float} if get_origin(entry.type) is not dict else ()
            yield key, next(iter(kinds), None), entry.metadata.get("bounds")


def of_settings() -> Iterator[Target]:
    """Every setting, given as key=value, and those of a checkpoint, which lie in its config.yaml."""
    for commands, (schema, before) in SETTINGS.items():
        for k, (key, kind, bounds) in enumerate(numbers_of(schema)):
            yield Target(key, commands[k % len(commands)], _setting(key, kind, bounds, before))
    for key, kind, bounds in numbers_of(DPTConfig):
        yield Target(f"config.yaml {key}", "dpt.checkpoint inspect", _in_yaml("dpt/config.yaml", key, kind, bounds))


def _setting(key: str, kind: type | None, bounds: Bounds | None, before: tuple[str, ...]) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        text = rng.choice(VALUES)
        return f"{key}={text}", refused_setting(key, kind, text, bounds), [*before, f"{key}={text}"]

    return spoil


def _in_yaml(path: str, key: str, kind: type | None, bounds: Bounds | None) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        text = rng.choice(VALUES)
        description, _ = damage.of_yaml(key, text)(folder / path, rng, folder=folder)
        return description, refused_setting(key, kind, text, bounds), []

    return spoil


def refused_setting(key: str, kind: type | None, text: str, bounds: Bounds | None) -> bool | None:
    """True where no such setting can be of this value."""
    if text == "[[[":
        return True
    if kind is None:
        return None
    if text in (".nan", ".inf", "-.inf", "text", "{}", "1e400"):
        return True
    negative = text in ("-1", "[-1]") and (-1 not in bounds if bounds else key not in NEGATIVE)
    return negative or None


# Places

OUTPUTS = {
    "txt2img": ("--outdir", "folder"),
    "evaluate generate": ("--outdir", "folder"),
    "evaluate pack": ("--output", "file"),
    "evaluate table": ("--output", "folder"),
    "evaluate report": ("--output", "file"),
    "evaluate pareto": ("--output", "file"),
    "evaluate rec": ("--output", "folder"),
    "dpt.verify": ("--outdir", "folder"),
    "dpt.data mine-negatives": ("--output", "folder"),
    "dpt.data cache-latents": ("--output", "folder"),
    "dpt.data check, leak_free": ("--leak_free", "file"),
    "dpt.shapes.label collect": ("--folder", "folder"),
    "dpt.shapes.quality": ("--output", "file"),
}


def of_places() -> Iterator[Target]:
    """Outputs whose place is somebody's file, or a folder with somebody's files."""
    for command, (flag, kind) in OUTPUTS.items():
        for place in ("file", "folder"):
            yield Target(f"{flag} is a {place}", command, _taken(flag, kind, place))


def _taken(flag: str, kind: str, place: str) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        taken = folder / "taken"
        if place == "folder":
            damage.foreign(".")(taken, rng, folder=folder)
        else:
            taken.write_text("mine")
        inside = taken / "x" if place == "file" and kind == "file" else taken
        return (
            f"{flag} is {'under ' if inside != taken else ''}a {place} of somebody's",
            (kind == "file" or place == "file") or None,
            [f"{flag}={inside}"],
        )

    return spoil


def undamaged() -> Iterator[Target]:
    """Every command on good input, without which the others would say nothing."""
    for command, one in COMMANDS.items():
        if not one.blocks:
            yield Target("nothing", command, lambda folder, rng: ("nothing is wrong", False, []))


def all_targets(seed: int) -> list[Target]:
    """Every target: commands without damage, number flags, one of each file of each command, then the others.

    The seed gives the order within these, so that few cases too cover all commands, number flags and readers.
    """
    rng = random.Random(seed)
    ahead, rest = list(undamaged()), []
    flags, files = list(of_flags()), list(of_files())
    for targets in (flags, files):
        rng.shuffle(targets)
    seen = set()
    for target in files:
        key = (target.command, target.name.split()[0])
        (rest if key in seen else ahead).append(target)
        seen.add(key)
    ahead += [flag for flag in flags if flag.number]
    rest += [*(flag for flag in flags if not flag.number), *of_settings(), *of_places()]
    rng.shuffle(rest)
    return [*ahead, *rest]
