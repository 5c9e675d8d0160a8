"""What a training run would do, without doing it."""

from pathlib import Path

from dpt.assembly import DTYPES, adapter_config
from dpt.checkpoint import checkpoints, load_checkpoint
from dpt.config import TrainConfig, check_stage
from dpt.memory import estimate_step
from dpt.model import EARLY_PASSES
from dpt.stable_diffusion import architecture
from dpt.unet_features import parse_feature

ROBERTA_WIDTH, ROBERTA_BYTES = 768, 125_000_000 * 4
NUM_TRAIN_TIMESTEPS = 1000  # of all models known here


def report(config: TrainConfig, stage: str) -> str:
    """What a run would train, its batches, an estimate of its memory, and what it starts from.

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
    tune, optim, weights = stage == "tune", config.optim, config.loss.weights
    blocks = parse_feature(config.model.feature, unet_config)
    adapter = adapter_config(
        config,
        unet_config,
        text_dim=width,
        rec_text_dim=width if config.model.rec_text_encoder == "clip" else ROBERTA_WIDTH,
    )
    full = tune and bool(weights.denoise)
    passes = sum(bool(weights.rec if text is None else weights.itm) for _, text in EARLY_PASSES)
    dtype = DTYPES[optim.mixed_precision]
    estimate = estimate_step(
        unet_config,
        adapter,
        blocks,
        batch_size=optim.batch_size,
        dtype=dtype,
        early_passes=passes + bool(weights.itm and not full),
        full_passes=full * (3 if config.loss.denoise_negatives else 1),
        lora_rank=config.lora.rank if tune else 0,
        lora_blocks=tuple(config.lora.blocks),
        gradient_checkpointing=tune and config.model.gradient_checkpointing,
    )
    trained = estimate["adapter_parameters"] * (not config.lora.only) + estimate["lora_parameters"]
    frozen = (estimate["unet_parameters"] + other) * dtype.itemsize
    frozen += ROBERTA_BYTES * (config.model.rec_text_encoder != "clip" and bool(weights.contrastive_align))
    state = trained * 4 * 5  # float32 weights, gradients, DDP's copy of them and AdamW's two moments
    total = frozen + state + estimate["step_bytes"]
    joint = optim.batch_size * optim.gradient_accumulation_steps
    length = f"{optim.steps:,} steps" if optim.epochs is None else f"{optim.epochs} epochs"
    return "\n".join(
        [
            f"{stage}: {trained:,} parameters to train (adapter {estimate['adapter_parameters']:,}"
            f"{' as it is' if config.lora.only else ''}, LoRA {estimate['lora_parameters']:,})",
            f"batches: {optim.batch_size} samples x {optim.gradient_accumulation_steps} accumulated = {joint} a "
            f"process and step; {length}; 8 processes: {8 * joint} a step",
            f"memory a process, about: frozen weights {_gib(frozen)}, trained ones with gradients and moments "
            f"{_gib(state)}, a step's activations {_gib(estimate['step_bytes'])}: {_gib(total)} "
            "(text encoders' and autoencoder's activations, and the libraries' own, come on top)",
            f"starts from: {start}",
        ]
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
