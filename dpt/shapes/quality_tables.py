"""Tables of how good the embedded model, its small CLIP and the oracle are."""

import argparse
import json
import time
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image
from tqdm import tqdm

from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import CKPT_FOLDER, recommended
from dpt.drawing import Artist
from dpt.images import make_grid, to_images, to_pixels
from dpt.metrics import bootstrap_interval
from dpt.results import figure_beside, markdown_table
from dpt.sampling_settings import Sampling
from dpt.shapes.clip import load_clip, pooled_cosines, retrieval
from dpt.shapes.labelled_pictures import LABELLED, JudgedPicture, agreement
from dpt.shapes.oracle import LABELS, judge
from dpt.shapes.scenes import render
from dpt.shapes.settings import LABELLED_FOLDER, SEEDS_APART
from dpt.shapes.world import PROMPT_CATEGORIES, ShapesWorld, load_prompts
from dpt.training.curves import plot_curves, read_metrics

WORD_PAIRS = (
    ("a red {} above a blue square", "circle", "star"),
    ("a {} circle above a blue square", "red", "green"),
    ("{} red circles", "two", "three"),
    ("a {} red circle", "small", "large"),
    ("a red circle {} a blue square", "above", "below"),
    ("a red circle to the {} of a blue square", "left", "right"),
)


def judge_prompts(
    sd: StableDiffusion,
    prompts: dict[str, tuple[str, ...]],
    *,
    seeds: tuple[int, ...] = (0,),
    sampling: Sampling | None = None,
    folder: Path | None = None,
) -> list[dict]:
    """Draws every prompt of every category once a seed and lets the oracle judge the pictures.

    Every prompt has noise of its own: with one noise for all, whether it is a lucky one decides the figures.

    Args:
        prompts: category -> prompts.
        sampling: how; by default as is recommended for the model.
        seeds: seed s of the k-th prompt stands for the noise of seed `SEEDS_APART` * k + s.
        folder: where the pictures and `verdicts.jsonl` are kept, if anywhere.

    Returns:
        One record a picture: category, prompt, seed, label, reason.
    """
    pairs = [(category, text) for category, texts in prompts.items() for text in texts]
    jobs = [(*pair, SEEDS_APART * k + seed) for k, pair in enumerate(pairs) for seed in seeds]
    records, rows = [], {}
    for start in tqdm(range(0, len(jobs), 35), desc="drawing", leave=False):
        batch = jobs[start : start + 35]
        _, texts, noise_seeds = zip(*batch, strict=True)
        drawings = Artist(sd).draw(list(texts), list(noise_seeds), sampling or recommended("shapes"))
        for (category, text, seed), drawing in zip(batch, drawings, strict=True):
            verdict = judge(drawing.image, text)
            record = JudgedPicture(category, text, seed, verdict.label, verdict.reason)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(drawing.image).save(folder / f"{len(records):04d}.png")
                rows.setdefault(category, []).append(drawing.image)
            records.append(msgspec.structs.asdict(record))
    if folder is not None:
        make_grid([(name, row[:10]) for name, row in rows.items()], cell=132).save(folder / "grid.png")
        (folder / "verdicts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def shares(records: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Share of each label with its 95 % interval over prompts."""
    prompts = np.array([record["prompt"] for record in records])
    return {
        label: bootstrap_interval(np.array([r["label"] == label for r in records], float), prompts) for label in LABELS
    }


def _percent(share):
    mean, low, high = (100 * value for value in share)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


# Sections of docs/log


def oracle_section(args: argparse.Namespace) -> str:
    """Renders, hard negatives, VAE round trips and labelled pictures."""
    world, sd = ShapesWorld("val", seed=77), load_stable_diffusion("shapes")
    right, rejected, rejected_scenes, trips = [], [], [], []
    for start in tqdm(range(0, args.renders, 50), desc="renders", leave=False):
        examples = [world[i] for i in range(start, min(start + 50, args.renders))]
        images = [render(example.scene) for example in examples]
        for image, example in zip(images, examples, strict=True):
            right.append(judge(image, example.caption).label == "correct")
            rejected.append(judge(image, example.negative.caption).label == "misaligned")
            rejected_scenes.append(judge(render(example.negative.scene), example.caption).label == "misaligned")
        if sent := images[: max(0, args.round_trips - start)]:
            decoded = to_images(sd.decode_latents(sd.encode_images(to_pixels(sent))))
            trips += [judge(d, e.caption).label == "correct" for d, e in zip(decoded, examples, strict=False)]
    figures = [
        ("fresh renders judged correct", right, "99.5"),
        ("hard-negative captions judged misaligned", rejected, "99.5"),
        ("hard-negative scenes judged misaligned", rejected_scenes, "99.5"),
        ("renders judged correct after a VAE round trip", trips, "98"),
    ]
    rows = [(name, len(values), _percent(bootstrap_interval(values)), least) for name, values, least in figures]
    tables = []
    for name, folder in LABELLED.items():
        if (folder / "labels.jsonl").exists():
            wrong, counts = agreement(folder)
            rows += _agreement_rows(name, wrong, counts, halves=folder == LABELLED_FOLDER)
            cells = [(eye, *(counts.get((eye, label), 0) for label in LABELS)) for eye in LABELS]
            tables.append(markdown_table([f"{name}: by eye \\ oracle", *LABELS], cells))
    return "\n".join([markdown_table(["", "pictures", "%", "required %"], rows), *tables])


def _agreement_rows(name: str, wrong: list[dict], counts: dict, *, halves: bool) -> list[tuple]:
    total = sum(counts.values())
    agreed = sum(count for (eye, label), count in counts.items() if eye == label)
    alike = sum(count for (eye, label), count in counts.items() if (eye == "correct") == (label == "correct"))
    rows = [(f"{name}: judged as labelled by eye", total, f"{100 * agreed / total:.1f}", "95")]
    if halves:
        other = 200 * sum(w["index"] % 2 for w in wrong) / total
        rows.append((f"{name}: the half on which no threshold was chosen", total // 2, f"{100 - other:.1f}", "95"))
    return [*rows, (f"{name}: correct or not as by eye", total, f"{100 * alike / total:.1f}", "")]


def clip_section(args: argparse.Namespace) -> str:
    """Retrieval, and cosines of pooled states to hard negatives'."""
    clip, tokenizer = load_clip(CKPT_FOLDER / "shapes/clip")
    figures = retrieval(clip, tokenizer)
    kinds = [(kind, f"{cosine:.4f}") for kind, cosine in pooled_cosines(clip, tokenizer).items()]
    words = [(pair, f"{word:.2f}", f"{end:.2f}") for pair, (word, end) in word_distances().items()]
    return "\n".join(
        [
            f"Of 512 val captions, {100 * figures['retrieval_at_1']:.1f} % rank their own scene first of 512, and "
            f"{100 * figures['hard_negative_accuracy']:.1f} % are preferred to their hard negative (chance 50 %).\n",
            markdown_table(
                ["kind of hard negative", "mean cosine of the pooled states of 2,000 val captions and their negatives"],
                kinds,
            ),
            "Distance between the text encoder's states of captions that differ in one word, relative to the states'\n"
            "length, at the word and at the end of the text:\n",
            markdown_table(["words", "at the word", "at the end"], words),
        ]
    )


def word_distances() -> dict[str, tuple[float, float]]:
    """Pair of words -> relative distance of the text encoder's states at the word, and at the end of the text."""
    sd, distances = load_stable_diffusion("shapes"), {}
    for template, one, other in WORD_PAIRS:
        texts = [template.format(word) for word in (one, other)]
        context, _ = sd.encode_prompts(texts)
        encoding = sd.tokenizer(texts[0])
        places = encoding.char_to_token(template.index("{")), len(encoding.input_ids) - 1
        apart = [(context[0, k] - context[1, k]).norm() / context[:, k].norm(dim=-1).mean() for k in places]
        distances[f"{one}, {other}"] = tuple(distance.item() for distance in apart)
    return distances


def base_section(args: argparse.Namespace) -> str:
    """The base model on the val prompts, at the guidance scale that is best on a part of them."""
    sd, began = load_stable_diffusion("shapes"), time.perf_counter()
    few = {c: load_prompts("val", c)[: args.prompts_for_guidance] for c in PROMPT_CATEGORIES}
    samplings = {g: recommended("shapes").changed(guidance_scale=g) for g in args.guidance}
    tried = {g: shares(judge_prompts(sd, few, sampling=s, seeds=(100,))) for g, s in samplings.items()}
    best = max(tried, key=lambda g: tried[g]["correct"][0])
    prompts = {c: load_prompts("val", c) for c in PROMPT_CATEGORIES}
    records = judge_prompts(sd, prompts, seeds=tuple(range(args.seeds)), sampling=samplings[best])
    groups = {c: [r for r in records if r["category"] == c] for c in PROMPT_CATEGORIES}
    # the six categories make up the total; `unseen` pairs stand apart
    groups["all but unseen"] = [r for r in records if r["category"] != "unseen"]
    labels = [f"{label} %" for label in LABELS]
    return "\n".join(
        [
            f"Guidance on the first {args.prompts_for_guidance} val prompts a category, one picture each:\n",
            markdown_table(["guidance scale", *labels], [(f"{g:g}", *map(_percent, tried[g].values())) for g in tried]),
            f"All val prompts, guidance {best:g}, 20 DDIM steps, {args.seeds} picture(s) each, all of other noise:\n",
            markdown_table(
                ["category", "pictures", *labels],
                [(name, len(group), *map(_percent, shares(group).values())) for name, group in groups.items()],
            ),
            f"Took {(time.perf_counter() - began) / 60:.0f} minutes.",
        ]
    )


def curve_section(args: argparse.Namespace) -> str:
    """The U-Net's val curve, drawn beside the Markdown file."""
    path = args.run / "unet.metrics.jsonl"
    records = [record for record in read_metrics(path) if "val_loss" in record]
    for record in records:
        if lacking := {"val_loss_unweighted", *LABELS} - record.keys():
            raise ValueError(f"{path}: step {record['step']} lacks {min(lacking)}")
    if args.record:
        plot_curves(path, figure_beside(args.record, "pretraining.png"))
    rows = [
        (r["step"], f"{r['val_loss']:.4f}", f"{r['val_loss_unweighted']:.4f}", *(f"{100 * r[x]:.0f}" for x in LABELS))
        for r in records
    ]
    header = ["step", "val loss", "unweighted", *(f"{label} %" for label in LABELS)]
    return f"![Loss and verdicts while the U-Net was trained](pretraining.png)\n\n{markdown_table(header, rows)}"


SECTIONS = {"oracle": oracle_section, "clip": clip_section, "base": base_section, "curve": curve_section}
