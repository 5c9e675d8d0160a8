"""A local page to draw with and without self-correction: python -m dpt.demo --model shapes

Needs gradio (pip install -r requirements-demo.txt). The page is served to this machine alone, and at once: the model
is loaded meanwhile. Users are served one after the other; whoever closes the page stops their drawing.
"""

import argparse
import sys
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path

LOOPBACK = "127.0.0.1"
TARGETS = ("conditional", "latent")  # `dpt.sampling.CORRECTION_TARGETS`, without its slow imports
KNOWN_ARMS = [(0, None, "plain"), (0, None, "corrected")]  # gradio's plot draws only those that its first value has


def make_page(model: str, opening: Future):
    """The gradio page of a model; `opening` is its `dpt.studio.Studio`, once it is loaded."""
    import gradio  # an optional extra
    import pandas

    def ready():
        try:
            studio = opening.result()
        except CancelledError:
            return [gradio.skip()] * 4 + ["the model could not be loaded"]
        from dpt.stable_diffusion import sampling_defaults  # only now: two threads at one import can fail

        defaults = sampling_defaults(studio.sd.name)
        return [
            gradio.Textbox(interactive=True),
            gradio.Slider(value=defaults.correction_norm or 0.01, interactive=True),
            gradio.Dropdown(value=defaults.correction_target, interactive=True),
            gradio.Button(interactive=True),
            "ready",
        ]

    def run(prompt, seed, norm, target, phrase):
        try:
            for plain, corrected, points, say in opening.result().draw(prompt, seed, norm, target, phrase):
                yield plain, corrected, pandas.DataFrame(KNOWN_ARMS + points, columns=["step", "score", "arm"]), say
        except (ValueError, FloatingPointError, CancelledError) as error:
            say = f"error: {str(error) or 'the model could not be loaded'}"
            yield gradio.skip(), gradio.skip(), gradio.skip(), say  # what was drawn stays

    with gradio.Blocks(title="dpt") as page:
        gradio.Markdown(f"## {model}, without and with self-correction")
        with gradio.Row():
            prompt = gradio.Textbox(
                label="prompt", value="a red circle left of a blue square", elem_id="prompt", scale=3, interactive=False
            )
            seed = gradio.Number(label="seed", value=0, precision=0, minimum=0)
            phrase = gradio.Textbox(label="phrase to find", elem_id="phrase")
        with gradio.Row():
            norm = gradio.Slider(
                0,
                0.1,
                value=0.012,
                step=0.001,
                label="correction's length, as a share of the latent's",
                interactive=False,
            )
            target = gradio.Dropdown(
                TARGETS, value="latent", label="what goes on from the correction", interactive=False
            )
        button = gradio.Button("draw", variant="primary", elem_id="draw", interactive=False)
        with gradio.Row():
            plain = gradio.Image(label="without", elem_id="plain")
            corrected = gradio.Image(label="with", elem_id="corrected")
            plot = gradio.LinePlot(x="step", y="score", color="arm", title="matching score", elem_id="trace")
        status = gradio.Textbox("loading the model", label="status", interactive=False, elem_id="status")
        outputs = [plain, corrected, plot, status]
        inputs = [prompt, seed, norm, target, phrase]
        page.load(ready, None, [prompt, norm, target, button, status], api_name=False)
        button.click(run, inputs, outputs, concurrency_limit=1)
        prompt.submit(run, inputs, outputs, concurrency_limit=1, api_name=False)
    return page.queue(max_size=20)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="shapes, sd21-base, sd21, sd14, a local folder or a hub id")
    parser.add_argument("--dpt", type=Path, help="adapter and LoRA (default: those that belong to the model)")
    parser.add_argument("--scale", type=float, help="guidance scale (default: 5 for shapes, else 7.5)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 20 for shapes, else 50)")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    opening, page = Future(), None
    try:
        check(args)
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
        print(f"error: {error.name} is missing: pip install -r {packages}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        opening.cancel()  # if nothing came of it: whoever waits need not
        if page:
            page.close(verbose=False)
    return 0


def check(args: argparse.Namespace) -> None:
    """What can be told before the page is up. Raises ValueError."""
    if args.dpt and not args.dpt.exists():
        raise ValueError(f"--dpt {args.dpt} is not there; pass an adapter's folder or file")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    if args.scale is not None and not 0 <= args.scale < 1000:
        raise ValueError(f"--scale is {args.scale}; it must be a number from 0 to 1000")
    if not 1 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}; it must be from 1 to 65535")


def wait_forever() -> None:
    """Until Ctrl-C; the page is served by another thread."""
    threading.Event().wait()


def load(args: argparse.Namespace):
    """The command line's studio."""
    from dpt.studio import open_studio  # slow to import, so after the page is up

    return open_studio(args.model, dpt=args.dpt, scale=args.scale, steps=args.steps, device=args.device)


if __name__ == "__main__":
    sys.exit(main())
