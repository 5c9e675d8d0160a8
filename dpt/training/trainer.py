"""The one training loop of both stages: probe (the adapter on a frozen denoiser) and tune (adapter and LoRA).

A step's samples, noise, timesteps and dropout are functions of the seed and the step, so that a killed run goes on as
if it had never stopped, and several processes train as one does with the joint batch.
"""

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from tqdm import tqdm

from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import recommended
from dpt.checkpoint.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from dpt.config import flatten, load_config, save_config
from dpt.data.collate import Batch, collate, encode_batch
from dpt.data.loader import micro_batches
from dpt.data.sources import ranked_prompts, training_samples, validation_samples
from dpt.data.trajectories import encode_ranked
from dpt.device import WEIGHT_DTYPES
from dpt.peak_memory import peak_mb
from dpt.rec_text import load_rec_text_encoder
from dpt.tasks.reward import reward_inputs
from dpt.tasks.task import EXPRESSION, TRUE_PAIR
from dpt.training.accelerator import learning_rate_factor, make_accelerator, schedule_stretch
from dpt.training.assembly import encode_options, make_model, trained_weights
from dpt.training.controls import control_batch, control_inputs, control_unet
from dpt.training.run_folder import (
    RunLog,
    check_run,
    load_newest,
    restore_optimizer,
    save_step,
    set_damaged_aside,
    versions,
)
from dpt.training.sample_grid import draw_grid
from dpt.training.settings import OptimSettings, TrainConfig, check_resumption, check_stage
from dpt.training.validation import figure_names, validate

STAGES = ("probe", "tune")
MEASURED = 64  # samples whose features are standardised by


class Trainer:
    """A run of one stage; `train` goes through it.

    Raises:
        ValueError: a setting, file or folder that cannot be used; it is named, with the remedy.
    """

    def __init__(self, config: TrainConfig, stage: str):
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; it must be {' or '.join(STAGES)}")
        self.config, self.stage = config, stage
        self.accelerator = make_accelerator(config)
        self.folder, self.log = Path(config.output_folder) / config.run_name, None
        self.step, self.skipped, self.best = 0, 0, (None, 0)  # best: the highest figure, and validations since
        check_run(self.folder, resume=config.resume)
        if config.resume and self.accelerator.is_main_process:
            set_damaged_aside(self.folder, self._say)
        self.accelerator.wait_for_everyone()
        newest = self._newest() if config.resume else None
        given = config.init_from not in (None, "new")
        start = newest[0] if newest else load_checkpoint(config.init_from) if given else None
        set_seed(config.seed)
        self._load_base(goes_on=newest is not None)
        self.model = make_model(config, stage, self.sd, self.rec_text, start)
        self._load_data()
        names = figure_names(self.model.tasks, self.val_sets, self.val_ranked)
        if (best := config.validation.best) is not None and best not in names:
            raise ValueError(f"validation.best is {best!r}; the figures are {', '.join(names)}")
        if config.adapter.normalize_features and start is None:
            self._measure_features()
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.names, optim = list(parameters), config.optim
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay
        )
        if newest:
            restore_optimizer(optimizer, self.names, newest[1])
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if newest and self.accelerator.scaler is not None and newest[2].get("scaler"):
            self.accelerator.scaler.load_state_dict(newest[2]["scaler"])
        self.steps = optim.steps if optim.epochs is None else self._steps_of(optim.epochs)
        if self.accelerator.is_main_process:
            self._begin_log(sum(p.numel() for p in parameters.values()))

    def _newest(self) -> tuple | None:
        """Weights, optimiser's tensors and state of the run's last checkpoint; None where there is none.

        Raises:
            ValueError: it is a run of the other stage, or of other settings.
        """
        newest = load_newest(self.folder)
        if newest is None:
            self._say(f"resume=true: {self.folder} has no checkpoint to go on from, so this run starts anew")
            return None
        state = newest[2]
        self.step, self.skipped, self.best = state["step"], state["skipped"], tuple(state.get("best", self.best))
        if state["stage"] != self.stage:
            raise ValueError(f"{self.folder} is a {state['stage']}; resume it with train_{state['stage']}.py")
        saved = load_config(TrainConfig, self.folder / "config.yaml")
        self.config.init_from = self.config.init_from or saved.init_from
        saved.init_from = saved.init_from or self.config.init_from  # runs of before do not know it
        check_resumption(self.config, saved)
        self._check_joint_batch(state.get("samples_per_step"), saved.optim)
        return newest

    def _load_base(self, *, goes_on: bool) -> None:
        """The frozen models: Stable Diffusion, and the text encoder that REC is aligned with."""
        config = self.config
        self.sd = load_stable_diffusion(
            config.model.name,
            revision=config.model.revision,
            no_t5=config.model.no_t5,
            local_files_only=config.model.local_files_only,
            dtype=WEIGHT_DTYPES[config.optim.mixed_precision],
            device=self.accelerator.device,
            notice=self._say,
        )
        check_stage(config, self.stage, self.sd.scheduler.config.num_train_timesteps, goes_on=goes_on)
        control_unet(config.control, self.sd)
        self.rec_text = load_rec_text_encoder(
            config.model.rec_text_encoder,
            self.sd,
            with_model=bool(config.loss.weights.contrastive_align) and config.data.kind != "trajectories",
            local_files_only=config.model.local_files_only,
        )

    def _load_data(self) -> None:
        data, seed = self.config.data, self.config.seed
        with self.accelerator.main_process_first():
            self.data = training_samples(data, self.sd, seed=seed, notice=self._say)
            self.val_sets = validation_samples(data, self.sd, num_samples=self.config.validation.num_samples)
        self.ranked = ranked_prompts(data, self.sd, held_out=False, seed=seed)
        self.val_ranked = ranked_prompts(data, self.sd, held_out=True)

    def _begin_log(self, num_parameters: int) -> None:
        self.log = RunLog(self.folder, self.step)
        save_config(self.config, self.folder / "config.yaml")
        processes = self.accelerator.num_processes
        self._say(f"{self.stage} {self.config.run_name} from step {self.step}, {processes} process(es)")
        self._say(versions())
        samples = [] if self.data is None else [f"{len(self.data)} samples"]
        samples += [] if self.ranked is None else [f"trajectories of {len(self.ranked)} prompts"]
        self._say(f"{num_parameters:,} parameters to train, {', '.join(samples)}, {self.steps} steps")

    def _check_joint_batch(self, before: int | None, saved: OptimSettings) -> None:
        """Raises ValueError where a run that goes on would have other samples a step, or another schedule.

        Args:
            before: samples a step so far; None in runs older than this figure.
        """
        optim, processes = self.config.optim, self.accelerator.num_processes
        part = saved.batch_size * saved.gradient_accumulation_steps
        before = processes * part if before is None else before
        if before != self._samples_per_step:
            raise ValueError(
                f"{self.folder} trains on {before} samples a step, here it would on {self._samples_per_step}: resume "
                "it with as many processes x optim.batch_size x optim.gradient_accumulation_steps as it began with"
            )
        if schedule_stretch(saved, max(1, before // part)) != schedule_stretch(optim, processes):
            raise ValueError(
                "optim.schedule_length is 'reference', whose rate depends on processes and accumulation: resume "
                f"{self.folder} with {before // part} processes and {saved.gradient_accumulation_steps} accumulated"
            )
        if any(getattr(saved, name) != getattr(optim, name) for name in ("batch_size", "gradient_accumulation_steps")):
            self._say(
                f"the same {before} samples a step as before, timesteps and noise too, in other batches: rounding and "
                "dropout's masks differ, so weights will not be equal to the digit"
            )

    def _say(self, message: str) -> None:
        if self.log:
            self.log.say(message)
        elif self.accelerator.is_main_process:  # before there is a run folder
            tqdm.write(message)

    def train(self) -> Path:
        """Trains to the last step and returns the run folder.

        Raises:
            FloatingPointError: a non-finite loss, unless it is skipped.
            ValueError: the run folder cannot be written to, such as on a full disk; its checkpoints are as they were.
        """
        try:
            return self._train()
        except FloatingPointError as error:
            self._say(f"stopped: {error}")
            raise
        except (OSError, SafetensorError) as error:
            steps = checkpoints(self.folder)
            last = f"the last good checkpoint is {steps[0]}" if steps else "there is no checkpoint yet"
            reason = " ".join(str(error).split())
            raise ValueError(
                f"step {self.step}: {self.folder} cannot be written to ({reason}); {last}. Free some space, or lower "
                "checkpoints.keep, and go on with resume=true"
            ) from error

    def _train(self) -> Path:
        config = self.config
        if config.tracker:
            self.accelerator.init_trackers("dpt", flatten(config))
        if self.step >= self.steps or self._out_of_patience():
            self._say(f"nothing is left to train: the run is at step {self.step}, and {self.steps} are asked for")
        batches, seconds, first = self._batches(), 0.0, self.step
        bar = tqdm(total=self.steps, initial=self.step, desc=self.stage, disable=not self.log, mininterval=1)
        with bar:
            while self.step < self.steps and not self._out_of_patience():
                began = time.perf_counter()
                losses = self.update(batches)
                seconds += time.perf_counter() - began
                self.step += 1
                last = self.step == self.steps
                if self.step % config.log_every == 0 or last:
                    figures = losses | {
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "samples_per_second": (self.step - first) * self._samples_per_step / seconds,
                        "peak_memory_mb": peak_mb(self.accelerator.device),
                    }
                    self._record(figures)
                    bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
                bar.update()
                self._after_step(last)
        if self.log:  # once more where a kill came between the last checkpoint and its pictures
            self.log.plot()
            every = config.samples.every
            if every >= 0 and not self._grid_path().exists() and self.step % (every or 1) == 0:
                self._draw_samples()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self._say(f"done: {self.folder}")
        return self.folder

    def _out_of_patience(self) -> bool:
        """Whether `validation.patience` is used up."""
        patience = self.config.validation.patience
        return patience is not None and self.best[1] >= patience

    def _after_step(self, last: bool) -> None:
        """Validation, checkpoint and pictures, when they are due."""
        config = self.config
        validates = last or self.step % config.validation.every == 0
        if validates:  # before the checkpoint: a run that goes on from it has these figures already
            figures = self.validate()
            self._record(figures)
            self._keep_best(figures)
            last = last or self._out_of_patience()
        if self.log and (last or self.step % config.checkpoints.every == 0):
            self._save()
        if self.log and validates:
            self.log.plot()
        if self.log and (last if config.samples.every == 0 else self.step % config.samples.every == 0):
            self._draw_samples()

    def _keep_best(self, figures: dict[str, float]) -> None:
        """Keeps the weights of the highest value of `validation.best`, and counts validations since."""
        name = self.config.validation.best
        if name is None:
            return
        value, (best, _) = figures[name], self.best
        if best is not None and value <= best:
            self.best = best, self.best[1] + 1
            return
        self.best = value, 0
        if self.log:
            new = self.folder / "best.new"
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
            save_checkpoint(trained_weights(self.config, self.sd, self.model), new)
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            new.rename(self.folder / "best")

    @property
    def _samples_per_step(self) -> int:
        optim = self.config.optim
        return optim.batch_size * optim.gradient_accumulation_steps * self.accelerator.num_processes

    def _measure_features(self) -> None:
        """Gives the adapter mean and deviation of the features of some samples, the same in every process."""
        with self.accelerator.autocast(), torch.no_grad():
            if self.data is not None:
                batch = collate([self.data.get(index, 0) for index in range(min(MEASURED, len(self.data)))])
                features, _ = self.model.features(self._encode(batch), [TRUE_PAIR, EXPRESSION], with_full=False)
            else:
                ranked = [self.ranked.get(index, 0) for index in range(min(MEASURED // 8, len(self.ranked)))]
                features = self.model.ranked_features(encode_ranked(ranked, self.sd))
        self.model.adapter.measure_features(features)

    def _steps_of(self, epochs: float) -> int:
        """Updates that so many passes over the data are: over the samples, or the prompts where there are no others."""
        if self.data is not None:
            return math.ceil(epochs * len(self.data) / self._samples_per_step)
        batches = self._samples_per_step / self.config.optim.batch_size  # a step, of all processes
        return math.ceil(epochs * len(self.ranked) / (self.config.data.prompts_per_step * batches))

    def _batches(self) -> Iterator[tuple[Batch | None, list | None]]:
        """Pairs of the paper's samples and of prompts to rank; None stands for what the config has none of."""
        config, accelerator = self.config, self.accelerator
        options = {
            "accumulation": config.optim.gradient_accumulation_steps,
            "seed": config.seed,
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
        }
        samples = ranked = itertools.repeat(None)
        if self.data is not None:
            options_of_samples = {"batch_size": config.optim.batch_size, "num_workers": config.data.num_workers}
            samples = micro_batches(self.data, self.step, **options, **options_of_samples)
        if self.ranked is not None:
            in_order = {"batch_size": config.data.prompts_per_step, "collate_fn": lambda pairs: [p for p, _ in pairs]}
            ranked = micro_batches(self.ranked, self.step, **options, **in_order)
        return zip(samples, ranked, strict=False)

    def update(self, batches: Iterator[tuple[Batch | None, list | None]]) -> dict[str, float]:
        """One update of the weights; returns the step's mean losses, and `total`."""
        config, accelerator, optim = self.config, self.accelerator, self.config.optim
        parts = [next(batches) for _ in range(optim.gradient_accumulation_steps)]
        # boxes of all ranks and micro-batches, so that averaging gradients divides sums by their true number
        num_boxes = sum(part.num_boxes for part, _ in parts if part)
        boxes = torch.tensor([float(num_boxes)], device=accelerator.device)
        num_boxes = accelerator.gather(boxes).sum().item() / (len(parts) * accelerator.num_processes)
        stretch = schedule_stretch(optim, accelerator.num_processes)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.lr * learning_rate_factor(
                self.step,
                steps=self.steps * stretch,
                warmup_steps=optim.warmup_steps * stretch,
                schedule=optim.schedule,
            )
        totals: dict[str, float] = {}
        self.wrapped.train()
        for k, (part, ranked) in enumerate(parts):
            inputs = self._encode(part) | {"num_boxes": num_boxes or 1.0} if part else {}
            inputs |= {"ranked": encode_ranked(ranked, self.sd)} if ranked else {}
            inputs["left_out"] = () if self.step % config.loss.itm_every == 0 else ("itm",)
            torch.manual_seed(hash((config.seed, self.step, k, accelerator.process_index)) % 2**63)  # dropout
            last = k == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                losses = self.wrapped(inputs)
                total = config.loss.weights.total(losses)
                if not self._finite_everywhere(total):
                    return self._non_finite("a loss", losses, part, ranked)
                accelerator.backward(total / len(parts))
            for name, value in (losses | {"total": total}).items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(parts)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm)
        if accelerator.scaler is None and not math.isfinite(norm):  # a scaler leaves such steps out by itself
            return self._non_finite("the gradient", losses, part, ranked)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._mean_over_processes(totals) | {"grad_norm": float(norm)}

    def _finite_everywhere(self, total: torch.Tensor) -> bool:
        """All processes agree, so that none waits for another's gradients."""
        finite = torch.isfinite(total.detach()).reshape(1).float()
        return bool(self.accelerator.gather(finite).min().item())

    def _non_finite(self, what: str, losses: dict, batch: Batch | None, ranked: list | None) -> dict[str, float]:
        """Stops, or skips the step, naming losses and samples of the processes where they are not finite."""
        ids = [*(batch.ids if batch else ()), *(prompt.text for prompt in ranked or ())]
        found = gather_object([({name: value.item() for name, value in losses.items()}, ids)])
        bad = [(values, ids) for values, ids in found if not all(map(math.isfinite, values.values()))] or found
        where = "; ".join(f"{values}, samples {ids}" for values, ids in bad)
        if self.config.on_nan == "raise":
            raise FloatingPointError(
                f"step {self.step}: {what} is not finite: {where}. Lower optim.lr, train in float32 "
                "(optim.mixed_precision=no), or pass on_nan=skip"
            )
        self.optimizer.zero_grad()
        self.skipped += 1
        self._say(f"step {self.step} is skipped: {what} is not finite: {where}")
        return {"skipped_steps": float(self.skipped)}

    def _mean_over_processes(self, totals: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return totals
        values = torch.tensor([list(totals.values())], device=self.accelerator.device)
        return dict(zip(totals, self.accelerator.gather(values).mean(0).tolist(), strict=True))

    def _encode(self, batch: Batch) -> dict:
        batch = control_batch(self.config.control, batch, self.sd)
        inputs = encode_batch(
            batch,
            self.sd,
            self.rec_text,
            **encode_options(self.config, self.sd),
            denoise_negatives=self.config.loss.denoise_negatives and self.stage == "tune",
        )
        inputs = control_inputs(self.config.control, inputs, batch, self.sd, training=True)
        loss = self.config.loss
        if loss.weights.reward:
            sampling = recommended(self.config.model.name)
            until, seed = loss.reward_until, self.config.seed
            inputs["reward"] = reward_inputs(batch, self.sd, sampling, until=until, seed=seed)
        return inputs

    def validate(self) -> dict[str, float]:
        """ITM accuracy and REC precision on the val sets; see `dpt.training.validation`."""
        return validate(
            self.model,
            self.sd,
            self.rec_text,
            self.val_sets,
            self.val_ranked,
            self.config,
            self.accelerator,
        )

    def _record(self, figures: dict[str, float]) -> None:
        if self.log:
            self.log.record(self.step, figures)
        if self.config.tracker:
            self.accelerator.log(figures, step=self.step)

    def _save(self) -> None:
        config, scaler = self.config, self.accelerator.scaler
        state = {
            "stage": self.stage,
            "samples_per_step": self._samples_per_step,
            "skipped": self.skipped,
            "best": self.best,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_step(
            self.folder,
            self.step,
            trained_weights(config, self.sd, self.model),
            optimizer=self.optimizer,
            names=self.names,
            state=state,
            keep=config.checkpoints.keep,
        )

    def _draw_samples(self) -> None:
        if self.config.samples.every < 0:
            return
        try:
            with self.accelerator.autocast():
                draw_grid(self.sd, self.model, self.config, self._grid_path())
        except FloatingPointError as error:
            self._say(f"no pictures at step {self.step}: {error}")

    def _grid_path(self) -> Path:
        return self.folder / f"samples/step_{self.step:07d}.png"
