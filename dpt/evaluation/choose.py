"""`evaluate.py choose`: how early, and by what, can one tell which noise will draw its prompt right?

    python evaluate.py choose --prompts shapes:val --dpt ckpt/shapes-dpt --outdir outputs/choose

Draws every candidate of every prompt whole, once, and records after each step what could choose: the matching score
of each adapter, the norm of guidance's difference (CFG-Rejection, arXiv 2505.23343) and, with --predicted, what a
scorer says of the predicted clean picture at the steps of --where. A scorer then judges the finished pictures. From
this one run come the area under the curve within prompts by step, and correctness against cost for a grid of (number
of candidates, when), for each chooser, for a random choice and for the judge itself as ceiling. Writes
candidates.jsonl, choose.json, choose.md and choose.png. Candidates in candidates.jsonl are not drawn again. The command
audits any adapter of noisy latents.
"""

import argparse
import json
import shlex
import shutil
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from tqdm import tqdm

from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.stable_diffusion import weights_fingerprint
from dpt.base_models import recommended
from dpt.checkpoint.checkpoint import leaves_t5_out, load_checkpoint
from dpt.choosing_rules import best, candidate_seeds, rounds, stop_of, with_numbers
from dpt.device import DTYPES
from dpt.drawing import Artist
from dpt.evaluation.flags import judge_options
from dpt.evaluation.generate import noise_seed, process_state
from dpt.evaluation.judges import make_judge, value_of
from dpt.evaluation.prompts import Prompt, load_prompt_set
from dpt.evaluation.table import APART
from dpt.files import append_line, read_json_lines, write_text
from dpt.images import to_images
from dpt.matching_score import score_of_features
from dpt.metrics import area_within_prompts, bootstrap_interval
from dpt.results import figure_beside, markdown_table, page_of, record_section
from dpt.schedulers import predicted_clean

CFG, LOWEST_CFG, PREDICTED = "cfg norm", "lowest cfg norm", "predicted picture"
RANDOM, CEILING = "random", "ceiling"


class Candidate(msgspec.Struct):
    """A line of candidates.jsonl."""

    prompt: str
    category: str
    seed: int
    value: float
    """the judge's value of the finished picture"""
    scores: dict[str, list[float | None]]
    """chooser -> its score after each step; None where it was not asked"""
    settings: str
    """settings that all candidates of a file share, as text"""


def run(args: argparse.Namespace) -> dict:
    """Draws missing candidates, writes tables and figure, and returns the areas under the curve by chooser and step.

    Raises:
        ValueError: adapters, prompts or a folder that cannot be used; it is named.
    """
    prompts = load_prompt_set(args.prompts, per_category=args.per_category)
    known = {category for prompt in prompts for category in prompt.categories}
    if args.categories and (unknown := set(args.categories) - known):
        raise ValueError(f"--categories names {min(unknown)}; {args.prompts} has {', '.join(sorted(known))}")
    path, num_steps = args.outdir / "candidates.jsonl", args.steps or recommended(args.model).num_inference_steps
    if not path.exists() and args.outdir.exists() and any(args.outdir.iterdir()):
        raise ValueError(f"--outdir {args.outdir} holds other files than {path.name}; choose an empty folder")
    draw_missing(args, prompts, read_candidates(path, num_steps) if path.exists() else [], path)
    shown = set(args.categories or known - {APART} or known)
    texts = {prompt.text for prompt in prompts if not shown.isdisjoint(prompt.categories)}
    found = [c for c in read_candidates(path, num_steps) if c.prompt in texts]
    tables = analyse(found, args.candidates, num_steps, tuple(sorted(set(args.where))))
    write_text(args.outdir / "choose.json", json.dumps(tables, indent=1) + "\n")
    text = as_markdown(tables)
    write_text(args.outdir / "choose.md", text)
    draw_figure(tables, args.outdir / "choose.png")
    print(text)
    if args.record:
        page = page_of(args.record, "choose")
        shutil.copy(args.outdir / "choose.png", figure_beside(page, "choose.png"))
        text += "\n![Correctness against cost, and areas under the curve](choose.png)\n"
        record_section(page, "choose", shlex.join(["python", "evaluate.py", *args.words]), text)
    return {chooser: row["all"] for chooser, row in tables["auc"].items()}


def read_candidates(path: Path, num_steps: int) -> list[Candidate]:
    """The candidates of a file. Raises ValueError naming a line that lacks scores of steps or choosers."""
    candidates = read_json_lines(path, Candidate)
    for n, one in enumerate(candidates, 1):
        if one.scores.keys() != candidates[0].scores.keys() or any(len(x) != num_steps for x in one.scores.values()):
            raise ValueError(f"{path}, record {n}: scores are not those of {num_steps} steps by the same choosers")
    return candidates


def draw_missing(args: argparse.Namespace, prompts: list[Prompt], there: list[Candidate], path: Path) -> None:
    """Draws and judges the candidates that are not in the file yet."""
    device = process_state().device
    adapters = {name: load_checkpoint(name) for name in args.dpt}
    no_t5 = any(map(leaves_t5_out, adapters.values()))
    sd = load_stable_diffusion(args.model, no_t5=no_t5, dtype=DTYPES[args.dtype], device=device)
    for name, checkpoint in list(adapters.items())[1:]:
        if checkpoint.lora:
            raise ValueError(f"--dpt {name} holds a LoRA; only the first adapter's LoRA can draw: name it first")
    scorers = {name: checkpoint.attach(sd) for name, checkpoint in reversed(adapters.items())}
    judge = make_judge(args.scorer, **judge_options(args))
    sampling = recommended(args.model).changed(guidance_scale=args.scale, num_inference_steps=args.steps)
    weights = weights_fingerprint(*sd.parts.values(), *(s.adapter for s in scorers.values()))
    predicted = make_judge(args.predicted, **judge_options(args)) if args.predicted else None
    asked = {stop_of(share, sampling.num_inference_steps) - 1 for share in args.where} if predicted else set()
    scoring = [[scorer.name, scorer.fingerprint] for scorer in (judge, predicted) if scorer]
    drawing = [weights, sampling.guidance_scale, sampling.num_inference_steps, args.dtype]
    settings = [*drawing, *scoring, sorted(asked), args.dpt]
    settings = json.dumps(settings + [args.image_seed] if args.image_seed else settings)
    if others := {c.settings for c in there} - {settings}:
        raise ValueError(f"{path} holds candidates of other settings, {others.pop()} (now {settings}); choose another")
    known = {(c.prompt, c.seed) for c in there}
    jobs = [
        (prompt, seed)
        for prompt in prompts
        for seed in candidate_seeds(noise_seed(prompt, args.image_seed), args.candidates)
    ]
    jobs = [(prompt, seed) for prompt, seed in jobs if (prompt.text, seed) not in known]
    artist = Artist(sd, scorers[args.dpt[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(jobs), args.batch_size), desc="candidates", mininterval=2):
        batch = jobs[start : start + args.batch_size]
        texts, log = [prompt.text for prompt, _ in batch], []

        def observe(guidance, sampling, prompts, seeds, _, log=log):
            judged = predicted and (lambda clean: predicted.metric(list(to_images(sd.decode_latents(clean))), prompts))
            return observing(guidance, scorers, log, judged, asked)

        drawn = artist.draw(texts, [seed for _, seed in batch], sampling, method=observe)
        values = [value_of(record) for record in judge.metric([d.image for d in drawn], texts)]
        for b, (prompt, seed) in enumerate(batch):
            scores = {name: [_rounded(step[name][b]) for step in log] for name in log[0]}
            record = Candidate(prompt.text, prompt.categories[0], seed, values[b], scores, settings)
            append_line(path, msgspec.to_builtins(record))


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 5)


def observing(guidance, scorers: dict, log: list[dict], judged=None, asked: set[int] = frozenset()):
    """A `Guidance` that notes the score of each chooser for each image of the batch, pass by pass.

    Args:
        judged: maps predicted clean latents to a judge's records.
        asked: the steps at which it is asked.
    """
    guidance.watched = tuple(dict.fromkeys(block for scorer in scorers.values() for block in scorer.blocks))

    def denoise(latents, timestep, step):
        result, said = guidance(latents, timestep, step), {}
        features = dict(zip(guidance.watched, guidance.features, strict=True))
        pooled = guidance.conditioning.pooled_prompt_embeds
        for name, scorer in scorers.items():
            own = [features[block] for block in scorer.blocks]
            said[name] = score_of_features(scorer, own, timestep, pooled).tolist()
        if guidance.halves is not None:
            negative, positive = guidance.halves
            said[CFG] = (positive - negative).flatten(1).norm(dim=1).tolist()
        if judged is not None:
            said[PREDICTED] = [None] * len(latents)
            if step in asked:
                clean = predicted_clean(guidance.scheduler, result[0], timestep, latents)
                said[PREDICTED] = [value_of(record) for record in judged(clean)]
        log.append(said)
        return result

    return denoise


def analyse(found: list[Candidate], count: int, num_steps: int, where: tuple[float, ...]) -> dict:
    """The tables of `choose`: areas under the curve by step and category, correctness against cost for the grid.

    Args:
        found: candidates of prompts, `count` each.
    """
    prompts = list(dict.fromkeys(c.prompt for c in found))
    rows = {prompt: [c for c in found if c.prompt == prompt][:count] for prompt in prompts}
    if short := [prompt for prompt, row in rows.items() if len(row) < count]:
        raise ValueError(f"{len(short)} prompts have fewer than {count} candidates, such as {short[0]!r}")
    values = np.array([[c.value for c in row] for row in rows.values()])  # (P, N)
    category = np.array([row[0].category for row in rows.values()])
    choosers = {
        name: np.array([[c.scores[name] for c in row] for row in rows.values()], float)  # (P, N, steps)
        for name in found[0].scores
    }
    if CFG in choosers:
        choosers[LOWEST_CFG] = -choosers[CFG]  # which of the two tells is not known beforehand
    groups = {"all": category != "", **{name: category == name for name in dict.fromkeys(category.tolist())}}
    auc = {
        name: {
            group: [area_with_interval(scores[chosen, :, step], values[chosen]) for step in range(num_steps)]
            for group, chosen in groups.items()
        }
        for name, scores in choosers.items()
    }
    points = [(n, (share,)) for n in (2, 3, 4, 8) if n <= count for share in where]
    early = [share for share in where if share < 1]
    if early and stop_of(early[0], num_steps) < stop_of(early[-1], num_steps):
        points += [(n, (early[0], early[-1])) for n in (4, 8) if n <= count]
    grid = []
    for n, shares in points:
        schedule, whole = rounds(num_steps, n, shares), values[:, : count // n * n]
        row = {"candidates": n, "choose_at": list(shares), "cost": cost(schedule, n, num_steps), "gain": {}}
        for name, scores in choosers.items():
            kept = simulate(scores, values, n, schedule)
            row[name] = share_correct(kept)
            gain = kept.mean(1) - whole.mean(1)  # (P,), over a random choice
            row["gain"][name] = [round(x, 4) for x in bootstrap_interval(gain)]
        row[RANDOM] = share_correct(whole)
        row[CEILING] = share_correct(whole.reshape(len(values), -1, n).max(2))
        grid.append(row)
    verdicts = bool(np.isin(values, (0, 1)).all())
    sizes = {"prompts": len(prompts), "candidates": count, "steps": num_steps, "verdicts": verdicts}
    return sizes | {"auc": auc, "grid": grid}


def area_with_interval(scores: np.ndarray, values: np.ndarray) -> list[float] | None:
    """The mean of `area_within_prompts` and its 95 % interval over prompts; None without scores or pairs."""
    if np.isnan(scores).any():
        return None
    areas = area_within_prompts(scores, values)
    return [round(x, 4) for x in bootstrap_interval(areas)] if len(areas) else None


def simulate(scores: np.ndarray, values: np.ndarray, n: int, schedule) -> np.ndarray:
    """Values of the kept candidates, (P, groups): one is kept of each whole group of n of a prompt's candidates."""
    groups = values.shape[1] // n
    kept = np.zeros((len(values), groups))
    for p in range(len(values)):
        for g in range(groups):
            left = np.arange(g * n, (g + 1) * n)
            for part in schedule:
                if part.keep < len(left):
                    left = left[best(scores[p, left, part.stop - 1], np.zeros(len(left)), part.keep)]
            kept[p, g] = values[p, left[0]]
    return kept


def cost(schedule, candidates: int, num_steps: int) -> float:
    """Passes of the denoiser that choosing takes, as a multiple of one plain picture's."""
    steps = sum(number * (part.stop - part.first) for part, number in with_numbers(schedule, candidates))
    return round(steps / num_steps, 3)


def share_correct(values: np.ndarray) -> list[float]:
    """The mean of (P, K) and its 95 % interval over prompts."""
    prompts = np.repeat(np.arange(len(values)), values.shape[1])
    return [round(x, 4) for x in bootstrap_interval(values.ravel(), prompts)]


def as_markdown(tables: dict) -> str:
    """The grid, and the areas under the curve at the steps where it chooses, as Markdown."""
    choosers, grid = list(tables["auc"]), []
    scale, digits = (100, 1) if tables["verdicts"] else (1, 3)

    def in_words(values):
        return "{0:.{d}f} ({1:.{d}f} to {2:.{d}f})".format(*(scale * value for value in values), d=digits)

    for row in tables["grid"]:
        shown = {name: f"{scale * row[name][0]:.{digits}f}; {in_words(row['gain'][name])}" for name in choosers}
        shown |= {name: in_words(row[name]) for name in (RANDOM, CEILING)}
        shares = ", ".join(f"{share:g}" for share in row["choose_at"])
        grid.append([str(row["candidates"]), shares, f"{row['cost']:.2f}", *shown.values()])
    steps = sorted({stop_of(share, tables["steps"]) for row in tables["grid"] for share in row["choose_at"]})
    areas = [
        [name, group, *("{:.2f} ({:.2f} to {:.2f})".format(*row[s - 1]) if row[s - 1] else "-" for s in steps)]
        for name, groups in tables["auc"].items()
        for group, row in groups.items()
    ]
    return (
        f"{tables['prompts']} prompts x {tables['candidates']} candidates. "
        f"{'Percent that the judge finds correct' if tables['verdicts'] else 'Means of what the judge says'} "
        "(95 % intervals over prompts), and of choosers the gain over a random choice, paired by prompt; cost in "
        "passes of one plain picture.\n\n"
        + markdown_table(["candidates", "choose_at", "cost", *choosers, RANDOM, CEILING], grid)
        + "\nArea under the curve within prompts, after so many steps:\n\n"
        + markdown_table(["chooser", "category", *map(str, steps)], areas)
    )


def draw_figure(tables: dict, path: Path) -> None:
    """Correctness against cost, and the area under the curve against the step, by chooser."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scale = 100 if tables["verdicts"] else 1
    for k, name in enumerate([*tables["auc"], RANDOM, CEILING]):
        rows = sorted(tables["grid"], key=lambda row: row["cost"])
        style = {"ls": "", "marker": "o^sDvP*X"[k % 8], "ms": 4}
        left.plot([r["cost"] for r in rows], [scale * r[name][0] for r in rows], label=name, **style)
    judged = "correct (%)" if tables["verdicts"] else "what the judge says"
    left.set(xlabel="cost (passes of a plain picture)", ylabel=judged, xscale="log")
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.xaxis.set_minor_formatter(ScalarFormatter())
    left.legend(fontsize=7)
    for name, groups in tables["auc"].items():
        known = [(k, area) for k, area in enumerate(groups["all"], 1) if area]
        if not known:
            continue
        steps, areas = zip(*known, strict=True)
        right.plot(steps, [area[0] for area in areas], marker=".", label=name)
        right.fill_between(steps, [area[1] for area in areas], [area[2] for area in areas], alpha=0.15)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    if right.get_lines():
        right.legend(fontsize=7)
    right.axhline(0.5, color="grey", lw=0.8)
    right.set(xlabel="after step", ylabel="area under the curve within prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
