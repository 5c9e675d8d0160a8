"""How well a model draws the committed prompts, by the oracle."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dpt.sampling import draw
from dpt.shapes.oracle import judge
from dpt.stable_diffusion import StableDiffusion

LABELS = ("correct", "misaligned", "malformed")


def judge_prompts(
    sd: StableDiffusion,
    prompts: dict[str, tuple[str, ...]],
    *,
    seeds: tuple[int, ...] = (0,),
    guidance_scale: float = 4.0,
    num_inference_steps: int = 20,
    batch_size: int = 35,
    folder: Path | None = None,
) -> list[dict]:
    """Draws every prompt of every category once a seed and lets the oracle judge the pictures.

    Args:
        prompts: category -> prompts.
        folder: where the pictures and `verdicts.jsonl` are kept, if anywhere.

    Returns:
        One record a picture: category, prompt, seed, label, reason.
    """
    jobs = [(c, text, seed) for c, texts in prompts.items() for text in texts for seed in seeds]
    records = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        images = draw(
            sd,
            [text for _, text, _ in batch],
            [seed for _, _, seed in batch],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
        )
        for (category, text, seed), image in zip(batch, images, strict=True):
            verdict = judge(np.ascontiguousarray(image), text)
            record = {"category": category, "prompt": text, "seed": seed}
            records.append(record | {"label": verdict.label, "reason": verdict.reason})
            if folder is not None:
                Image.fromarray(image).save(folder / f"{len(records) - 1:04d}.png")
    if folder is not None:
        (folder / "verdicts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records
