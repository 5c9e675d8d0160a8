"""A training run described, not run. Imports torch, but neither diffusers nor transformers."""

from dataclasses import replace
from pathlib import Path

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.backbones.architecture import Architecture, architecture
from dpt.backbones.blocks import block_channels, block_side, parse_feature
from dpt.base_models import checkpoints, config_beside
from dpt.config import AdapterConfig
from dpt.device import WEIGHT_DTYPES
from dpt.tasks import tasks_of
from dpt.tasks.task import passes_of
from dpt.training.settings import TrainConfig, adapter_config, check_stage, check_start

ROBERTA_WIDTH, ROBERTA_PARAMETERS = 768, 125_000_000
NUM_TRAIN_TIMESTEPS = 1000  # of all models known here


def describe_run(config: TrainConfig, stage: str) -> str:
    """The parameters, batches, least memory and start of a run, as text.

    Loads no weights, but those of a released file in `init_from`.

    Raises:
        ValueError: a setting that the model cannot meet.
    """
    goes_on = config.resume and bool(checkpoints(Path(config.output_folder) / config.run_name))
    check_stage(config, stage, NUM_TRAIN_TIMESTEPS, goes_on=goes_on)
    model = architecture(config.model.name, no_t5=config.model.no_t5)
    blocks, optim = parse_feature(config.model.feature, model.config), config.optim
    rec_text_dim = model.pooled_width if config.model.rec_text_encoder == "clip" else ROBERTA_WIDTH
    wanted = adapter_config(config, model.config, text_dim=model.pooled_width, rec_text_dim=rec_text_dim)
    start = _start(config, wanted)
    # not on the meta device, whose random numbers need a second of imports
    adapter = sum(parameter.numel() for parameter in DiscriminativeAdapter(wanted).parameters())
    lora = _lora(config, model) if stage == "tune" else 0
    frozen = model.weights + model.other_weights
    if config.model.rec_text_encoder != "clip" and config.loss.weights.contrastive_align:
        frozen += ROBERTA_PARAMETERS
    trained = lora + adapter * (not config.lora.only)
    passes = passes_of(task for task in tasks_of(wanted) if task.is_weighted(config.loss.weights))
    joint = optim.batch_size * optim.gradient_accumulation_steps
    length = f"{optim.steps:,} steps" if optim.epochs is None else f"{optim.epochs} epochs"
    dtype = WEIGHT_DTYPES[optim.mixed_precision]
    cells = sum(block_channels(block, model.config) * block_side(block, model.config) ** 2 for block in blocks)
    kept = cells * optim.batch_size * len(passes)
    return "\n".join(
        [
            f"{stage}: {trained:,} parameters to train (adapter {adapter:,}"
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


def _start(config: TrainConfig, wanted: AdapterConfig) -> str:
    """The origin of the adapter, in words. Raises ValueError where it cannot be read, or differs from the wanted one.

    Args:
        wanted: the adapter's config; the width of REC's text encoder is not compared, as the encoder is not loaded.
    """
    if config.init_from in (None, "new"):
        return "untrained"
    weights = Path(config.init_from)
    folder = next(iter(checkpoints(weights)), weights)
    if (folder / "adapter.safetensors").is_file():
        found, source = config_beside(folder), str(folder)
    else:
        from dpt.checkpoint.checkpoint import load_checkpoint  # of a released file; imports diffusers

        start = load_checkpoint(config.init_from)
        found, source = start.config, start.source
    check_start(config, replace(wanted, rec_text_dim=found.adapter.rec_text_dim), found, source)
    return source


def _lora(config: TrainConfig, model: Architecture) -> int:
    """Parameters of the LoRA. Raises ValueError for blocks without attention, or that the model does not have."""
    blocks = config.lora.blocks or [*model.lora_widths]
    for block in blocks:
        parse_feature(block, model.config, "lora.blocks")
    widths = [model.lora_widths.get(block, 0) for block in blocks]
    if not any(widths):
        raise ValueError(f"lora.blocks is {blocks}; there is no attention in them: name others")
    return config.lora.rank * sum(widths)


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB"
