"""`evaluate.py rec`: does a checkpoint find what an expression refers to?

    python evaluate.py rec outputs/shapes-probe --config configs/shapes/probe.yaml --output outputs/evaluation/rec

Precision among the 1, 5 and 10 surest boxes (a hit overlaps the true box by at least 0.5), by IoU and by generalised
IoU as the reference counts, for each list of expressions, at t = 500 and in the mean over --timesteps; the expression
is the U-Net's prompt. Controls may be named along, as for `itm`. Writes rec.json, rec.md, the records, and for each
checkpoint and list a grid of the surest hits and the surest misses (green: true, magenta: found).
"""

import argparse

from PIL import Image

from dpt.config import TrainConfig, load_config
from dpt.data.collate import as_latents
from dpt.data.sources import validation_samples
from dpt.evaluation import probes
from dpt.images import make_grid, to_images, with_boxes
from dpt.stable_diffusion import StableDiffusion
from dpt.validation import FIGURES, PAPER_TIMESTEP, Samples

NUM_SHOWN = 6


def run(args: argparse.Namespace) -> dict:
    """Measures, draws and writes; returns the summary of `probes.summary`."""
    measured = probes.measure_all(args, "rec", {"": []})
    result = probes.summary(measured, [name for name in FIGURES if "precision" in name], args.timesteps)
    probes.write(args, "rec", result, measured)
    config = load_config(TrainConfig, args.config, args.set)
    sd = probes.load_base(config)
    sets = validation_samples(config.data, sd, num_samples=args.num_samples, split=args.split)
    for one in measured:
        for key, records in one.records.items():
            grid = draw_boxes(sd, sets[f"rec_{key}"], records)
            grid.save(args.output / f"rec_{one.name}_{key}.png")
    return result


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
