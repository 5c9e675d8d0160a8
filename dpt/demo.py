"""A local page to draw with and without self-correction: python -m dpt.demo --model shapes

Needs gradio (pip install -r requirements-demo.txt). The page is served to this machine alone. Users are served one
after the other; whoever closes the page stops their drawing.
"""

import argparse
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from dpt.adapter import Scorer
from dpt.checkpoint import DPT_WEIGHTS, load_checkpoint
from dpt.images import to_pixels, with_boxes
from dpt.metrics import objectness
from dpt.sampling import CORRECTION_TARGETS, CorrectionSettings, draw, initial_noise
from dpt.stable_diffusion import (
    MODELS,
    StableDiffusion,
    known_name,
    load_stable_diffusion,
    sampling_defaults,
    usable_device,
)
from dpt.unet_features import unet_features

EXAMPLE = "a red circle left of a blue square"
LOOPBACK = "127.0.0.1"
GROUNDING_TIMESTEP = 200
THREAD = "drawing"
COLORS = ("lime", "orange", "magenta")  # of boxes, the surest first


class Stopped(Exception):
    """Raised inside a drawing that nobody waits for any more."""


def in_steps(work: Callable[[Callable], object]) -> Iterator[object]:
    """Runs `work(report)` in a thread and yields what it reports, then its result; closing it stops the work.

    Args:
        work: calls `report(value)` now and then, which raises `Stopped` when the iterator was closed.
    """
    values, stop = queue.Queue(), threading.Event()

    def report(value):
        if stop.is_set():
            raise Stopped
        values.put((False, value))

    def run():
        try:
            values.put((True, work(report)))
        except Stopped:
            pass
        except Exception as error:
            values.put((True, error))

    thread = threading.Thread(target=run, daemon=True, name=THREAD)
    thread.start()
    try:
        final = False
        while not final:
            final, value = values.get()
            if isinstance(value, Exception):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


@torch.no_grad()
def find_phrase(sd: StableDiffusion, scorer: Scorer, image: np.ndarray, phrase: str, count: int = 3) -> list[tuple]:
    """The surest REC boxes of a phrase in a picture (H, W, 3) uint8: (objectness, cxcywh) each, surest first."""
    latents = sd.encode_images(to_pixels([image]))
    noise = initial_noise([0], tuple(latents.shape[1:])).to(latents.device)
    timestep = torch.tensor(GROUNDING_TIMESTEP, device=latents.device)
    noisy = sd.scheduler.add_noise(latents, noise, timestep[None])
    context, _ = sd.encode_prompts([phrase])
    features, _ = unet_features(sd.unet, scorer.blocks, noisy.to(sd.dtype), timestep, context)
    outputs = scorer.adapter.rec_outputs(scorer.adapter([feature.float() for feature in features], timestep))
    sureness = objectness(outputs["pred_logits"])[0]
    return [
        (sureness[k].item(), outputs["pred_boxes"][0, k].tolist()) for k in sureness.argsort(descending=True)[:count]
    ]


class Studio:
    """A model with its adapter, as the page uses it."""

    def __init__(self, sd: StableDiffusion, scorer: Scorer, *, guidance_scale: float, num_inference_steps: int):
        self.sd, self.scorer = sd, scorer
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps

    def draw(self, prompt: str, seed: int, norm: float, target: str, phrase: str) -> Iterator[tuple]:
        """(plain, corrected, points of the score, what to say) after every step; pictures are None until done.

        Raises:
            ValueError: an empty prompt.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what to draw")
        if seed is None:
            raise ValueError("the seed is empty; give a number")
        images, points = {}, []
        for arm, length in (("plain", 0.0), ("corrected", norm)):
            correction = CorrectionSettings(norm=length, target=target)
            for value in in_steps(lambda report, c=correction: self._draw_one(prompt, int(seed), c, report)):
                if isinstance(value, dict):
                    points.append((value["step"], value["score"][0], arm))
                    say = f"{arm}: step {value['step'] + 1} of {self.num_inference_steps}"
                else:
                    images[arm] = value[0]
                    say = f"{arm}: done"
                yield images.get("plain"), images.get("corrected"), list(points), say
        if phrase.strip():
            for arm, image in images.items():
                found = zip(find_phrase(self.sd, self.scorer, image, phrase), COLORS, strict=False)
                images[arm] = with_boxes(image, [(box, color) for (_, box), color in found][::-1])  # the surest on top
            yield images["plain"], images["corrected"], list(points), f"boxes for {phrase.strip()!r}, surest green"

    def _draw_one(self, prompt, seed, correction, report):
        trace = []

        def on_step(step, latents):
            report(trace[-1])

        return draw(
            self.sd,
            [prompt],
            [seed],
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            scorer=self.scorer,
            correction=correction,
            trace=trace,
            on_step=on_step,
        )


def make_page(studio: Studio):
    """The gradio page."""
    import gradio  # an optional extra, and slow to import
    import pandas

    def run(prompt, seed, norm, target, phrase):
        try:
            for plain, corrected, points, say in studio.draw(prompt, seed, norm, target, phrase):
                yield plain, corrected, pandas.DataFrame(points, columns=["step", "score", "arm"]), say
        except (ValueError, FloatingPointError) as error:
            raise gradio.Error(str(error)) from error

    defaults = sampling_defaults(studio.sd.name)
    with gradio.Blocks(title="dpt") as page:
        gradio.Markdown(f"## {studio.sd.name}, without and with self-correction")
        with gradio.Row():
            prompt = gradio.Textbox(
                label="prompt", value="a red circle left of a blue square", elem_id="prompt", scale=3
            )
            seed = gradio.Number(label="seed", value=0, precision=0, minimum=0)
            norm = gradio.Slider(
                0,
                0.1,
                value=defaults.correction_norm or 0.01,
                step=0.001,
                label="correction's length, as a share of the latent's",
            )
            target = gradio.Dropdown(
                CORRECTION_TARGETS, value=defaults.correction_target, label="what goes on from the correction"
            )
            phrase = gradio.Textbox(label="phrase to find", elem_id="phrase")
        button = gradio.Button("draw", variant="primary", elem_id="draw")
        with gradio.Row():
            plain = gradio.Image(label="without", elem_id="plain")
            corrected = gradio.Image(label="with", elem_id="corrected")
            plot = gradio.LinePlot(x="step", y="score", color="arm", title="matching score", elem_id="trace")
        status = gradio.Textbox(label="status", interactive=False, elem_id="status")
        outputs = [plain, corrected, plot, status]
        inputs = [prompt, seed, norm, target, phrase]
        button.click(run, inputs, outputs, concurrency_limit=1)
        prompt.submit(run, inputs, outputs, concurrency_limit=1)
    return page.queue(max_size=20)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help=f"{', '.join(MODELS)}, a local folder or a hub id")
    parser.add_argument("--dpt", type=Path, help="adapter and LoRA (default: those that belong to the model)")
    parser.add_argument("--scale", type=float, help="guidance scale (default: 5 for shapes, else 7.5)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 20 for shapes, else 50)")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    try:
        name = known_name(args.model)
        weights = args.dpt or DPT_WEIGHTS.get(name)
        if weights is None or not weights.exists():
            raise ValueError(f"self-correction needs an adapter: {weights or args.model} is not there; pass --dpt PATH")
        device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        sd = load_stable_diffusion(args.model, dtype=dtype, device=device)
        scorer = load_checkpoint(weights).attach(sd)
        defaults = sampling_defaults(args.model)
        studio = Studio(
            sd,
            scorer,
            guidance_scale=defaults.guidance_scale if args.scale is None else args.scale,
            num_inference_steps=defaults.num_inference_steps if args.steps is None else args.steps,
        )
        if studio.num_inference_steps < 1:
            raise ValueError(f"--steps is {args.steps}; it must be at least 1")
        make_page(studio).launch(server_name=LOOPBACK, server_port=args.port, share=False)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install -r requirements-demo.txt", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # such as a port in use
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
