"""The one training loop of both stages: probe (the adapter on a frozen U-Net) and tune (adapter and LoRA).

A step's samples, noise, timesteps and dropout are functions of the seed and the step, so that a killed run goes on as
if it had never stopped, and several processes train as one does with the joint batch.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm import tqdm

from dpt.adapter import DiscriminativeAdapter
from dpt.checkpoint import DPTCheckpoint, load_checkpoint
from dpt.config import AdapterConfig, DPTConfig, TrainConfig, load_config, save_config
from dpt.data.collate import Batch, collate, encode_batch
from dpt.lora import add_lora, load_lora, lora_state
from dpt.metrics import bootstrap_interval, rec_hits
from dpt.model import DPT
from dpt.rec_text import load_rec_text_encoder
from dpt.runs import load_newest, open_run, restore_optimizer, save_step
from dpt.shapes.clip import embed_images, embed_texts, load_clip
from dpt.shapes.samples import ShapesSamples, mine_negatives
from dpt.shapes.scenes import render
from dpt.shapes.world import ShapesWorld
from dpt.stable_diffusion import CKPT_FOLDER, StableDiffusion, load_stable_diffusion
from dpt.unet_features import block_channels, parse_feature

STAGES = ("probe", "tune")
VALIDATION_TIMESTEP = 500


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """What the learning rate is multiplied by: linear warm-up, then constant, linear or cosine to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def step_indices(step: int, *, count: int, num_samples: int, seed: int) -> list[tuple[int, int]]:
    """The (sample, epoch) pairs of one update: each epoch is a permutation of its own, read on and on."""
    pairs = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, num_samples)
        pairs.append((int(_permutation(num_samples, seed, epoch)[offset]), epoch))
    return pairs


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


def make_adapter(config: TrainConfig, sd: StableDiffusion, rec_text_dim: int) -> DiscriminativeAdapter:
    """A new adapter of the configured size for the model."""
    blocks = parse_feature(config.model.feature, sd.unet.config)
    return DiscriminativeAdapter(
        AdapterConfig(
            in_channels=[block_channels(block, sd.unet.config) for block in blocks],
            fuse=config.model.feature == "all",
            text_dim=sd.text_encoder.config.hidden_size,
            rec_text_dim=rec_text_dim,
            **vars(config.adapter),
        )
    )


class Trainer:
    """A run of one stage; `train` goes through it."""

    def __init__(self, config: TrainConfig, stage: str):
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; it must be {' or '.join(STAGES)}")
        self.config, self.stage = config, stage
        optim = config.optim
        # with a loss off, the parameters that only it reaches have no gradient
        some_off = not all(vars(config.loss.weights).values())
        ddp = DistributedDataParallelKwargs(find_unused_parameters=some_off)
        self.accelerator = Accelerator(mixed_precision=optim.mixed_precision, kwargs_handlers=[ddp])
        self.folder = Path(config.output_folder) / config.run_name
        if self.accelerator.is_main_process:
            open_run(self.folder, resume=config.resume)
        self.accelerator.wait_for_everyone()
        set_seed(config.seed)
        self.sd = load_stable_diffusion(
            config.model.name,
            revision=config.model.revision,
            local_files_only=config.model.local_files_only,
            device=self.accelerator.device,
        )
        self.rec_text = load_rec_text_encoder(
            config.model.rec_text_encoder,
            self.sd,
            with_model=bool(config.loss.weights.contrastive_align),
            local_files_only=config.model.local_files_only,
        )
        self.data = self._load_data("train", config.data.num_samples)
        newest = load_newest(self.folder) if config.resume else None
        self.model = self._make_model(newest[0] if newest else None)
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.names = list(parameters)
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay
        )
        self.step, self.skipped = 0, 0
        if newest:
            restore_optimizer(self.optimizer, self.names, newest[1])
            self.step, self.skipped = newest[2]["step"], newest[2]["skipped"]
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.accelerator.is_main_process:
            save_config(config, self.folder / "config.yaml")
            self._drop_metrics_after(self.step)

    def _load_data(self, split: str, num_samples: int) -> ShapesSamples:
        data, mined = self.config.data, None
        if data.negatives == "mined":
            world, (clip, tokenizer) = ShapesWorld(split), load_clip(CKPT_FOLDER / "shapes/clip")
            scenes = [world.scene(i)[1] for i in range(num_samples)]
            texts = [world.caption(i) for i in range(num_samples)]
            with torch.no_grad():
                parts = range(0, num_samples, 256)
                images = torch.cat([embed_images(clip, [render(s) for s in scenes[i : i + 256]]) for i in parts])
                mined = mine_negatives(
                    images, torch.cat([embed_texts(clip, tokenizer, texts[i : i + 256]) for i in parts])
                )
        with self.accelerator.main_process_first():
            return ShapesSamples(
                self.sd,
                Path(data.cache_folder),
                num_samples=num_samples,
                split=split,
                negatives=data.negatives,
                mined=mined,
            )

    @cached_property
    def _val_data(self) -> ShapesSamples:
        return self._load_data("val", self.config.num_val_samples)

    def _make_model(self, newest: DPTCheckpoint | None) -> DPT:
        """The trained parts from the newest checkpoint, from `init_from`, or new."""
        config, sd = self.config, self.sd
        width = (self.rec_text.model or sd.text_encoder).config.hidden_size
        start = newest or (load_checkpoint(config.init_from) if config.init_from else None)
        adapter = make_adapter(config, sd, width)
        if start:
            if start.adapter.config != adapter.config:
                raise ValueError(
                    f"{start.source}: its adapter is {start.adapter.config}; the config asks for {adapter.config}"
                )
            adapter = start.adapter
        if self.stage == "tune":
            alpha = config.lora.alpha or config.lora.rank
            if start and start.lora:
                load_lora(sd.unet, start.lora, alpha=start.config.lora_alpha)
                for name, parameter in sd.unet.named_parameters():
                    parameter.requires_grad_(".lora_" in name)
            else:
                add_lora(sd.unet, rank=config.lora.rank, alpha=alpha, blocks=tuple(config.lora.blocks))
            if config.model.gradient_checkpointing:
                sd.unet.enable_gradient_checkpointing()
        loss = config.loss
        return DPT(
            sd.unet,
            adapter.requires_grad_(True).to(sd.device),
            parse_feature(config.model.feature, sd.unet.config),
            sd.scheduler,
            train_unet=self.stage == "tune",
            weights=loss.weights,
            snr_gamma=loss.snr_gamma,
            rec_options={
                "eos_coef": loss.eos_coef,
                "temperature": loss.temperature,
                "matcher_costs": {n: getattr(loss, n) for n in ("cost_class", "cost_bbox", "cost_giou")},
            },
        )

    def checkpoint(self) -> DPTCheckpoint:
        """What has been trained, as inference weights."""
        state = {name: value.detach().clone().cpu() for name, value in lora_state(self.sd.unet).items()}
        rank = self.config.lora.rank if state else 0
        config = DPTConfig(
            self.config.model.name,
            self.config.model.feature,
            -1,
            self.model.adapter.config,
            lora_rank=rank,
            lora_alpha=float(self.config.lora.alpha or rank) if state else 0.0,
        )
        return DPTCheckpoint(config, self.model.adapter, state)

    def train(self) -> Path:
        """Trains to the last step and returns the run folder.

        Raises:
            FloatingPointError: a non-finite loss, unless it is skipped.
        """
        optim, main = self.config.optim, self.accelerator.is_main_process
        bar = tqdm(total=optim.steps, initial=self.step, desc=self.stage, disable=not main, mininterval=1)
        began, done = time.perf_counter(), 0
        while self.step < optim.steps:
            losses = self.update()
            self.step, done = self.step + 1, done + 1
            if self.step % self.config.log_every == 0 or self.step == optim.steps:
                rate = done * self._samples_per_step / (time.perf_counter() - began)
                self._log(losses | {"lr": self.optimizer.param_groups[0]["lr"], "samples_per_second": rate})
                bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()})
            bar.update()
            if self.step % self.config.validate_every == 0 or self.step == optim.steps:
                self._log(self.validate())
            if main and (self.step % self.config.checkpoints.every == 0 or self.step == optim.steps):
                state = {"skipped": self.skipped}
                keep = self.config.checkpoints.keep
                save_step(
                    self.folder,
                    self.step,
                    self.checkpoint(),
                    optimizer=self.optimizer,
                    names=self.names,
                    state=state,
                    keep=keep,
                )
        bar.close()
        self.accelerator.wait_for_everyone()
        return self.folder

    @property
    def _samples_per_step(self) -> int:
        optim = self.config.optim
        return optim.batch_size * optim.gradient_accumulation_steps * self.accelerator.num_processes

    def update(self) -> dict[str, float]:
        """One update of the weights; returns the step's mean losses, and `total`."""
        config, accelerator = self.config, self.accelerator
        optim = config.optim
        pairs = step_indices(self.step, count=self._samples_per_step, num_samples=len(self.data), seed=config.seed)
        micro = [pairs[k : k + optim.batch_size] for k in range(0, len(pairs), optim.batch_size)]
        mine = micro[accelerator.process_index :: accelerator.num_processes]
        batches = [self._batch(part) for part in mine]
        # boxes of all ranks and micro-batches, so that averaging gradients divides sums by their true number
        boxes = torch.tensor([float(sum(b.num_boxes for b in batches))], device=accelerator.device)
        num_boxes = max(1.0, accelerator.gather(boxes).sum().item()) / len(micro)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.lr * learning_rate_factor(
                self.step, steps=optim.steps, warmup_steps=optim.warmup_steps, schedule=optim.schedule
            )
        totals: dict[str, float] = {}
        for k, batch in enumerate(batches):
            inputs = self._encode(batch) | {"num_boxes": num_boxes}
            torch.manual_seed(hash((config.seed, self.step, k, accelerator.process_index)) % 2**63)  # dropout
            self.wrapped.train()
            last = k == len(batches) - 1
            with accelerator.autocast():
                losses = self.wrapped(inputs)
            total = config.loss.weights.total(losses)
            if not math.isfinite(total.item()):
                return self._non_finite(losses, batch)
            if last or accelerator.num_processes == 1:
                accelerator.backward(total / len(batches))
            else:
                with self.wrapped.no_sync():
                    accelerator.backward(total / len(batches))
            for name, value in (losses | {"total": total}).items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(batches)
        accelerator.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return totals

    def _non_finite(self, losses: dict, batch: Batch) -> dict[str, float]:
        values = {name: value.item() for name, value in losses.items()}
        if self.config.on_nan == "raise":
            raise FloatingPointError(
                f"step {self.step}: a loss is not finite: {values}; samples {batch.ids}. Lower optim.lr, train in "
                "float32 (optim.mixed_precision=no), or pass on_nan=skip"
            )
        self.optimizer.zero_grad()
        self.skipped += 1
        return {"skipped_steps": float(self.skipped)}

    def _batch(self, pairs: list[tuple[int, int]]) -> Batch:
        return collate([self.data.get(index, epoch) for index, epoch in pairs], [epoch for _, epoch in pairs])

    def _encode(self, batch: Batch) -> dict:
        noise, last = self.config.noise, self.config.noise.last_timestep
        final = self.sd.scheduler.config.num_train_timesteps - 1 if last is None else last
        return encode_batch(
            batch,
            self.sd,
            self.rec_text,
            seed=self.config.seed,
            timesteps=(noise.first_timestep, final),
            noise_offset=noise.offset,
            normalize_positive_map=self.config.loss.normalize_positive_map,
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """ITM accuracy on texts and images and REC precision at t = 500; what is compared shares noise and timestep."""
        data = self._val_data
        self.model.eval()
        texts, images, hits = [], [], []
        for start in range(0, len(data), self.config.optim.batch_size):
            samples = [data.get(i, 0) for i in range(start, min(start + self.config.optim.batch_size, len(data)))]
            inputs = encode_batch(
                collate(samples),
                self.sd,
                self.rec_text,
                seed=0,
                timesteps=(VALIDATION_TIMESTEP, VALIDATION_TIMESTEP),
            )
            scores, outputs = self.model.evaluate(inputs)
            texts += (scores[:, 0] > scores[:, 1]).tolist()
            images += (scores[:, 0] > scores[:, 2]).tolist()
            boxes = torch.stack([sample.boxes[0] for sample in samples])
            hits.append(rec_hits(outputs["pred_logits"].cpu(), outputs["pred_boxes"].cpu(), boxes))
        figures = {"itm_text": bootstrap_interval(texts), "itm_image": bootstrap_interval(images)}
        figures |= {
            f"rec_precision_at_{k}": bootstrap_interval(column)
            for k, column in zip((1, 5, 10), torch.cat(hits).float().numpy().T, strict=True)
        }
        named = {}
        for name, (mean, low, high) in figures.items():
            named |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        return named

    def _log(self, record: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step} | record) + "\n")

    def _drop_metrics_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))


def run_stage(stage: str, argv: list[str] | None, description: str) -> int:
    """A training script: config file, overrides, exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file: what differs from the defaults of `dpt.config.TrainConfig`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what it would train")
    args = parser.parse_args(argv)
    try:
        config = load_config(TrainConfig, args.config, args.overrides)
        if args.dry_run:
            optim = config.optim
            print(yaml.safe_dump(asdict(config), sort_keys=False))
            joint = optim.batch_size * optim.gradient_accumulation_steps
            print(f"{stage}: {optim.steps} steps of {joint} samples a device")
            return 0
        folder = Trainer(config, stage).train()
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "error: out of memory: lower optim.batch_size (and raise optim.gradient_accumulation_steps), or set "
            "model.gradient_checkpointing=true or optim.mixed_precision=bf16",
            file=sys.stderr,
        )
        return 2
    print(f"done: {folder}")
    return 0
