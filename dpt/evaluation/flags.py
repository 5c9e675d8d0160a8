"""The flags of evaluate.py's subcommands. Imports nothing heavy, so that `--help` and bad arguments answer at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

from dpt.base_models import CKPT_FOLDER, DTYPE_NAMES
from dpt.command_line import number
from dpt.results import LOG

SEEDS_APART = 1000  # seed s of the k-th prompt stands for the noise of seed k * SEEDS_APART + s
METRICS = ("oracle", "shapes-clip", "clip", "blip")
STEPS = ("train", "measure", "draw", "table")
OPEN_CLIP_FOLDER, BLIP_FOLDER = CKPT_FOLDER / "open_clip", CKPT_FOLDER / "blip-itm-base-coco"
OPEN_CLIP_MODEL = "ViT-H-14"
EARLY_TIMESTEPS = (50, 100, 200, 300)
MAP_TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)
MAP_CONTROLS = ("constant_text", "empty_prompt")

COUNT, SCALE = number(int, at_least=1), number(float, at_least=0, below=1000)
TIMESTEP = number(int, at_least=0)
NUM_SAMPLES = {"type": number(int, at_least=1, at_most=1_000_000), "default": 500}
NOISE_SEEDS = {"type": number(int, at_least=0, below=SEEDS_APART), "nargs": "+", "default": [0, 1, 2, 3]}
FOLDERS, OVERRIDES = {"nargs": "+", "type": Path}, {"nargs": "*", "default": [], "metavar": "key=value"}
FOLDER = {"type": Path, "required": True}
PROMPTS = {"required": True, "help": "a prompt set; see `dpt.evaluation.prompts`"}
PER_CATEGORY = {"type": COUNT, "help": "only the first so many prompts a category"}


def _batch_size(default: int, what: str = "pictures") -> dict:
    return {"type": COUNT, "default": default, "help": f"{what} at once (default: {default})"}


def _record(what: str) -> dict:
    options = {"nargs": "?", "const": LOG, "type": Path, "metavar": "FILE"}
    return options | {"help": f"put the {what} into a Markdown file too (default: the page of docs/log that has them)"}


def _add_judges(add: Callable) -> None:
    """Flags of the networks that judge."""
    add("--clip_model", default=OPEN_CLIP_MODEL, help=f"of OpenCLIP (default: {OPEN_CLIP_MODEL})")
    add("--clip_weights", type=Path, help="its weights' file (default: ckpt/open_clip/<model>.safetensors)")
    add("--blip", type=Path, default=BLIP_FOLDER, help="a BLIP-ITM folder of transformers")


def judge_options(args: argparse.Namespace) -> dict:
    """The flags of `_add_judges` as `dpt.evaluation.judges.make_judge` takes them."""
    return {"clip_model": args.clip_model, "clip_weights": args.clip_weights, "blip": args.blip}


def _add_generate(add: Callable) -> None:
    add("--arms", nargs="+", type=Path, required=True, metavar="YAML")
    add("--prompts", **PROMPTS)
    add("--per_category", **PER_CATEGORY)
    add("--seeds", **NOISE_SEEDS, help="of the noise (default: 0 1 2 3)")
    add("--batch_size", **_batch_size(32))
    add("--outdir", **FOLDER)
    add("--compbench", action="store_true", help="name files as T2I-CompBench does")
    add("--set", **OVERRIDES, help="changes every arm")
    add("--folder", default="outputs/experiment", help="what {folder} stands for in the arms' dpt and lora")


def _add_align(add: Callable) -> None:
    add("folders", **FOLDERS, help="folders of arms")
    add("--metrics", nargs="+", choices=METRICS, required=True)
    add("--batch_size", **_batch_size(64))
    _add_judges(add)


def _add_quality(add: Callable) -> None:
    add("folders", **FOLDERS, help="folders of arms")


def _add_choose(add: Callable) -> None:
    fraction, where = number(float, above=0, at_most=1), [0.15, 0.2, 0.25, 0.4, 1.0]
    help_where = "when to choose, as fractions of the steps (default: 0.15 0.2 0.25 0.4 1)"
    help_predicted = "a scorer of the predicted clean picture, decoded, as another chooser"
    candidates = number(int, at_least=2, at_most=1024)
    help_seed = "of the first candidate's noise, as one of generate's --seeds (default: 0)"
    add("--prompts", **PROMPTS)
    add("--per_category", **PER_CATEGORY)
    add("--model", default="shapes")
    add("--dpt", nargs="+", required=True, metavar="PATH", help="adapters; the LoRA of the first, if any, draws")
    add("--candidates", type=candidates, default=8, help="of each prompt (default: 8)")
    add("--image_seed", type=number(int, at_least=0, below=SEEDS_APART), default=0, help=help_seed)
    add("--scale", type=SCALE, help="guidance scale (default: the model's)")
    add("--steps", type=number(int, at_least=2, at_most=500), help="sampling steps (default: the model's)")
    add("--where", type=fraction, nargs="+", default=where, help=help_where)
    add("--dtype", choices=DTYPE_NAMES, default="bfloat16")
    add("--scorer", choices=METRICS, default="oracle", help="who judges (default: oracle)")
    add("--predicted", choices=METRICS, help=help_predicted)
    add("--batch_size", **_batch_size(32, "candidates"))
    add("--categories", nargs="+", help="what the tables are of (default: all but unseen)")
    add("--outdir", **FOLDER)
    add("--record", **_record("tables"))
    _add_judges(add)


def _add_table(add: Callable) -> None:
    add("folders", **FOLDERS, help="folders of arms, or of an arm's training seeds, or files of `pack`")
    add("--against", help="name of the arm that others are compared with")
    add("--categories", nargs="+", help="only these (default: all but unseen)")
    add("--by", nargs="*", default=[], metavar="FIGURE", help="figures to show by category")
    add("--output", **FOLDER, help="a folder")


def _add_rec(add: Callable) -> None:
    help_timesteps = "noise levels of the mean, beside the paper's 500 (default: 50 100 200 300)"
    add("checkpoints", **FOLDERS, help="runs, weights' folders or released files")
    add("--config", **FOLDER, help="a training config: model, data, precision")
    add("--set", **OVERRIDES, help="changes the config")
    add("--split", choices=("val", "test"), default="val", help="shapes: of the scenes (default: val)")
    add("--num_samples", **NUM_SAMPLES, help="of each set, evenly spread (default: 500)")
    add("--timesteps", type=TIMESTEP, nargs="+", default=[*EARLY_TIMESTEPS], help=help_timesteps)
    add("--output", **FOLDER, help="a folder")


def _add_itm(add: Callable) -> None:
    _add_rec(add)
    negatives = ("mined", "edited")
    add("--negatives", nargs="+", choices=negatives, default=[], help="shapes: each a set of its own")
    add("--zero_shot", action="store_true", help="also by denoising error, without an adapter")


def _add_probe_map(add: Callable) -> None:
    controls = {"default": MAP_CONTROLS, "choices": ("random_unet", "empty_prompt", "constant_text", "shuffled_labels")}
    add("config", type=Path, help="a training config")
    add("overrides", nargs="*", metavar="key=value")
    add("--controls", nargs="*", **controls, help="(default: constant_text empty_prompt)")
    add("--timesteps", type=TIMESTEP, nargs="+", default=MAP_TIMESTEPS, help="that are measured")
    add("--num_samples", **NUM_SAMPLES, help="val samples that are measured (default: 500)")
    add("--output", **FOLDER, help="a folder")
    add("--record", **_record("map"))


def _add_worth(add: Callable) -> None:
    add("folder", type=Path, help="a folder of `choose`, of several adapters")
    add("--arms", nargs="+", type=Path, default=[], help="folders of arms, each drawn by the gradient of one of them")
    add("--against", default="base", help="the arm among them that draws without one (default: base)")
    add("--measured", nargs="+", type=Path, default=[], help="itm.json and rec.json of checkpoints named as the arms")
    add("--candidates", type=number(int, at_least=2, at_most=1024), default=2, help="chosen from (default: 2)")
    add("--choose_at", type=number(float, above=0, at_most=1), default=0.25, help="where (default: 0.25)")
    add("--output", **FOLDER, help="the figure; its numbers stand beside it")


def _add_overoptimization(add: Callable) -> None:
    add("folders", **FOLDERS, help="folders of arms, drawn and aligned: adapters followed by several lengths each")
    add("--output", **FOLDER, help="the figure; its numbers stand beside it")


def _add_experiment(add: Callable) -> None:
    jobs = {"type": number(int, at_least=1, at_most=1000), "default": 1}
    help_jobs = "trainings side by side, the cores shared out (default: 1): on a CPU faster than in turn"
    add("config", type=Path, help="a YAML file: what differs from the defaults of `Experiment`")
    add("overrides", nargs="*", metavar="key=value", help="before any --flag")
    add("--batch_size", **_batch_size(32))
    add("--jobs", **jobs, help=help_jobs)
    add("--only", nargs="+", help="names of runs and arms")
    add("--steps", nargs="+", choices=STEPS, default=STEPS)
    add("--record", **_record("tables"))
    add("--dry-run", action="store_true", help="print the commands that it stands for, and stop")


def _add_pack(add: Callable) -> None:
    add("folders", **FOLDERS, help="folders of arms, drawn and aligned, or files of `pack`")
    add("--only", nargs="+", help="names of arms (default: all)")
    add("--seeds", type=number(int, at_least=0), nargs="+", help="of the noise (default: all)")
    add("--output", **FOLDER, help="a JSON file, new or of `pack`, to be added to")


def _add_report(add: Callable) -> None:
    files = {"nargs": "*", "type": Path, "default": []}
    add("folders", **FOLDERS, help="folders of arms, or of an arm's training seeds")
    add("--tables", **files, help="table.json files of `table`")
    add("--figures", **files, help="PNG files: heat maps, curves")
    add("--seeds", type=number(int, at_least=0), nargs="+", default=[0], help="of the noise (default: 0)")
    add("--per_category", **PER_CATEGORY)
    add("--probes", **files, help="itm.json and rec.json files")
    add("--title", default="dpt report")
    add("--output", **FOLDER, help="the page")


def _add_pareto(add: Callable) -> None:
    add("folders", **FOLDERS, help="folders of arms, or files of `pack`")
    add("--ceiling", help="the arm of several noise seeds from which the oracle chooses")
    add("--output", **FOLDER, help="a PNG")


FLAGS: dict[str, tuple[str, Callable[[Callable], None]]] = {
    "generate": ("generate", _add_generate),
    "align": ("align", _add_align),
    "quality": ("frechet", _add_quality),
    "choose": ("choose", _add_choose),
    "table": ("table", _add_table),
    "itm": ("measure_itm", _add_itm),
    "rec": ("measure_rec", _add_rec),
    "probe-map": ("probe_map", _add_probe_map),
    "experiment": ("experiment", _add_experiment),
    "pack": ("pack", _add_pack),
    "report": ("report", _add_report),
    "pareto": ("pareto", _add_pareto),
    "worth": ("worth", _add_worth),
    "overoptimization": ("overoptimization", _add_overoptimization),
}
"""subcommand -> the module of `dpt.evaluation` that runs it, and what adds its flags"""
