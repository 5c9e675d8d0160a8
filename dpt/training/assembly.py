"""The parts of a training run, from a config and a start: the denoiser with its LoRA, and the adapter."""

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.backbones.blocks import is_transformer, parse_feature
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.backbones.unet import set_cpu_attention
from dpt.checkpoint.checkpoint import DPTCheckpoint
from dpt.config import DPTConfig
from dpt.lora import add_lora, check_lora, lora_state
from dpt.model import DPT
from dpt.rec_text import RecTextEncoder
from dpt.tasks import tasks_of
from dpt.training.settings import TrainConfig, adapter_config, check_start


def encode_options(config: TrainConfig, sd: StableDiffusion) -> dict:
    """The options of `encode_batch` in training."""
    noise, final = config.noise, sd.scheduler.config.num_train_timesteps - 1
    return {
        "seed": config.seed,
        "timesteps": (noise.first_timestep, final if noise.last_timestep is None else noise.last_timestep),
        "noise_offset": noise.offset,
        "tasks": tasks_of(config.adapter, config.loss),
        "posterior": config.data.latent_sample == "posterior",
    }


def make_model(
    config: TrainConfig, stage: str, sd: StableDiffusion, rec_text: RecTextEncoder, start: DPTCheckpoint | None
) -> DPT:
    """The module to train, its trainable parts from `start`, or new.

    Raises:
        ValueError: `start` holds another adapter than the config asks for; what differs is named.
    """
    wanted = adapter_config(
        config,
        sd.denoiser.config,
        text_dim=sd.pooled_width,
        rec_text_dim=rec_text.width,
    )
    adapter = DiscriminativeAdapter(wanted)
    if start:
        check_start(config, wanted, start.config, start.source)
        start.check_t5(sd)
        adapter.load_state_dict(start.adapter.state_dict())
    if stage == "probe" and start and start.lora:
        raise ValueError(
            f"{start.source} holds LoRA; a probe is of the model as it is: start from a probe, or leave init_from out"
        )
    if stage == "tune":
        _add_lora(config, sd, start)
        set_cpu_attention(sd.denoiser)
    return DPT(
        sd.denoiser,
        adapter.requires_grad_(not config.lora.only).to(sd.device),
        parse_feature(config.model.feature, sd.denoiser.config),
        sd.scheduler,
        train_denoiser=stage == "tune",
        loss=config.loss,
        itm_layer=start.config.itm_layer if start else -1,
    )


def _add_lora(config: TrainConfig, sd: StableDiffusion, start: DPTCheckpoint | None) -> None:
    lora = config.lora
    alpha = float(lora.rank if lora.alpha is None else lora.alpha)
    add_lora(sd.denoiser, rank=lora.rank, alpha=alpha, blocks=tuple(lora.blocks))
    if start and start.lora:
        found, fresh = (start.config.lora_rank, start.config.lora_alpha), lora_state(sd.denoiser)
        if found != (lora.rank, alpha):
            raise ValueError(
                f"{start.source} holds LoRA of rank and alpha {found}; lora.rank and lora.alpha are "
                f"{(lora.rank, alpha)}: set them to the same"
            )
        reached, wanted = (len({name.rsplit(".lora_", 1)[0] for name in state}) for state in (start.lora, fresh))
        if start.lora.keys() != fresh.keys():
            raise ValueError(f"{start.source} holds LoRA on {reached} projections; lora.blocks means {wanted}")
        check_lora(sd.denoiser, start.lora)
        for name, tensor in fresh.items():
            tensor.detach().copy_(start.lora[name])
    if config.model.gradient_checkpointing:
        sd.denoiser.enable_gradient_checkpointing()


def trained_weights(config: TrainConfig, sd: StableDiffusion, model: DPT) -> DPTCheckpoint:
    """The trained weights, as a checkpoint for inference."""
    state = {name: value.detach().clone().cpu() for name, value in lora_state(sd.denoiser).items()}
    lora = next(iter(sd.denoiser.peft_config.values())) if state else None
    about = DPTConfig(
        config.model.name,
        config.model.feature,
        model.itm_layer,
        model.adapter.config,
        control=config.control,
        t5=sd.has_t5 if is_transformer(sd.denoiser.config) else None,
        lora_rank=lora.r if lora else 0,
        lora_alpha=float(lora.lora_alpha) if lora else 0.0,
    )
    return DPTCheckpoint(about, model.adapter, state)
