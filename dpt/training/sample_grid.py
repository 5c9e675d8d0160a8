"""The grid of pictures that a training run draws, always of the same prompts and seeds."""

from pathlib import Path

from dpt.adapter.adapter import Scorer
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import recommended
from dpt.config import DPTConfig
from dpt.drawing import Artist
from dpt.images import make_grid
from dpt.model import DPT
from dpt.training.settings import TrainConfig


def draw_grid(sd: StableDiffusion, model: DPT, config: TrainConfig, path: Path) -> None:
    """Draws a row a prompt, each seed plain and with self-correction, and saves the PNG at once or not at all.

    Raises:
        FloatingPointError: a score that is not finite.
    """
    model.eval()
    settings, rows = config.samples, []
    artist = Artist(sd, Scorer(model.adapter, model.blocks, model.itm_layer))
    corrected = recommended(config.model.name, DPTConfig()).changed(
        guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps,
        correction_factor=settings.correction_factor,
    )
    seeds = [settings.seed + k for k in range(settings.num_images)]
    for prompt in settings.prompts:
        drawn = [artist.draw([prompt] * len(seeds), seeds, s) for s in (corrected.without_correction(), corrected)]
        images = [drawing.image for half in drawn for drawing in half]
        rows.append((f"{prompt} ({settings.num_images} plain, {settings.num_images} corrected)", images))
    path.parent.mkdir(exist_ok=True)
    make_grid(rows).save(path.with_suffix(".tmp"), "PNG")
    path.with_suffix(".tmp").replace(path)
