"""The checks of `dpt.verify`: properties that a model with its scorer must have."""

import argparse
import functools
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dpt.base_models import default_dtype, recommended
from dpt.benchmark.steps import guided_step_kinds, median_seconds
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.data.coco import load_captions, load_pixels
from dpt.data.refcoco import load_expressions
from dpt.device import DTYPES, usable_device
from dpt.drawing import Artist
from dpt.images import make_grid, to_pixels
from dpt.lora import lora_state
from dpt.matching_score import matching_score, score_gradient
from dpt.metrics import bootstrap_interval
from dpt.peak_memory import peak_mb, reset_peak
from dpt.reading import noised, rec_outputs
from dpt.sampling import initial_noise
from dpt.shapes.scenes import render
from dpt.shapes.world import Example, ShapesWorld
from dpt.tasks.rec import rec_hits
from dpt.verify.stock import stock_latents

TIMESTEP = 500
PROMPTS = {
    "shapes": ["a red circle left of a blue square", "two green stars"],
    "other": ["a red cube on top of a blue sphere", "two dogs and a cat on a green sofa"],
}


class Verification:
    """A model with its scorer, and the checks; every check returns (passed or None where it could not run, figures)."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = usable_device(args.device)
        self.half = DTYPES[default_dtype(args.model, self.device.type, elsewhere="bfloat16")]
        self.artist = self.load(torch.float32)
        self.sd, self.scorer = self.artist.sd, self.artist.scorer
        self.prompts = PROMPTS["shapes" if args.model == "shapes" else "other"]

    def load(self, dtype: torch.dtype) -> Artist:
        options = {"variant": self.args.variant, "local_files_only": self.args.local_files_only}
        return Artist.load(self.args.model, self.args.dpt, dtype=dtype, device=self.device, **options)

    def tensors(self):
        """Every tensor of the checkpoint is in the model (loading names what is not)."""
        adapter = self.scorer.adapter
        file = load_checkpoint(self.args.dpt, local_files_only=self.args.local_files_only)
        pairs = [(file.adapter.state_dict(), adapter.state_dict()), (file.lora, lora_state(self.sd.denoiser))]
        same = all(
            there.keys() == here.keys() and all(torch.equal(v, here[k].cpu().to(v)) for k, v in there.items())
            for there, here in pairs
        )
        return same, {"adapter": len(pairs[0][0]), "lora": len(pairs[1][0])}

    def stock(self):
        """With factor 0, latents equal the stock pipeline's."""
        sampling = recommended(self.args.model).changed(num_inference_steps=5)
        ours = torch.stack([drawing.latents for drawing in self.artist.draw(self.prompts, [0, 1], sampling)])
        stock = stock_latents(self.sd, self.prompts, initial_noise([0, 1], self.sd.latent_shape()).to(ours), sampling)
        difference = (ours - stock).abs().max().item() / stock.abs().max().item()
        return difference < 1e-4, {"largest_relative_difference": difference}

    def half_precision(self):
        """Half-precision pictures are like float32's, and the score's gradient points the same way."""
        half = self.load(self.half)
        sampling = recommended(self.args.model).changed(num_inference_steps=10)
        drawn = [artist.draw(self.prompts, [0, 1], sampling) for artist in (self.artist, half)]
        pictures = [np.stack([drawing.image for drawing in row]).astype(int) for row in drawn]
        z = initial_noise([0, 1], self.sd.latent_shape()).to(self.device)
        timestep, gradients = torch.tensor(TIMESTEP, device=self.device), []
        for artist in (self.artist, half):
            conditioning = artist.sd.condition(self.prompts)
            gradients.append(score_gradient(artist.sd.denoiser, artist.scorer, z, timestep, conditioning)[1])
        cosine = torch.cosine_similarity(*(g.flatten(1) for g in gradients)).min().item()
        difference = float(np.abs(pictures[0] - pictures[1]).mean())
        figures = {"dtype": str(self.half), "mean_pixel_difference": difference, "gradient_cosine": cosine}
        if cosine <= 0.95:
            figures["note"] = "correct in float32, or see Precision in docs/drawing.md"
        return difference < 8 and cosine > 0.95, figures

    def score_rises(self):
        """A small step along the gradient raises every score, one against it lowers them on average.

        The score is the largest of several queries', so against its gradient another query may take over.
        """
        z = initial_noise(list(range(8)), self.sd.latent_shape()).to(self.device)
        # pure noise is what the denoiser expects at the last timestep
        timestep = torch.tensor(self.sd.scheduler.config.num_train_timesteps - 1, device=self.device)
        texts = self.sd.condition((self.prompts * 4)[:8])
        before, gradient = score_gradient(self.sd.denoiser, self.scorer, z, timestep, texts)
        step = 0.001 * z.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
        move = step[:, None, None, None] * gradient
        rises = [
            (score_gradient(self.sd.denoiser, self.scorer, z + sign * move, timestep, texts)[0] - before).tolist()
            for sign in (1, -1)
        ]
        return min(rises[0]) > 0 > statistics.mean(rises[1]), {"rise_along": rises[0], "rise_against": rises[1]}

    def itm(self):
        """An image's own caption scores above another's more often than not (95 % interval above 50 %)."""
        pairs = self._pairs()
        if not pairs:
            return None, {"why": "no --coco ROOT with annotations/captions_val2014.json"}
        right = []
        for start in tqdm(range(0, len(pairs), 8), desc="itm", leave=False):
            batch = pairs[start : start + 8]
            own = [caption for _, caption in batch]
            others = [pairs[(start + k + len(pairs) // 2) % len(pairs)][1] for k in range(len(batch))]
            noisy, at = noised(self.sd, torch.stack([pixels for pixels, _ in batch]), TIMESTEP)
            with torch.no_grad():
                true, false = (
                    matching_score(self.sd.denoiser, self.scorer, noisy, at, self.sd.condition(texts))
                    for texts in (own, others)
                )
            right += (true > false).tolist()
        mean, low, high = bootstrap_interval(right)
        return low > 0.5, {"accuracy": mean, "interval": [low, high], "pairs": len(pairs), "chance": 0.5}

    def _pairs(self) -> list[tuple[torch.Tensor, str]]:
        """Pixels and caption of some images."""
        if examples := self._scenes(seed=5):
            return [(to_pixels([render(e.scene)])[0], e.caption) for e in examples]
        if annotations := self._annotations("captions_val2014.json"):
            captions = {c.path: c for c in load_captions(annotations, self.args.coco / "val2014")}.values()
            chosen = list(captions)[: self.args.num_pairs]
            return [(load_pixels(c.path, self.sd.default_size), c.caption) for c in chosen]
        return []

    def _scenes(self, seed: int) -> list[Example]:
        """Examples of the shapes world for its own model, none for others."""
        world = ShapesWorld("val", seed=seed)
        return [world[i] for i in range(self.args.num_pairs if self.args.model == "shapes" else 0)]

    def _annotations(self, name: str) -> Path | None:
        """A file of --coco, where it is there."""
        path = self.args.coco and self.args.coco / "annotations" / name
        return path if path and path.exists() else None

    def rec(self):
        """The surest box overlaps the referred object more often than it overlaps another image's."""
        expressions = self._expressions()
        if not expressions:
            return None, {"why": "no --coco ROOT with annotations/finetune_refcoco_val.json"}
        predicted, truth = [], []
        for start in tqdm(range(0, len(expressions), 8), desc="rec", leave=False):
            batch = expressions[start : start + 8]
            pixels, texts = torch.stack([pixels for pixels, _, _ in batch]), [text for _, text, _ in batch]
            outputs = rec_outputs(self.sd, self.scorer, pixels, texts, timestep=TIMESTEP)
            predicted.append({name: value.float().cpu() for name, value in outputs.items()})
            truth += [box for _, _, box in batch]
        logits, boxes = (torch.cat([p[name] for p in predicted]) for name in ("pred_logits", "pred_boxes"))
        others = truth[len(truth) // 2 :] + truth[: len(truth) // 2]
        hits, chance = (rec_hits(logits, boxes, torch.stack(t), ks=(1,))[:, 0].float() for t in (truth, others))
        mean, low, high = bootstrap_interval((hits - chance).numpy())
        figures = {"precision_at_1": hits.mean().item(), "chance": chance.mean().item(), "expressions": len(truth)}
        return low > 0, figures | {"above_chance": mean, "interval": [low, high]}

    def _expressions(self) -> list[tuple[torch.Tensor, str, torch.Tensor]]:
        """Pixels, expression and box of some images."""
        if examples := self._scenes(seed=6):
            first = [(e, e.expressions[0]) for e in examples]
            boxes = [torch.tensor(e.scene.boxes()[x.index]).float() for e, x in first]
            return [(to_pixels([render(e.scene)])[0], x.text, box) for (e, x), box in zip(first, boxes, strict=True)]
        if annotations := self._annotations("finetune_refcoco_val.json"):
            referred = load_expressions(annotations, self.args.coco / "train2014")[: self.args.num_pairs]
            size = self.sd.default_size
            return [(load_pixels(r.path, size), r.expression, torch.from_numpy(r.boxes[0]).float()) for r in referred]
        return []

    def cost(self):
        """A corrected step costs at most 1.10 x (1 + f) plain ones; f is the share of the scored part of a pass.

        On CUDA its peak memory is at most 1.5 x a plain step's: what the truncated pass keeps comes on top.

        On a CPU a few small steps are timed too roughly for that: 1.5 x there, and `dpt.benchmark` measures it.
        """
        sd = self.sd
        z = initial_noise([0, 1], sd.latent_shape()).to(self.device)
        texts = (sd.condition(words) for words in (self.prompts, [""] * 2))
        runs = guided_step_kinds(sd.denoiser, sd.scheduler, self.scorer, z, *texts)
        peaks, on_cuda = {}, self.device.type == "cuda"

        def run(name):
            if on_cuda:
                reset_peak(self.device)
            runs[name]()
            if on_cuda:
                torch.cuda.synchronize(self.device)
                peaks[f"{name}_peak_mb"] = peak_mb(self.device)

        median = median_seconds({name: functools.partial(run, name) for name in runs}, repeats=5)
        share, ratio = median["feature"] / median["whole"], median["corrected"] / median["plain"]
        allowed = (1.1 if on_cuda else 1.5) * (1 + share)
        figures = {"feature_share": share, "ratio": ratio, "allowed_ratio": allowed} | peaks
        lean = not on_cuda or peaks["corrected_peak_mb"] <= 1.5 * peaks["plain_peak_mb"]
        return lean and ratio <= allowed, figures | {f"{name}_s": value for name, value in median.items()}

    def pictures(self):
        """Draws the prompts with and without correction."""
        rows = []
        corrected = self.artist.sampling.changed(num_inference_steps=self.args.steps)
        for prompt in self.prompts:
            drawn = [self.artist.draw([prompt] * 2, [0, 1], s) for s in (corrected.without_correction(), corrected)]
            images = [drawing.image for pair in drawn for drawing in pair]
            rows.append((f"{prompt} (two without correction, two with)", images))
        make_grid(rows).save(self.args.outdir / "pictures.png")
        return all(image.std() > 1 for _, images in rows for image in images), {}


CHECKS = ("tensors", "stock", "half_precision", "score_rises", "itm", "rec", "cost", "pictures")


def run_checks(args: argparse.Namespace) -> dict[str, dict]:
    """Runs, prints and writes down every check; returns whether it passed and its figures by its name."""
    args.outdir.mkdir(parents=True, exist_ok=True)
    verification = Verification(args)
    report = {"model": args.model, "dpt": str(args.dpt), "torch": torch.__version__, "checks": {}}
    for name in CHECKS:
        try:
            passed, figures = getattr(verification, name)()
        except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
            passed, figures = False, {"error": str(error)}
        report["checks"][name] = {"passed": passed} | figures
        print(f"{ {True: 'passed', False: 'FAILED', None: 'left out'}[passed]:9}{name}: {json.dumps(figures)}")
        (args.outdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report["checks"]
