"""A training run described, not run."""

from pathlib import Path

import torch

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.backbones.loading import architecture
from dpt.backbones.transformer_features import tokens_a_side
from dpt.backbones.unet_features import LATENTS, block_channels, denoiser_class, is_transformer, parse_feature
from dpt.checkpoint.checkpoint import checkpoints, load_checkpoint
from dpt.lora import add_lora
from dpt.tasks import tasks_of
from dpt.tasks.task import passes_of
from dpt.training.assembly import WEIGHT_DTYPES, adapter_config
from dpt.training.settings import TrainConfig, check_stage

ROBERTA_WIDTH, ROBERTA_PARAMETERS = 768, 125_000_000
NUM_TRAIN_TIMESTEPS = 1000  # of all models known here


def describe_run(config: TrainConfig, stage: str) -> str:
    """The parameters, batches, least memory and start of a run, as text.

    Loads no weights but those of `init_from`.

    Raises:
        ValueError: a setting that the model cannot meet.
    """
    goes_on = config.resume and bool(checkpoints(Path(config.output_folder) / config.run_name))
    check_stage(config, stage, NUM_TRAIN_TIMESTEPS, goes_on=goes_on)
    start = "untrained"
    if config.init_from not in (None, "new"):
        start = load_checkpoint(config.init_from).source
    unet_config, width, other = architecture(config.model.name)
    blocks, optim = parse_feature(config.model.feature, unet_config), config.optim
    rec_text_dim = width if config.model.rec_text_encoder == "clip" else ROBERTA_WIDTH
    wanted = adapter_config(config, unet_config, text_dim=width, rec_text_dim=rec_text_dim)
    with torch.device("meta"):
        unet, adapter = denoiser_class(unet_config).from_config(unet_config), DiscriminativeAdapter(wanted)
        frozen = _count(unet) + other
        if stage == "tune":
            add_lora(unet.requires_grad_(False), rank=config.lora.rank, alpha=1.0, blocks=tuple(config.lora.blocks))
    lora = _count(unet) + other - frozen
    if config.model.rec_text_encoder != "clip" and config.loss.weights.contrastive_align:
        frozen += ROBERTA_PARAMETERS
    trained = lora + _count(adapter) * (not config.lora.only)
    passes = passes_of(task for task in tasks_of(wanted) if task.is_weighted(config.loss.weights))
    joint = optim.batch_size * optim.gradient_accumulation_steps
    length = f"{optim.steps:,} steps" if optim.epochs is None else f"{optim.epochs} epochs"
    dtype = WEIGHT_DTYPES[optim.mixed_precision]
    kept = sum(_cells(block, unet_config) for block in blocks) * optim.batch_size * len(passes)
    return "\n".join(
        [
            f"{stage}: {trained:,} parameters to train (adapter {_count(adapter):,}"
            f"{' as it is' if config.lora.only else ''}, LoRA {lora:,})",
            f"batches: {optim.batch_size} samples x {optim.gradient_accumulation_steps} accumulated = {joint} a "
            f"process and step; {length}; 8 processes: {8 * joint} a step",
            "memory a process, at least (activations come on top; `python -m dpt.benchmark training` measures them):",
            f"  frozen weights                 {_gib(frozen * dtype.itemsize)}  {frozen:,} in {dtype}",
            f"  trained weights and gradients  {_gib(trained * 4 * 2)}  {trained:,} in torch.float32",
            f"  AdamW's two moments            {_gib(trained * 4 * 2)}",
            f"  features that are read         {_gib(kept * 4)}  {optim.batch_size} samples x {len(passes)} passes",
            f"starts from: {start}",
        ]
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cells(block: str, unet_config) -> int:
    """Values of a block's feature map; a block's output is sampled down or up already, but for the last one's."""
    if is_transformer(unet_config):
        return block_channels(block, unet_config) * tokens_a_side(unet_config) ** 2
    last = len(unet_config.block_out_channels) - 1
    halvings = {LATENTS: 0, "mid": last}
    halvings |= {f"down{i}": min(i + 1, last) for i in range(last + 1)}
    halvings |= {f"up{i}": max(last - 1 - i, 0) for i in range(last + 1)}
    return block_channels(block, unet_config) * (unet_config.sample_size >> halvings[block]) ** 2


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB"
