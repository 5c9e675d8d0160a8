"""What a step costs, beside what it should cost.

    python -m dpt.benchmark sampling [--json] [--model shapes|random-145m] [--batch_size N]

`sampling` times a plain guided step and a self-corrected one, interleaved, and the share f of a U-Net pass that
(U-Net up to the block + adapter) takes. A corrected step should cost at most 1.10 x (1 + f) plain ones.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from dpt.adapter import DiscriminativeAdapter, Scorer
from dpt.config import AdapterConfig
from dpt.results import RESULTS, record_section
from dpt.sampling import CorrectionSettings, SelfCorrection, classifier_free_guidance
from dpt.stable_diffusion import load_stable_diffusion
from dpt.unet_features import block_channels, unet_features

FEATURE = "up1"


def make_unet(name: str) -> tuple[UNet2DConditionModel, DDIMScheduler, AdapterConfig, int]:
    """A U-Net with its scheduler, the adapter it would have, and its number of text tokens."""
    if name == "shapes":
        sd = load_stable_diffusion("shapes")
        small = {"hidden_dim": 128, "dim_feedforward": 512, "num_queries_itm": 4, "num_queries_rec": 12}
        width = sd.text_encoder.config.hidden_size
        config = AdapterConfig(in_channels=[block_channels(FEATURE, sd.unet.config)], text_dim=width, **small)
        return sd.unet, sd.scheduler, config, sd.tokenizer.model_max_length
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 512, 512),
        attention_head_dim=(2, 4, 8, 8),
        cross_attention_dim=512,
        use_linear_projection=True,
    )
    unet.eval().requires_grad_(False)
    config = AdapterConfig(in_channels=[block_channels(FEATURE, unet.config)], text_dim=512)
    return unet, DDIMScheduler(steps_offset=1, clip_sample=False), config, 77


def seconds(function) -> float:
    """Wall-clock time of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def sampling_steps(name: str, batch_size: int):
    """Functions that run a plain step, a corrected step, a U-Net pass of the guided batch's half, and its feature."""
    unet, scheduler, config, num_tokens = make_unet(name)
    torch.manual_seed(1)
    scorer = Scorer(DiscriminativeAdapter(config).eval().requires_grad_(False), (FEATURE,))
    latents = torch.randn(batch_size, 4, unet.config.sample_size, unet.config.sample_size)
    context = torch.randn(2, batch_size, num_tokens, unet.config.cross_attention_dim)
    pooled = torch.randn(batch_size, config.text_dim)
    scheduler.set_timesteps(50)
    timestep = scheduler.timesteps[10]
    denoise = classifier_free_guidance(
        unet,
        scheduler,
        encoder_hidden_states=context[0],
        negative_encoder_hidden_states=context[1],
        guidance_scale=7.5,
    )
    correct = SelfCorrection(unet, scorer, scheduler, context[0], pooled, CorrectionSettings())

    @torch.no_grad()
    def step(corrector=None):
        corrected = corrector(latents, timestep, 0, 50) if corrector else latents
        return scheduler.step(denoise(latents, corrected, timestep), timestep, latents)

    @torch.no_grad()
    def whole():
        return unet(latents, timestep, context[0])

    @torch.no_grad()
    def feature():
        features, _ = unet_features(unet, scorer.blocks, latents, timestep, context[0])
        return scorer.adapter.itm_embeddings(scorer.adapter(features, timestep))

    return {"plain": step, "corrected": lambda: step(correct), "whole": whole, "feature": feature}


def time_sampling(name: str, batch_size: int, repeats: int) -> dict:
    """Medians of interleaved runs, and the peak memory of either kind of step in a process of its own."""
    steps = sampling_steps(name, batch_size)
    for function in steps.values():
        function()
    times = {key: [] for key in steps}
    for _ in range(repeats):
        for key, function in steps.items():
            times[key].append(seconds(function))
    median = {key: statistics.median(values) for key, values in times.items()}
    share = median["feature"] / median["whole"]
    ratio = median["corrected"] / median["plain"]
    return {
        "model": name,
        "batch_size": batch_size,
        "repeats": repeats,
        "plain_step_s": median["plain"],
        "corrected_step_s": median["corrected"],
        "feature_share": share,
        "ratio": ratio,
        "allowed_ratio": 1.10 * (1 + share),
        "plain_peak_mb": _peak_mb(name, batch_size, "plain"),
        "corrected_peak_mb": _peak_mb(name, batch_size, "corrected"),
    }


def _peak_mb(name: str, batch_size: int, kind: str) -> float:
    command = [sys.executable, "-m", "dpt.benchmark", "sampling", "--model", name, "--batch_size", str(batch_size)]
    done = subprocess.run([*command, "--peak_of", kind], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sampling",))
    parser.add_argument("--model", choices=("shapes", "random-145m"), default="shapes")
    parser.add_argument("--batch_size", type=int, help="default: 8 for shapes, 2 for random-145m")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved runs of each kind (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a sentence")
    parser.add_argument("--record", action="store_true", help="put the sentence into docs/results.md")
    parser.add_argument(
        "--peak_of", choices=("plain", "corrected"), help="print one step's peak memory in MB alone (Linux)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    batch_size = args.batch_size or {"shapes": 8, "random-145m": 2}[args.model]
    if args.peak_of:
        step = sampling_steps(args.model, batch_size)[args.peak_of]
        step()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, such as of loading
        step()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return 0
    result = time_sampling(args.model, batch_size, args.repeats)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    sentence = (
        f"{args.model}, batch {batch_size}, {args.threads} thread(s): plain {result['plain_step_s']:.3f} s, corrected "
        f"{result['corrected_step_s']:.3f} s = {result['ratio']:.2f} x (f = {result['feature_share']:.2f}, allowed "
        f"{result['allowed_ratio']:.2f} x); peak {result['plain_peak_mb']:.0f} and "
        f"{result['corrected_peak_mb']:.0f} MB"
    )
    if args.record:
        command = f"python -m dpt.benchmark {shlex.join(sys.argv[1:] if argv is None else argv)}"
        record_section(RESULTS, f"sampling {args.model}", command, sentence)
    else:
        print(sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
