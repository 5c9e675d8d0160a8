"""Seconds and memory of sampling and training steps."""

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features
from dpt.backbones.unet import set_cpu_attention
from dpt.benchmark import BATCH_SIZES, CORRECTED, TRAINING_KINDS
from dpt.benchmark.random_models import RandomModel, random_model
from dpt.data.collate import conditioning_inputs
from dpt.guidance.self_correction import SelfCorrection
from dpt.lora import add_lora
from dpt.model import DPT, conditioning_of
from dpt.peak_memory import peak_mb, reset_peak
from dpt.sampling import ClassifierFreeGuidance
from dpt.sampling_settings import PAPER
from dpt.schedulers import make_scheduler, set_timesteps


def median_seconds(kinds: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median wall-clock time of calls of each function, one after the other and again, after a warm-up."""
    times = {name: [] for name in kinds}
    for k in range(repeats + 1):
        for name, function in kinds.items():
            began = time.perf_counter()
            function()
            if k:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def sampling_steps(model: RandomModel, batch_size: int) -> dict[str, Callable]:
    """The kinds of `guided_step_kinds` for a model, with an adapter of random weights."""
    torch.manual_seed(1)
    adapter = DiscriminativeAdapter(model.adapter_config).eval().requires_grad_(False)
    latents, texts = model.latents(batch_size), [model.conditioning(batch_size) for _ in range(2)]
    scorer, scale = Scorer(adapter, (model.feature,)), model.guidance_scale
    return guided_step_kinds(model.denoiser, model.scheduler, scorer, latents, *texts, guidance_scale=scale)


def guided_step_kinds(
    denoiser,
    scheduler,
    scorer: Scorer,
    latents,
    conditioning: Conditioning,
    negative: Conditioning,
    *,
    guidance_scale: float = 7.5,
) -> dict[str, Callable]:
    """Functions that run a plain guided step, corrected ones, a U-Net pass of one half, and the scored part of it.

    Args:
        latents: (B, C, h, w).
    """
    scheduler = make_scheduler(scheduler, "ddim")
    set_timesteps(scheduler, 50, latents.device, shape=latents.shape[1:])
    timestep = scheduler.timesteps[10]
    plain = ClassifierFreeGuidance(denoiser, scheduler, conditioning, negative, guidance_scale=guidance_scale)
    inputs = latents.to(denoiser.dtype)

    denoisers = {"plain": plain} | {
        name: SelfCorrection(plain, scorer, replace(PAPER, correction_target=target))
        for name, target in CORRECTED.items()
    }

    @torch.no_grad()
    def step(denoise):
        noise_pred, moved = denoise(latents, timestep, 10)
        scheduler._step_index = None  # flow matching counts its steps
        return scheduler.step(noise_pred, timestep, moved)

    @torch.no_grad()
    def whole():
        return denoiser_features(denoiser, (), inputs, timestep, conditioning, with_noise_pred=True)

    @torch.no_grad()
    def feature():
        features, _ = denoiser_features(denoiser, scorer.blocks, inputs, timestep, conditioning)
        return scorer.adapter.itm_embeddings(scorer.adapter([f.float() for f in features], timestep))

    steps = {name: functools.partial(step, denoise) for name, denoise in denoisers.items()}
    return steps | {"whole": whole, "feature": feature}


def time_sampling(name: str, batch_size: int, repeats: int) -> dict:
    """Medians of interleaved runs, and the peak memory of either kind of step in a process of its own."""
    model = random_model(name)
    median = median_seconds(sampling_steps(model, batch_size), repeats)
    share = median["feature"] / median["whole"]
    halves = 2 if model.guidance_scale > 1 else 1
    ratio = median["corrected"] / median["plain"]
    return {
        "model": name,
        "batch_size": batch_size,
        "repeats": repeats,
        "plain_step_s": median["plain"],
        "corrected_step_s": median["corrected"],
        "feature_share": share,
        "ratio": ratio,
        "ratio_latent": median["corrected_latent"] / median["plain"],
        "ratio_noise": median["corrected_noise"] / median["plain"],
        "bound_noise": 1 + share / halves,
        "allowed_ratio": 1.10 * (1 + 2 * share / halves),
        "plain_peak_mb": _peak_mb("sampling", name, batch_size, "plain"),
        "corrected_peak_mb": _peak_mb("sampling", name, batch_size, "corrected"),
    }


class SequentialDPT(DPT):
    """DPT with one U-Net call a pass, each of them to the end where `stop_early` is off, as the reference trains."""

    stop_early = True

    def features(self, batch, passes, *, with_full):
        parts = []
        for image, text in passes:
            conditioning = conditioning_of(batch, "expression" if text is None else "caption", text)
            with torch.no_grad():
                inputs = batch["noisy_latents"][:, image], batch["timesteps"], conditioning
                features, _ = denoiser_features(
                    self.denoiser, self.blocks, *inputs, with_noise_pred=not self.stop_early
                )
            parts.append(features)
        return [torch.cat(maps) for maps in zip(*parts, strict=True)], None


def training_steps(model: RandomModel, batch_size: int) -> dict:
    """Functions that run a step, forward and backward, and return its weighted loss.

    `batched`, `sequential` and `sequential_full` are a probe's, `tune` and `tune_checkpointed` a tune's.
    """
    denoiser, scheduler, feature = model.denoiser, model.scheduler, model.feature
    torch.manual_seed(1)
    adapter = DiscriminativeAdapter(config := model.adapter_config)
    boxes = torch.rand(batch_size, 1, 4) * 0.4 + 0.2
    positive_map = torch.zeros(1, 256)
    positive_map[0, 1:3] = 0.5
    token_mask = torch.arange(8)[None] < 3
    captions = model.conditioning(3 * batch_size).map(lambda value: value.unflatten(0, (-1, 3)))
    batch = {
        "noisy_latents": model.latents(batch_size, 3),
        "timesteps": torch.randint(1000, (batch_size,)),
        **conditioning_inputs("caption", captions),
        "caption_pooled": captions.pooled_prompt_embeds,
        **conditioning_inputs("expression", model.conditioning(batch_size)),
        "token_states": torch.randn(batch_size, 8, config.rec_text_dim),
        "noise_target": model.latents(batch_size),
        "targets": [{"boxes": b, "positive_map": positive_map, "token_mask": token_mask} for b in boxes],
    }
    half = denoiser.dtype != torch.float32

    def step(model, train_denoiser=False, checkpointing=False):
        if train_denoiser:
            if not getattr(denoiser, "peft_config", None):
                add_lora(denoiser, rank=4, alpha=4)
                set_cpu_attention(denoiser)
            (denoiser.enable_gradient_checkpointing if checkpointing else denoiser.disable_gradient_checkpointing)()
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model(batch)
        total = model.weights.total(losses)
        total.backward()
        model.zero_grad()
        return total.item()

    def module(kind, **options):
        return kind(denoiser, adapter, (feature,), scheduler, **options)

    batched, one_by_one, full = (module(kind, train_denoiser=False) for kind in (DPT, SequentialDPT, SequentialDPT))
    full.stop_early = False
    tune = module(DPT, train_denoiser=True)
    return {
        "batched": lambda: step(batched),
        "sequential": lambda: step(one_by_one),
        "sequential_full": lambda: step(full),
        "tune": lambda: step(tune, train_denoiser=True),
        "tune_checkpointed": lambda: step(tune, train_denoiser=True, checkpointing=True),
    }


def time_training(name: str, batch_size: int, repeats: int, kinds: tuple[str, ...] = TRAINING_KINDS) -> dict:
    """Medians of interleaved steps of these kinds, and their losses."""
    steps, losses = training_steps(random_model(name), batch_size), {}

    def run(kind):
        torch.manual_seed(2)  # the adapter's dropout
        losses[kind] = steps[kind]()

    tune = [kind for kind in kinds if kind.startswith("tune")]  # after the others: it leaves LoRA on the U-Net
    median = {}
    for group in ([kind for kind in kinds if kind not in tune], tune):
        median |= median_seconds({kind: functools.partial(run, kind) for kind in group}, repeats)
    result = {"model": name, "batch_size": batch_size, "repeats": repeats}
    result |= {f"{kind}_step_s": value for kind, value in median.items()}
    result["speedup"] = median["sequential"] / median["batched"]
    result["speedup_over_full"] = median["sequential_full"] / median["batched"]
    return result | {"loss_batched": losses["batched"], "loss_sequential": losses["sequential"]}


PEAK_KINDS = ("batched", "tune", "tune_checkpointed")


def training_peaks(name: str, kinds: tuple[str, ...] = PEAK_KINDS) -> dict:
    """Peak memory of steps at the second of `BATCH_SIZES`, each kind in a process of its own."""
    _, batch_size = BATCH_SIZES[name]
    peaks = {f"{kind}_peak_mb": _peak_mb("training", name, batch_size, kind) for kind in kinds}
    share = peaks["tune_checkpointed_peak_mb"] / peaks["tune_peak_mb"]
    return {"peaks_batch_size": batch_size, "checkpointed_share": share} | peaks


def _peak_mb(what: str, name: str, batch_size: int, kind: str) -> float:
    command = [sys.executable, "-m", "dpt.benchmark", what, "--model", name, "--batch_size", str(batch_size)]
    done = subprocess.run([*command, "--peak_of", kind], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(what: str, name: str, batch_size: int, kind: str) -> None:
    """Prints one kind of step's peak memory in MB."""
    step = {"sampling": sampling_steps, "training": training_steps}[what](random_model(name), batch_size)[kind]
    reset_peak()  # such as that of loading
    step()
    print(peak_mb())


def sentence_of(what: str, result: dict, threads: int) -> str:
    """A measurement in words."""
    head = f"{result['model']}, batch {result['batch_size']}, {threads} thread(s): "
    if what == "sampling":
        return head + (
            f"plain {result['plain_step_s']:.3f} s, corrected {result['corrected_step_s']:.3f} s = "
            f"{result['ratio']:.2f} x (f = {result['feature_share']:.2f}, allowed {result['allowed_ratio']:.2f} x), "
            f"by target latent {result['ratio_latent']:.2f} x, noise {result['ratio_noise']:.2f} x "
            f"(bound {result['bound_noise']:.2f} x); "
            f"peak {result['plain_peak_mb']:.0f} and {result['corrected_peak_mb']:.0f} MB"
        )
    one_by_one = f"{result['sequential_step_s']:.2f} s ({result['speedup']:.2f} x)"
    to_the_end = f"{result['sequential_full_step_s']:.2f} s ({result['speedup_over_full']:.2f} x)"
    return head + (
        f"a probe step takes {result['batched_step_s']:.2f} s, with its passes one after the other {one_by_one}, and "
        f"each to the end, as the reference does, {to_the_end}; losses {result['loss_batched']:.5f} and "
        f"{result['loss_sequential']:.5f}. A tune step takes {result['tune_step_s']:.2f} s, with gradient "
        f"checkpointing {result['tune_checkpointed_step_s']:.2f} s. Peaks at batch {result['peaks_batch_size']}: probe "
        f"{result['batched_peak_mb']:.0f} MB, tune {result['tune_peak_mb']:.0f} MB, with gradient checkpointing "
        f"{result['tune_checkpointed_peak_mb']:.0f} MB ({result['checkpointed_share']:.2f} x)"
    )
