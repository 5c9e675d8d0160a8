"""`evaluate.py generate`: arms x prompts x seeds -> pictures with a manifest.

    python evaluate.py generate --arms configs/shapes/arms/base.yaml --prompts shapes:val --outdir outputs/evaluation

Writes OUTDIR/<arm>/{arm.json, metadata.jsonl, samples/}. A picture that is there is not drawn again: after a kill give
the same command. Under `accelerate launch` every process draws its share. A folder holds one arm with one set of
weights; another is refused, and so is a folder with anything else in it. Every prompt has noise of its own, the same in
all arms: with one noise for all, whether it is a lucky one would decide the figures.
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

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from dpt.adapter import DiscriminativeAdapter
from dpt.bounds import number
from dpt.checkpoint import load_checkpoint
from dpt.evaluation.arms import SETTINGS_FILE, Arm, Settings, check_names, differing_settings, load_arm, read_settings
from dpt.evaluation.prompts import Prompt, load_prompt_set
from dpt.evaluation.rivals import SCALE_FACTOR, AttendAndExcite, subject_tokens
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
from dpt.lora import load_external_lora
from dpt.memory import peak_mb, reset_peak
from dpt.sampling import draw, initial_noise, matching_score
from dpt.stable_diffusion import DTYPES, load_stable_diffusion, weights_fingerprint

SEEDS_APART = 1000  # seed s of the k-th prompt stands for the noise of seed k * SEEDS_APART + s
CANDIDATES_APART = 10**9  # best-of-n draws candidate k from the noise of that seed + k * CANDIDATES_APART
CHOICE_TIMESTEP = 200  # at which best-of-n reads the score of finished pictures
OWN_NAME = re.compile(r"\d{5,}_\d{6,}_\d+\.png|.+_\d{6,}\.png|\.[0-9a-f]{32}\.tmp", re.DOTALL)
ASIDE = "unrecorded"  # begins the names of folders for pictures that a kill left without their record


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> dict:
    """Draws what is missing; returns how many pictures there are and how many are new, arm by arm.

    Raises:
        ValueError: arms, prompts or a folder that cannot be used; it is named.
    """
    arms = [load_arm(path, args.set) for path in args.arms]
    return draw_arms(
        [one for arm in check_names(arms).values() for one in arm.each_seed(args.folder)],
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
    """`run`, of arms that are loaded already, one for each set of weights."""
    prompts = load_prompt_set(prompt_set, per_category=per_category)
    check_seeds(seeds, "--seeds")
    for arm in arms:
        check_folder(outdir / arm.name, arm.settings())
    shared = [prompt.text for prompt in prompts if len(prompt.categories) > 1]
    if compbench and shared and process_state().is_main_process:
        note = f"{len(shared)} prompts, such as {shared[0]!r}, are drawn for the first of their categories alone"
        print(note, file=sys.stderr)
    return {
        arm.name: generate(arm, prompts, seeds, outdir / arm.name, batch_size=batch_size, compbench=compbench)
        for arm in arms
    }


def check_seeds(seeds: list[int], name: str) -> None:
    """Raises ValueError unless there are seeds, each once, below `SEEDS_APART`; `name` is what they are called."""
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < SEEDS_APART for seed in seeds):
        raise ValueError(f"{name} is {seeds}; it must hold different seeds from 0 to {SEEDS_APART - 1}")


def process_state() -> PartialState:
    """Which of the processes this is; on a machine without accelerators they meet on its CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


class Artist:
    """An arm's model, ready to draw.

    Args:
        prompts: of the whole set, from which `correct_for_another` takes the other prompt.
    """

    def __init__(self, arm: Arm, prompts: list[Prompt], device: torch.device | str):
        self.arm, self.scorer = arm, None
        self.sd = load_stable_diffusion(arm.model, dtype=DTYPES[arm.dtype], device=device)
        parts = [self.sd.text_encoder, self.sd.vae]
        if arm.dpt:
            checkpoint = load_checkpoint(arm.dpt)
            # what was tuned on shuffled labels is an arm too; other controls are of another U-Net or input
            self.scorer = checkpoint.attach(self.sd, measuring=checkpoint.config.control == "shuffled_labels")
            parts.append(checkpoint.adapter)
        if arm.lora:
            load_external_lora(self.sd, Path(arm.lora))
        self.fingerprint = weights_fingerprint(*parts, self.sd.unet)
        if arm.untrained_adapter:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                adapter = DiscriminativeAdapter(self.scorer.adapter.config).to(device).eval().requires_grad_(False)
            self.scorer = replace(self.scorer, adapter=adapter)
        texts = [prompt.text for prompt in prompts]
        self.another = dict(zip(texts, texts[len(texts) // 2 :] + texts[: len(texts) // 2], strict=True))
        self.passes = {"whole": 0, "truncated": 0}
        self.sd.unet.conv_in.register_forward_hook(lambda _, inputs, output: self._count("truncated", len(output)))
        self.sd.unet.conv_out.register_forward_hook(lambda _, inputs, output: self._count("whole", len(output)))

    def _count(self, kind: str, samples: int) -> None:
        self.passes[kind] += samples
        if kind == "whole":
            self.passes["truncated"] -= samples  # conv_in has counted it too

    def draw(self, prompts: list[str], seeds: list[int]) -> tuple[np.ndarray, list[dict]]:
        """(B, H, W, 3) uint8, a picture a prompt and seed, and of each, where it corrects itself, the score by step."""
        drawn = [self._draw_once(prompts, [s + k * CANDIDATES_APART for s in seeds]) for k in range(self.arm.best_of)]
        if len(drawn) == 1:
            return drawn[0]
        best = torch.stack([self._score(images, prompts) for images, _ in drawn]).argmax(0).tolist()  # (B,)
        images = np.stack([drawn[k][0][b] for b, k in enumerate(best)])
        return images, [drawn[k][1][b] for b, k in enumerate(best)]

    def _draw_once(self, prompts, seeds):
        arm, trace = self.arm, []
        images = draw(
            self.sd,
            prompts,
            seeds,
            guidance_scale=arm.guidance_scale,
            num_inference_steps=arm.num_inference_steps,
            scorer=self.scorer,
            correction=arm.correction,
            correction_prompts=[self.another[prompt] for prompt in prompts] if arm.correct_for_another else None,
            parity=arm.parity,
            trace=trace,
            observe=False,
            corrector=self._attend_and_excite if arm.attend_and_excite else None,
        )
        scores = [[round(step["score"][b], 4) for step in trace] for b in range(len(prompts))]
        return images, [{"scores": row} if row else {} for row in scores]

    def _attend_and_excite(self, prompts: list[str], context: torch.Tensor) -> AttendAndExcite:
        resolution = self.arm.attention_resolution or self.sd.latent_shape()[-1] // 4
        tokens = [subject_tokens(self.sd, prompt) for prompt in prompts]
        return AttendAndExcite(self.sd.unet, context, tokens, resolution, self.arm.attention_step or SCALE_FACTOR)

    @torch.no_grad()
    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        """The matching score of finished pictures, (B,), all noised alike to `CHOICE_TIMESTEP`."""
        sd, timestep = self.sd, torch.tensor(CHOICE_TIMESTEP, device=self.sd.device)
        latents = sd.encode_images(to_pixels(list(images)))
        noise = initial_noise([0] * len(latents), tuple(latents.shape[1:])).to(latents.device)
        noisy = sd.scheduler.add_noise(latents, noise, timestep[None])
        context, pooled = sd.encode_prompts(prompts)
        texts = {"encoder_hidden_states": context, "pooled_prompt_embeds": pooled}
        return matching_score(sd.unet, self.scorer, noisy, timestep, **texts).cpu()


def generate(
    arm: Arm, prompts: list[Prompt], seeds: list[int], folder: Path, *, batch_size: int, compbench: bool = False
) -> dict:
    """Draws what of an arm's pictures is missing in its folder.

    Raises:
        ValueError: the folder is not this arm's, or holds pictures of other settings, weights, noise or names.
    """
    state = process_state()
    gc.collect()  # the arm before, whose hooks refer to it in a circle
    reset_peak(state.device)
    artist = Artist(arm, prompts, state.device)
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
        batch, began = own[start : start + batch_size], time.perf_counter()
        artist.passes = dict.fromkeys(artist.passes, 0)
        noise_seeds = [_noise_seed(prompt, seed) for prompt, seed in batch]
        images, traces = artist.draw([prompt.text for prompt, _ in batch], noise_seeds)
        cost = {"seconds": (time.perf_counter() - began) / len(batch), "peak_mb": peak_mb(state.device)}
        cost |= {f"{kind}_passes": count / len(batch) for kind, count in artist.passes.items()}
        for k, ((prompt, seed), image) in enumerate(zip(batch, images, strict=True)):
            record = {"prompt": prompt.text, "category": prompt.categories[0], "seed": seed}
            record |= {"categories": list(prompt.categories)} if len(prompt.categories) > 1 else {}
            candidates = numbered(folder / "samples", f"{prompt.number:05d}_{seed:06d}_{{}}.png")
            if compbench:
                candidates = iter([folder / files[prompt.text, seed]])
                (folder / files[prompt.text, seed]).parent.mkdir(parents=True, exist_ok=True)
            path = save_new(Image.fromarray(image), candidates, record | {"seed": str(seed)})
            record |= {"file": str(path.relative_to(folder)), "number": prompt.number, "noise_seed": noise_seeds[k]}
            append_metadata(folder, record | cost | traces[k])
    state.wait_for_everyone()
    return {"pictures": len(prompts) * len(seeds), "new": len(missing)}


def _noise_seed(prompt: Prompt, seed: int) -> int:
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
        if record["noise_seed"] != _noise_seed(prompt, seed):
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
    """Raises ValueError unless a folder is empty, or an arm's with no pictures but of these settings."""
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
    if records and (differing := differing_settings(before, settings)):
        raise ValueError(f"{folder} holds pictures of other settings: {', '.join(differing)}; choose another folder")


def _claim(folder: Path, settings: Settings, state: PartialState) -> None:
    """Makes the folder this arm's. Raises ValueError where it is another's, in all processes."""
    check_folder(folder, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        if not read_metadata(folder):
            write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        (folder / "samples").mkdir(exist_ok=True)


def _set_unrecorded_aside(folder: Path) -> None:
    """Moves pictures that a kill left without their record; they are drawn again. What others laid there stays."""
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
