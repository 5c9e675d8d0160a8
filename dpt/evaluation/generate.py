"""`evaluate.py generate`: arms x prompts x seeds -> pictures with a manifest.

    python evaluate.py generate --arms configs/shapes/arms.yaml:base --prompts shapes:val --outdir outputs/evaluation

Writes OUTDIR/<arm>/{arm.json, metadata.jsonl, samples/}. A finished picture is not drawn again: after a kill give
the same command. Under `accelerate launch` every process draws its share. A folder holds one arm with one set of
weights; another is refused, and so is a folder with anything else in it. Every prompt has noise of its own, the same in
all arms: with one noise for all prompts, its luck would decide the figures.
"""

import argparse
import gc
import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from dpt.backbones.stable_diffusion import weights_fingerprint
from dpt.base_models import check_one_lora, config_beside
from dpt.choosing_rules import candidate_seeds
from dpt.device import DTYPES
from dpt.drawing import Artist, Drawing, counted_passes
from dpt.evaluation import correction_controls
from dpt.evaluation.arms import SETTINGS_FILE, Arm, Settings, differing_arms, read_settings
from dpt.evaluation.flags import SEEDS_APART
from dpt.evaluation.prompts import Prompt, load_prompt_set
from dpt.files import write_text
from dpt.images import (
    METADATA_FILE,
    append_metadata,
    compbench_stem,
    numbered,
    read_metadata,
    save_new,
    text_chunks,
    to_pixels,
)
from dpt.peak_memory import peak_mb, reset_peak
from dpt.reading import matching_scores

OWN_NAME = re.compile(r"\d{5,}_\d{6,}_\d+\.png|.+_\d{6,}\.png|\.[0-9a-f]{32}\.tmp", re.DOTALL)
ASIDE = "unrecorded"  # begins the names of folders for pictures that a kill left without their record


def run(args: argparse.Namespace) -> dict:
    """Draws the missing pictures; returns the number of all pictures and of new ones, arm by arm.

    Args:
        args: as `dpt.evaluation.arms.check` leaves them.
    """
    return draw_arms(
        [one for arm in args.arms.values() for one in arm.each_seed(args.folder)],
        args.prompts,
        args.seeds,
        args.outdir,
        per_category=args.per_category,
        batch_size=args.batch_size,
        compbench=args.compbench,
    )


def draw_arms(
    arms: list[Arm],
    prompt_set: str,
    seeds: list[int],
    outdir: Path,
    *,
    per_category: int | None = None,
    batch_size: int = 32,
    compbench: bool = False,
) -> dict:
    """Draws the missing pictures of arms that name one set of weights each; returns the counts of `generate` by arm.

    Raises:
        ValueError: prompts or a folder that cannot be used; it is named.
    """
    prompts = load_prompt_set(prompt_set, per_category=per_category)
    for arm in arms:
        if arm.dpt:
            check_one_lora(config_beside(Path(arm.dpt)), arm.dpt, arm.lora)
        check_folder(outdir / arm.name, arm.settings())
    shared = [prompt.text for prompt in prompts if len(prompt.categories) > 1]
    if compbench and shared and process_state().is_main_process:
        note = f"{len(shared)} prompts, such as {shared[0]!r}, are drawn for the first of their categories alone"
        print(note, file=sys.stderr)
    return {
        arm.name: generate(arm, prompts, seeds, outdir / arm.name, batch_size=batch_size, compbench=compbench)
        for arm in arms
    }


def process_state() -> PartialState:
    """The state of this process among several; without accelerators they run on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


class ArmArtist:
    """An arm's model, ready to draw.

    Args:
        prompts: of the whole set, from which `correct_for_another` takes the other prompt.
    """

    def __init__(self, arm: Arm, prompts: list[Prompt], device: torch.device | str):
        # what was tuned on shuffled labels is an arm too; other controls are of another denoiser or input
        options = {"controls": ["none", "shuffled_labels"], "dtype": DTYPES[arm.dtype], "device": device}
        self.arm, self.method, self.artist = arm, None, Artist.load(arm.model, arm.dpt, lora=arm.lora, **options)
        self.sd = self.artist.sd
        *parts, denoiser = self.sd.parts.values()
        if self.artist.scorer:
            parts.append(self.artist.scorer.adapter)
        self.fingerprint = weights_fingerprint(*parts, denoiser)
        if arm.untrained_adapter:
            self.artist.scorer = correction_controls.untrained(self.artist.scorer)
        if arm.correction_direction == "random":
            self.method = correction_controls.random_direction(self.artist.scorer)
        if arm.correct_for_another:
            others = [prompt.text for prompt in prompts]
            self.method = correction_controls.another_prompt(self.sd, self.artist.scorer, others)

    def draw(self, prompts: list[str], seeds: list[int], batch_size: int) -> list[Drawing]:
        """A picture for each prompt and seed; of `best_of`, the one that matches best when it is noised anew."""
        sampling, options = self.arm.sampling, {"batch_size": batch_size, "method": self.method}
        own = [candidate_seeds(seed, self.arm.best_of) for seed in seeds]
        drawn = [self.artist.draw(prompts, list(row), sampling, **options) for row in zip(*own, strict=True)]
        if len(drawn) == 1:
            return drawn[0]
        began = time.perf_counter()
        with counted_passes(self.sd.denoiser) as passes:
            scores = [self._score(row, prompts) for row in drawn]
        best = torch.stack(scores).argmax(0).tolist()  # (B,)
        passes["seconds"] = time.perf_counter() - began
        cost = {name: sum(row[0].cost[name] for row in drawn) + passes[name] / len(prompts) for name in passes}
        return [replace(drawn[k][b], cost=cost) for b, k in enumerate(best)]

    def _score(self, drawn: list[Drawing], prompts: list[str]) -> torch.Tensor:
        """The matching score of finished pictures, (B,)."""
        pixels, guidance = to_pixels([drawing.image for drawing in drawn]), self.arm.distilled_guidance
        return matching_scores(self.sd, self.artist.scorer, pixels, prompts, distilled_guidance=guidance).cpu()


def generate(
    arm: Arm, prompts: list[Prompt], seeds: list[int], folder: Path, *, batch_size: int, compbench: bool = False
) -> dict:
    """Draws the pictures of an arm that its folder lacks.

    Raises:
        ValueError: the folder is not this arm's, or holds pictures of other settings, weights, noise or names.
    """
    state = process_state()
    gc.collect()  # the arm before
    reset_peak(state.device)
    artist = ArmArtist(arm, prompts, state.device)
    _claim(folder, arm.settings() | {"weights": artist.fingerprint}, state)
    if state.is_main_process:
        _set_unrecorded_aside(folder)
    state.wait_for_everyone()
    files = compbench_files(prompts, seeds) if compbench else {}
    there = read_metadata(folder)
    missing = _missing(folder, there, [(prompt, seed) for prompt in prompts for seed in seeds], files)
    state.wait_for_everyone()  # all have read what is there before any adds to it
    own = missing[state.process_index :: state.num_processes]
    for start in tqdm(range(0, len(own), batch_size), desc=arm.name, mininterval=2):
        batch = own[start : start + batch_size]
        noise_seeds = [noise_seed(prompt, seed) for prompt, seed in batch]
        drawings = artist.draw([prompt.text for prompt, _ in batch], noise_seeds, batch_size)
        for k, ((prompt, seed), drawing) in enumerate(zip(batch, drawings, strict=True)):
            record = {"prompt": prompt.text, "category": prompt.categories[0], "seed": seed}
            record |= {"categories": list(prompt.categories)} if len(prompt.categories) > 1 else {}
            candidates = numbered(folder / "samples", f"{prompt.number:05d}_{seed:06d}_{{}}.png")
            if compbench:
                candidates = iter([folder / files[prompt.text, seed]])
                (folder / files[prompt.text, seed]).parent.mkdir(parents=True, exist_ok=True)
            path = save_new(Image.fromarray(drawing.image), candidates, record | {"seed": str(seed)})
            record |= {"file": str(path.relative_to(folder)), "number": prompt.number, "noise_seed": noise_seeds[k]}
            append_metadata(folder, record | drawing.cost | {"peak_mb": peak_mb(state.device)} | said_of(drawing))
    state.wait_for_everyone()
    return {"pictures": len(prompts) * len(seeds), "new": len(missing)}


def said_of(drawing: Drawing) -> dict:
    """The keys of a record about correcting and choosing: scores of corrected steps, candidates."""
    scores = [round(record["score"], 4) for record in drawing.trace if record["length"]]
    chosen = {"kept_seed": drawing.seed, "candidates": drawing.candidates} if drawing.candidates else {}
    return ({"scores": scores} if scores else {}) | chosen


def noise_seed(prompt: Prompt, seed: int) -> int:
    """The seed of a picture's noise: every prompt has `SEEDS_APART` seeds of its own."""
    return prompt.number * SEEDS_APART + seed


def compbench_files(prompts: list[Prompt], seeds: list[int]) -> dict[tuple[str, int], str]:
    """(prompt, seed) -> <category>/samples/<prompt>_<6 digits>.png.

    T2I-CompBench's scorers read a folder a category, sort it by the digits and take the k-th prompt's pictures in
    order, so the numbers run on over the category's prompts.
    """
    files, before = {}, Counter()
    for prompt in prompts:
        category = prompt.categories[0]
        for k, seed in enumerate(seeds):
            name = compbench_stem(prompt.text).format(before[category] * len(seeds) + k)
            files[prompt.text, seed] = f"{category}/samples/{name}.png"
        before[category] += 1
    return files


def _missing(
    folder: Path, there: list[dict], jobs: list[tuple[Prompt, int]], files: dict[tuple[str, int], str]
) -> list[tuple[Prompt, int]]:
    """The jobs whose picture is not there yet.

    Raises:
        ValueError: a picture from other noise or under another name than the job's, or one whose name is taken.
    """
    records, missing = {(record["prompt"], record["seed"]): record for record in there}, []
    for prompt, seed in jobs:
        record, file = records.get((prompt.text, seed)), files.get((prompt.text, seed))
        if record is None:
            missing.append((prompt, seed))
            if file and (folder / file).exists():
                raise ValueError(f"{folder / file} is no picture of this arm, but has the name of one: move it")
            continue
        if record["noise_seed"] != noise_seed(prompt, seed):
            raise ValueError(
                f"{folder} holds {prompt.text!r} drawn from noise {record['noise_seed']}, of another prompt set; "
                "choose another"
            )
        if file and record["file"] != file:
            raise ValueError(
                f"{folder} holds {record['file']!r}, which these prompts and --seeds with --compbench call {file!r}; "
                "choose another folder"
            )
    return missing


def check_folder(folder: Path, settings: Settings) -> None:
    """Raises ValueError unless a folder is empty, or holds an arm whose pictures have these settings."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; choose another --outdir")
    if not (folder / SETTINGS_FILE).exists():
        # a kill may have left the file under its temporary name
        strangers = [path.name for path in folder.iterdir() if not re.fullmatch(r"\.arm\.json\.\d+\.tmp", path.name)]
        if strangers:
            raise ValueError(
                f"{folder} is no arm's: it has no {SETTINGS_FILE} and holds {min(strangers)!r}; choose another "
                "--outdir, or move what is there"
            )
        return
    before = read_settings(folder)
    if "weights" not in before:
        raise ValueError(f"{folder / SETTINGS_FILE} is no arm's, it lacks weights; choose another --outdir")
    records = read_metadata(folder)
    if lacking := [record["file"] for record in records if "noise_seed" not in record]:
        raise ValueError(f"{folder / METADATA_FILE}: the record of {lacking[0]} lacks noise_seed")
    if records and (differing := differing_arms(before, settings)):
        raise ValueError(f"{folder} holds pictures of other settings: {', '.join(differing)}; choose another folder")


def _claim(folder: Path, settings: Settings, state: PartialState) -> None:
    """Makes the folder this arm's. Raises ValueError in all processes where it is another's."""
    check_folder(folder, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        if not read_metadata(folder):
            write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        (folder / "samples").mkdir(exist_ok=True)


def _set_unrecorded_aside(folder: Path) -> None:
    """Moves pictures that a kill left without their record; they are drawn again. Other files stay."""
    known = {record["file"] for record in read_metadata(folder)}
    beside = [path for place in ("samples", "*/samples") for path in folder.glob(f"{place}/*")]
    beside = [path for path in beside if not path.relative_to(folder).parts[0].startswith(ASIDE)]
    lost = [path for path in sorted(beside) if str(path.relative_to(folder)) not in known and _is_own(path)]
    if not lost:
        return
    aside = next(path for path in numbered(folder, f"{ASIDE}-{{}}") if not path.exists())
    for path in lost:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    print(f"{folder}: {len(lost)} pictures without a record are now in {aside}", file=sys.stderr)


def _is_own(path: Path) -> bool:
    """Whether `generate` has written a file: by its name and by what it carries."""
    return bool(OWN_NAME.fullmatch(path.name)) and {"prompt", "category", "seed"} <= text_chunks(path).keys()
