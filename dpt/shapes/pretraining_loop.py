"""The training loop of the shapes world's own model, whose batch is a function of the step number alone.

Weights, their average, optimiser and step are its whole state: a killed run goes on exactly.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dpt.files import append_line, replacing
from dpt.training.curves import drop_metrics_after
from dpt.weights import read_pickle

STATE = {"model": dict, "average": dict, "optimizer": dict, "step": int}


def schedule(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero over the last `decay` share of the steps."""
    falling = max(1, round(steps * decay))
    return min((step + 1) / max(1, warmup), 1.0, (steps - step) / falling)


def read_state(path: Path) -> dict:
    """A stage's state, with the keys of `STATE`. No code in the file is run.

    Raises:
        ValueError: the file is no such state; it is named.
    """
    try:
        state = read_pickle(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to begin anew") from error
    for key, kind in STATE.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise ValueError(f"{path} is no training's state, it lacks {key}; remove it to begin anew")
    return state


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the model's: average = decay * average + (1 - decay) * model."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def train_stage(
    name: str,
    folder: Path,
    model: nn.Module,
    losses_at: Callable[[int], dict[str, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: int,
    decay: float,
    ema: float,
    clip_groups: list[list[nn.Parameter]] | None = None,
    parts: int = 1,
    save_every: int = 200,
    evaluate: Callable[[nn.Module, int], dict] | None = None,
    evaluate_every: int = 0,
) -> nn.Module:
    """Trains `model` with AdamW and returns the average of its weights.

    Args:
        name: names the stage's files in `folder`: `{name}.pt` (state) and `{name}.metrics.jsonl`.
        losses_at: maps a batch's number to named losses; the mean of their sums over a step's batches is minimised.
        ema: decay of the weights' average, warmed up as (1 + step) / (10 + step).
        clip_groups: parameters whose gradients are clipped together, to length 1; by default all.
        parts: batches a step. They are computed side by side, each on a thread of its own: on two cores 1.2 times as
            fast as one batch of the joint size on both.
        evaluate: maps the averaged model and the step to figures for the metrics file.

    To resume, call again with the same folder: training goes on from the last saved step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path, metrics_path = folder / f"{name}.pt", folder / f"{name}.metrics.jsonl"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    average = copy.deepcopy(model).eval()
    stateful = {"model": model, "average": average, "optimizer": optimizer}
    start = _restore(state_path, stateful)
    if start:
        drop_metrics_after(metrics_path, start)
    all_threads = torch.get_num_threads()
    threads = max(1, all_threads // parts)
    gradients_of = partial(_losses_and_gradients, losses_at, parameters, threads)
    with ThreadPoolExecutor(parts) as pool, contextlib.ExitStack() as ended:
        ended.callback(torch.set_num_threads, all_threads)
        bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
        began = time.perf_counter()
        for step in bar:
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps=steps, warmup=warmup, decay=decay)
            results = list(pool.map(gradients_of, range(step * parts, (step + 1) * parts)))
            losses = {key: sum(of_part[key] for of_part, _ in results) / parts for key in results[0][0]}
            if not math.isfinite(sum(losses.values())):
                raise FloatingPointError(f"{name}: loss is {sum(losses.values())} at step {step}: lower lr (now {lr})")
            for parameter, *of_parts in zip(parameters, *(gradients for _, gradients in results), strict=True):
                parameter.grad = None if of_parts[0] is None else sum(of_parts) / parts
            grad_norm = max(nn.utils.clip_grad_norm_(group, 1.0) for group in clip_groups or [parameters])
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, model, min(ema, (1 + step) / (10 + step)))
            figures = {}
            if step % 10 == 9:
                figures["seconds"] = time.perf_counter() - began
                bar.set_postfix({k: f"{v:.4g}" for k, v in losses.items()})
            if evaluate and evaluate_every and (step + 1) % evaluate_every == 0:
                figures |= evaluate(average, step + 1)
            if figures:
                append_line(metrics_path, {"step": step + 1, "grad_norm": grad_norm.item()} | losses | figures)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                with replacing(state_path) as temporary:
                    torch.save(
                        {key: part.state_dict() for key, part in stateful.items()} | {"step": step + 1}, temporary
                    )
    return average


def _restore(path: Path, stateful: dict) -> int:
    """Loads what the file at `path` holds of each part, and returns its step; 0 without a file."""
    if not path.exists():
        return 0
    state = read_state(path)
    try:
        for key, part in stateful.items():
            part.load_state_dict(state[key])
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is of another model: {error}; remove it to begin anew") from error
    return state["step"]


def _losses_and_gradients(
    losses_at: Callable[[int], dict[str, torch.Tensor]],
    parameters: list[nn.Parameter],
    threads: int,
    batch: int,
) -> tuple[dict[str, float], tuple[torch.Tensor | None, ...]]:
    """A batch's losses, and the gradients of their sum by the parameters, on so many threads of torch."""
    torch.set_num_threads(threads)
    # autocast's cache of weights is one for all threads: which graph a weight's cast belongs to would be chance
    with torch.autocast(parameters[0].device.type, torch.bfloat16, cache_enabled=False):
        losses = losses_at(batch)
    gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
    return {name: loss.item() for name, loss in losses.items()}, gradients
