"""A local page to draw with and without self-correction: python -m dpt.demo --model shapes

Needs gradio (pip install -r requirements-demo.txt). The page is served to this machine alone, and at once: the model
is loaded meanwhile. Users are served one after the other; whoever closes the page stops their drawing.
"""

import argparse
import sys
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path

from dpt.base_models import DPT_WEIGHTS, check_name, known_name
from dpt.command_line import ArgumentParser, fail, number, one_line_errors
from dpt.files import check_text
from dpt.hub import is_hub_id
from dpt.sampling_settings import CORRECTION_TARGETS, DEFAULT_CHOOSE_AT

LOOPBACK = "127.0.0.1"
EXAMPLE = "a red circle left of a blue square"
LABELS = {
    "norm": "correction's length, as a share of the latent's",
    "target": "what goes on from the correction",
    "candidates": "candidates (1 to 8), of which one is kept",
    "choose_at": "choose at, a fraction of the steps",
    "gallery": "candidates as predicted at the choice, with their scores",
}
KNOWN_ARMS = [(0, None, "plain"), (0, None, "corrected")]  # gradio's plot draws only those that its first value has


def make_page(model: str, opening: Future):
    """The gradio page of a model; `opening` is its `dpt.demo.studio.Studio`, once it is loaded."""
    import gradio  # an optional extra
    import pandas

    def ready():
        try:
            sampling = opening.result().sampling
        except CancelledError:
            return [*[gradio.skip()] * len(locked), "the model could not be loaded"]
        own = {norm: sampling.correction_norm or 0.01, target: sampling.correction_target}
        own |= {candidates: sampling.candidates, choose_at: (sampling.choose_at or DEFAULT_CHOOSE_AT)[-1]}
        values = [{"value": own[control]} if control in own else {} for control in locked]
        return [*(gradio.update(interactive=True, **value) for value in values), "ready"]

    def run(prompt, seed, norm, target, phrase, candidates=1, choose_at=DEFAULT_CHOOSE_AT[0]):
        try:
            for *shown, points, found, say in opening.result().draw(
                prompt, seed, norm, target, phrase, candidates, choose_at
            ):
                yield *shown, pandas.DataFrame(KNOWN_ARMS + points, columns=["step", "score", "arm"]), found, say
        except (ValueError, FloatingPointError, CancelledError) as error:
            say = f"error: {str(error) or 'the model could not be loaded'}"
            yield *[gradio.skip()] * 4, say  # what was drawn stays

    def show_gallery(count):
        return gradio.update(visible=(count or 0) > 1)

    lock, whole = {"interactive": False}, {"precision": 0}
    with gradio.Blocks(title="dpt") as page:
        gradio.Markdown(f"## {model}, without and with self-correction")
        with gradio.Row():
            prompt = gradio.Textbox(EXAMPLE, label="prompt", elem_id="prompt", scale=3, **lock)
            seed = gradio.Number(0, label="seed", minimum=0, **whole)
            phrase = gradio.Textbox(label="phrase to find", elem_id="phrase")
        with gradio.Row():
            norm = gradio.Slider(0, 0.1, 0.012, step=0.001, label=LABELS["norm"], scale=2, **lock)
            target = gradio.Dropdown(CORRECTION_TARGETS, value="latent", label=LABELS["target"], **lock)
            candidates = gradio.Number(1, label=LABELS["candidates"], elem_id="count", **whole, **lock)
            choose_at = gradio.Number(DEFAULT_CHOOSE_AT[0], label=LABELS["choose_at"], step=0.05, **lock)
        button = gradio.Button("draw", variant="primary", elem_id="draw", **lock)
        with gradio.Row():
            plain = gradio.Image(label="without", elem_id="plain")
            corrected = gradio.Image(label="with", elem_id="corrected")
            plot = gradio.LinePlot(x="step", y="score", color="arm", title="matching score", elem_id="trace")
        status = gradio.Textbox("loading the model", label="status", elem_id="status", **lock)
        layout = {"columns": 4, "fit_columns": False, "height": "auto", "visible": False}
        gallery = gradio.Gallery(label=LABELS["gallery"], elem_id="candidates", **layout)
        outputs = [plain, corrected, plot, gallery, status]
        inputs = [prompt, seed, norm, target, phrase, candidates, choose_at]
        locked = [prompt, norm, target, candidates, choose_at, button]
        page.load(ready, None, [*locked, status], api_name=False)
        candidates.change(show_gallery, candidates, gallery, queue=False, api_name=False)
        button.click(run, inputs, outputs, concurrency_limit=1)
        prompt.submit(run, inputs, outputs, concurrency_limit=1, api_name=False)
    return page.queue(max_size=20)


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="shapes", help="shapes, sd21-base, sd21, sd14, a local folder or a hub id")
    add("--dpt", type=Path, help="adapter and LoRA, a path or a hub id (default: those that belong to the model)")
    add("--scale", type=number(float, at_least=0, below=1000), help="guidance scale (default: 5 for shapes, else 7.5)")
    steps = number(int, at_least=1, at_most=500)
    add("--steps", type=steps, help="sampling steps (default: 20 for shapes, else 50)")
    add("--device", help="default: the first GPU, else the CPU")
    add("--local-files-only", action="store_true", help="never ask the hub")
    add("--port", type=number(int, at_least=1, at_most=65535), default=7860)
    args = parser.parse_args(argv)
    opening, page = Future(), None
    try:
        check_text("--model", args.model)
        check_name(args.model)
        if args.dpt is None and known_name(args.model) not in DPT_WEIGHTS:
            raise ValueError(
                f"--model is {args.model!r}, of which no adapter is known; pass --dpt PATH, or --model shapes"
            )
        if args.dpt and not args.dpt.exists() and not is_hub_id(args.dpt):
            raise ValueError(f"--dpt {args.dpt} is not there; pass an adapter's folder or file, or a hub id")
        page = make_page(args.model, opening)
        try:
            _, url, _ = page.launch(
                server_name=LOOPBACK, server_port=args.port, share=False, prevent_thread_lock=True, quiet=True
            )
        except OSError as error:
            raise ValueError(f"--port {args.port} is in use, or not permitted; pass another --port") from error
        print(f"{url}: open it in a browser; the model is being loaded")
        opening.set_result(load(args))
        wait_forever()
    except ModuleNotFoundError as error:
        packages = "requirements.txt" if page else "requirements-demo.txt"
        return fail(f"{error.name} is missing: pip install -r {packages}")
    finally:
        opening.cancel()  # if nothing came of it: whoever waits need not
        if page:
            page.close(verbose=False)
    return 0


def wait_forever() -> None:
    """Until Ctrl-C; the page is served by another thread."""
    threading.Event().wait()


def load(args: argparse.Namespace):
    """The command line's studio."""
    from dpt.demo.studio import open_studio  # slow to import, so after the page is up

    settings = {name: getattr(args, name) for name in ("dpt", "scale", "steps", "device", "local_files_only")}
    return open_studio(args.model, **settings)


if __name__ == "__main__":
    sys.exit(main())
