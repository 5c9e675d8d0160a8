"""The flags of evaluate.py's subcommands. Imports nothing heavy, so that `--help` and bad arguments answer at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

from dpt.base_models import CKPT_FOLDER, DTYPE_NAMES
from dpt.bounds import number
from dpt.results import RESULTS

SEEDS_APART = 1000  # seed s of the k-th prompt stands for the noise of seed k * SEEDS_APART + s
METRICS = ("oracle", "shapes-clip", "clip", "blip")
STEPS = ("train", "measure", "draw", "table")
OPEN_CLIP_FOLDER, BLIP_FOLDER = CKPT_FOLDER / "open_clip", CKPT_FOLDER / "blip-itm-base-coco"
OPEN_CLIP_MODEL = "ViT-H-14"
EARLY_TIMESTEPS = (50, 100, 200, 300)
MAP_TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)
SAME_FEATURES = ("constant_text", "shuffled_labels")  # controls that read what the probe reads
MAP_CONTROLS = ("constant_text", "empty_prompt")
NUM_SAMPLES = number(int, at_least=1, at_most=1_000_000)


def add_scorers(parser: argparse.ArgumentParser) -> None:
    """Which networks score."""
    parser.add_argument("--clip_model", default=OPEN_CLIP_MODEL, help=f"of OpenCLIP (default: {OPEN_CLIP_MODEL})")
    parser.add_argument(
        "--clip_weights", type=Path, help="its weights' file (default: ckpt/open_clip/<model>.safetensors)"
    )
    parser.add_argument("--blip", type=Path, default=BLIP_FOLDER, help="a BLIP-ITM folder of transformers")


def add_probes(parser: argparse.ArgumentParser) -> None:
    """The flags of both subcommands."""
    parser.add_argument("checkpoints", nargs="+", type=Path, help="runs, weights' folders or released files")
    parser.add_argument("--config", type=Path, required=True, help="a training config: model, data, precision")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes the config")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="shapes: of the scenes (default: val)")
    parser.add_argument(
        "--num_samples", type=NUM_SAMPLES, default=500, help="of each set, evenly spread (default: 500)"
    )
    parser.add_argument(
        "--timesteps",
        type=number(int, at_least=0),
        nargs="+",
        default=[*EARLY_TIMESTEPS],
        help="noise levels of the mean, beside the paper's 500 (default: 50 100 200 300)",
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder")


def add_generate(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("--arms", nargs="+", type=Path, required=True, metavar="YAML")
    parser.add_argument("--prompts", required=True, help="a prompt set; see `dpt.evaluation.prompts`")
    parser.add_argument(
        "--per_category", type=number(int, at_least=1), help="only the first so many prompts a category"
    )
    parser.add_argument(
        "--seeds",
        type=number(int, at_least=0, below=SEEDS_APART),
        nargs="+",
        default=[0, 1, 2, 3],
        help="of the noise (default: 0 1 2 3)",
    )
    parser.add_argument("--batch_size", type=number(int, at_least=1), default=32, help="pictures at once (default: 32)")
    parser.add_argument("--outdir", type=Path, required=True)
    parser.add_argument("--compbench", action="store_true", help="name files as T2I-CompBench does")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes every arm")
    parser.add_argument(
        "--folder", default="outputs/experiment", help="what {folder} stands for in the arms' dpt and lora"
    )


def add_align(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, required=True)
    parser.add_argument("--batch_size", type=number(int, at_least=1), default=64, help="pictures at once (default: 64)")
    add_scorers(parser)


def add_quality(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms")


def add_choose(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    add = parser.add_argument
    add("--prompts", required=True, help="a prompt set; see `dpt.evaluation.prompts`")
    add("--per_category", type=number(int, at_least=1), help="only the first so many prompts a category")
    add("--model", default="shapes")
    add("--dpt", nargs="+", required=True, metavar="PATH", help="adapters; the LoRA of the first, if any, draws")
    add("--candidates", type=number(int, at_least=2, at_most=1024), default=8, help="of each prompt (default: 8)")
    add("--scale", type=number(float, at_least=0, below=1000), help="guidance scale (default: the model's)")
    add("--steps", type=number(int, at_least=2, at_most=500), help="sampling steps (default: the model's)")
    add(
        "--where",
        type=number(float, above=0, at_most=1),
        nargs="+",
        default=[0.15, 0.2, 0.25, 0.4, 1.0],
        help="when to choose, as fractions of the steps (default: 0.15 0.2 0.25 0.4 1)",
    )
    add("--dtype", choices=DTYPE_NAMES, default="bfloat16")
    add("--scorer", choices=METRICS, default="oracle", help="who judges (default: oracle)")
    add("--predicted", choices=METRICS, help="a scorer of the predicted clean picture, decoded, as another chooser")
    add("--batch_size", type=number(int, at_least=1), default=32, help="candidates at once (default: 32)")
    add("--categories", nargs="+", help="what the tables are of (default: all but unseen)")
    add("--outdir", type=Path, required=True)
    add("--record", nargs="?", const=RESULTS, type=Path, metavar="FILE", help="put the tables into docs/results.md too")
    add_scorers(parser)


def add_table(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument(
        "folders", nargs="+", type=Path, help="folders of arms, or of an arm's training seeds, or files of `pack`"
    )
    parser.add_argument("--against", help="name of the arm that others are compared with")
    parser.add_argument("--categories", nargs="+", help="only these (default: all but unseen)")
    parser.add_argument("--by", nargs="*", default=[], metavar="FIGURE", help="figures to show by category")
    parser.add_argument("--output", type=Path, required=True, help="a folder")


def add_itm(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    add_probes(parser)
    parser.add_argument(
        "--negatives", nargs="+", choices=("mined", "edited"), default=[], help="shapes: each a set of its own"
    )
    parser.add_argument("--zero_shot", action="store_true", help="also by denoising error, without an adapter")


def add_rec(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    add_probes(parser)


def add_probe_map(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("config", type=Path, help="a training config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--controls",
        nargs="*",
        default=MAP_CONTROLS,
        choices=("random_unet", "empty_prompt", *SAME_FEATURES),
        help="(default: constant_text empty_prompt)",
    )
    parser.add_argument(
        "--timesteps", type=number(int, at_least=0), nargs="+", default=MAP_TIMESTEPS, help="that are measured"
    )
    parser.add_argument(
        "--num_samples", type=NUM_SAMPLES, default=500, help="val samples that are measured (default: 500)"
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument(
        "--record", nargs="?", const=RESULTS, type=Path, metavar="FILE", help="put the map into docs/results.md too"
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("config", type=Path, help="a YAML file: what differs from the defaults of `Experiment`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="before any --flag")
    parser.add_argument("--batch_size", type=number(int, at_least=1), default=32, help="pictures at once (default: 32)")
    parser.add_argument(
        "--jobs",
        type=number(int, at_least=1, at_most=1000),
        default=1,
        help="trainings side by side, the cores shared out (default: 1): on a CPU faster than in turn",
    )
    parser.add_argument("--only", nargs="+", help="names of runs and arms")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument(
        "--record", nargs="?", const=RESULTS, type=Path, metavar="FILE", help="put the tables into docs/results.md too"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands that it stands for, and stop")


def add_figures(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms, drawn and aligned")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file, new or of `pack`, to be added to")


def add_report(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms, or of an arm's training seeds")
    parser.add_argument("--tables", nargs="*", type=Path, default=[], help="table.json files of `table`")
    parser.add_argument("--figures", nargs="*", type=Path, default=[], help="PNG files: heat maps, curves")
    parser.add_argument(
        "--seeds", type=number(int, at_least=0), nargs="+", default=[0], help="of the noise (default: 0)"
    )
    parser.add_argument(
        "--per_category", type=number(int, at_least=1), help="only the first so many prompts a category"
    )
    parser.add_argument("--probes", nargs="*", type=Path, default=[], help="itm.json and rec.json files")
    parser.add_argument("--title", default="dpt report")
    parser.add_argument("--output", type=Path, required=True, help="the page")


def add_pareto(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of arms, or files of `pack`")
    parser.add_argument("--ceiling", help="the arm of several noise seeds from which the oracle chooses")
    parser.add_argument("--output", type=Path, required=True, help="a PNG")


FLAGS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "generate": ("generate", add_generate),
    "align": ("align", add_align),
    "quality": ("quality", add_quality),
    "choose": ("choose", add_choose),
    "table": ("table", add_table),
    "itm": ("itm", add_itm),
    "rec": ("rec", add_rec),
    "probe-map": ("probe_map", add_probe_map),
    "experiment": ("experiment", add_experiment),
    "pack": ("figures", add_figures),
    "report": ("report", add_report),
    "pareto": ("pareto", add_pareto),
}
"""subcommand -> the module of `dpt.evaluation` that runs it, and what adds its flags"""
