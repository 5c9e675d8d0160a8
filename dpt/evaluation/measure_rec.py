"""`evaluate.py rec`: does a checkpoint find what an expression refers to?

    python evaluate.py rec outputs/shapes-probe --config configs/shapes/probe.yaml --output outputs/evaluation/rec

Precision among the 1, 5 and 10 surest boxes (a hit overlaps the true box by at least 0.5), by IoU and by generalised
IoU as the reference counts, for each list of expressions, at t = 500 and in the mean over --timesteps; the expression
is the denoiser's prompt. Controls may be named along, as for `itm`. Writes rec.json, rec.md, the records, and for each
checkpoint and list a grid of the surest hits and the surest misses (green: true, magenta: found). Of the shapes world
it also writes one scene with the box of each of eight phrases.
"""

import argparse

from PIL import Image

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.config import load_config
from dpt.data.collate import as_latents
from dpt.data.sources import validation_samples
from dpt.drawing import Artist
from dpt.evaluation import probes
from dpt.images import make_grid, to_images, with_boxes
from dpt.shapes.samples import ShapesSamples
from dpt.training.settings import TrainConfig
from dpt.training.validation import FIGURES, PAPER_TIMESTEP, Samples

NUM_SHOWN, NUM_PHRASES = 6, 8


def run(args: argparse.Namespace) -> dict:
    """The command: see `measure`."""
    return measure(probes.measurement_of(args))


def measure(what: probes.Measurement) -> dict:
    """Measures, draws and writes; returns the summary of `probes.summary`."""
    probes.check_output(what, "rec")
    measured = probes.measure_all(what, "rec", {"": []})
    result = probes.summary(measured, [name for name in FIGURES if "precision" in name], what.timesteps)
    probes.write(what, "rec", result, measured)
    config = load_config(TrainConfig, what.config, what.set)
    sd = probes.load_base(config)
    sets = validation_samples(config.data, sd, num_samples=what.num_samples, split=what.split)
    for one in measured:
        for key, records in one.records.items():
            grid = draw_boxes(sd, sets[f"rec_{key}"], records)
            grid.save(what.output / f"rec_{one.name}_{key}.png")
    if config.data.kind == "shapes":
        for path, one in zip(what.checkpoints, measured, strict=True):
            scorer, own = probes.load_scorer(load_checkpoint(path), config)
            grid = draw_phrases(Artist(own, scorer), sets["rec_shapes"])
            grid.save(what.output / f"rec_{one.name}_phrases.png")
    return result


def draw_phrases(artist: Artist, samples: ShapesSamples) -> Image.Image:
    """A grid of the scene with the most phrases, once for each of its first eight phrases with the surest box."""
    index = max(range(len(samples)), key=lambda k: len(samples.phrases(k)))
    latents = as_latents(samples.get(index, 0).images[None, :1], artist.sd)[:, 0]
    image = to_images(artist.sd.decode_latents(latents))[0]
    rows = []
    for text, box in samples.phrases(index)[:NUM_PHRASES]:
        ((_, found),) = artist.find(image, text, count=1)
        rows.append((text, [with_boxes(image, [(box, "lime"), (found, "magenta")])]))
    columns = [make_grid(rows[k::2], cell=128, label_width=180) for k in range(2)]
    picture = Image.new("RGB", (sum(column.width for column in columns), columns[0].height), "white")
    picture.paste(columns[0], (0, 0))
    picture.paste(columns[1], (columns[0].width, 0))
    return picture


def draw_boxes(sd: StableDiffusion, samples: Samples, records: list[dict]) -> Image.Image:
    """A grid of the surest hits and the surest misses at t = 500, as the autoencoder gives their images back."""
    records = sorted((r for r in records if r["timestep"] == PAPER_TIMESTEP), key=lambda r: -r["surest"][0])
    rows = []
    for title, wanted in (("hit", True), ("miss", False)):
        for record in [r for r in records if bool(r["precision_at_1"]) == wanted][:NUM_SHOWN]:
            sample, (sureness, *box) = samples.get(record["index"], 0), record["surest"]
            latents = as_latents(sample.images[None, :1], sd)[:, 0]
            image = to_images(sd.decode_latents(latents))[0]
            boxed = with_boxes(image, [(sample.boxes[0].tolist(), "lime"), (box, "magenta")])
            rows.append((f"{title}, {100 * sureness:.0f} % sure: {sample.expression}", [boxed]))
    return make_grid(rows)
