"""Inference weights as our folder: `adapter.safetensors`, `config.yaml`, `lora/pytorch_lora_weights.safetensors`.

Any diffusers user loads the last with `pipe.load_lora_weights(FOLDER + "/lora")`. The released checkpoint is read too
(`dpt.checkpoint.released`).
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from safetensors.torch import save_file

from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.architecture import PROJECTIONS
from dpt.backbones.blocks import block_channels, parse_feature
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import MODELS, check_made_for, checkpoints
from dpt.checkpoint.released import RELEASED_FILES, infer_adapter_config, read_released
from dpt.config import AdapterConfig, DPTConfig, load_config, save_config
from dpt.hub import check_there, fetch_weights, is_hub_id
from dpt.lora import load_lora, lora_metadata, remove_lora
from dpt.weights import read_tensors

ADAPTER_FILE, CONFIG_FILE, LORA_FILE = "adapter.safetensors", "config.yaml", "pytorch_lora_weights.safetensors"


class DPTCheckpoint(ModelHubMixin, library_name="dpt", license="apache-2.0"):
    """An adapter, a LoRA for the denoiser (perhaps empty), and their config.

    `save_pretrained`, `from_pretrained` and `push_to_hub` keep the folder's file names.
    """

    def __init__(
        self,
        config: DPTConfig,
        adapter: DiscriminativeAdapter,
        lora: dict[str, torch.Tensor],
        source: str = "",
        released: bool = False,
    ):
        self.config, self.adapter, self.lora, self.source = config, adapter, lora, source
        self.released = released

    def attach(self, sd: StableDiffusion, *, controls: Iterable[str] = ("none",)) -> Scorer:
        """Puts the LoRA on the model's denoiser and the adapter on its device, both frozen.

        Args:
            controls: which weights are taken, of `dpt.config.CONTROLS`; those of a control are for measuring alone.

        Raises:
            ValueError: made for another model, text width or block layout, or a released LoRA that leaves out some of
                the model's attentions.
        """
        config = self.config.adapter
        try:
            blocks = parse_feature(self.config.feature, sd.denoiser.config)
        except ValueError as error:
            check_made_for(self.config, sd.name, self.source)
            raise ValueError(f"{self.source}: {error}") from error
        found, wanted = [block_channels(block, sd.denoiser.config) for block in blocks], config.in_channels
        if found != wanted and (config.fuse or sum(found) != sum(wanted)):
            raise ValueError(
                f"{self.source}: the adapter reads {wanted} channels at {self.config.feature}; "
                f"{sd.name} has {found} there"
            )
        width = sd.pooled_width
        if config.text_dim != width:
            raise ValueError(
                f"{self.source}: the adapter compares with texts of width {config.text_dim}; {sd.name} has {width}"
            )
        if self.config.control not in controls:
            raise ValueError(f"{self.source} is a control ({self.config.control}), which is for measuring alone")
        check_made_for(self.config, sd.name, self.source)
        self.check_t5(sd)
        if self.lora and self.released:
            reached = {key.rsplit(".to_", 1)[0] for key in self.lora}
            left = [n for n, _ in sd.denoiser.named_modules() if n.endswith((".attn1", ".attn2")) and n not in reached]
            if left:
                raise ValueError(f"{self.source}: LoRA of {len(left)} attentions is missing, such as {left[0]}")
        if self.lora:
            load_lora(sd.denoiser, self.lora, alpha=self.config.lora_alpha)
        else:
            remove_lora(sd.denoiser)
        self.adapter.to(sd.device).eval().requires_grad_(False)
        return Scorer(self.adapter, blocks, self.config.itm_layer)

    def check_t5(self, sd: StableDiffusion) -> None:
        """Raises ValueError where the model has a T5 and the weights were made without, or the other way round."""
        if self.config.t5 not in (None, sd.has_t5):
            remedy = "give the model its T5 back" if self.config.t5 else "leave T5 out too (no_t5)"
            raise ValueError(f"{self.source} was made {'with' if self.config.t5 else 'without'} T5: {remedy}")

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """A model card: the weights in words, their metrics and licence."""
        figures = "".join(f"| {name} | {value:g} |\n" for name, value in self.config.metrics.items())
        metrics = f"\n| metric | value |\n|---|---|\n{figures}" if figures else "\nNo metrics were recorded.\n"
        known = MODELS.get(self.config.base_model)
        hub_id = known.source if known else None
        data = ModelCardData(library_name="dpt", license="apache-2.0", base_model=hub_id, tags=["dpt"])
        what = "Adapter and LoRA" if self.lora else "Adapter"
        alone = ", the LoRA alone with `pipe.load_lora_weights`" if self.lora else ""
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# DPT weights\n\n{what} for {self.config.base_model}, probed at "
            f"{self.config.feature}. Load with `dpt.Artist.load`{alone}.\n{metrics}\n"
            "Licence: Apache-2.0.\n"
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save_file(self.adapter.state_dict(), save_directory / ADAPTER_FILE)
        save_config(self.config, save_directory / CONFIG_FILE)
        if self.lora:
            metadata = lora_metadata(self.lora, self.config.lora_alpha)
            if next(iter(self.lora)).startswith(("transformer_blocks.", "single_transformer_blocks.")):
                layers = {"transformer_lora_layers": self.lora, "transformer_lora_adapter_metadata": metadata}
                StableDiffusion3Pipeline.save_lora_weights(save_directory / "lora", **layers)
            else:
                layers = {"unet_lora_layers": self.lora, "unet_lora_adapter_metadata": metadata}
                StableDiffusionPipeline.save_lora_weights(save_directory / "lora", **layers)

    @classmethod
    def _from_pretrained(cls, *, model_id, **kwargs) -> "DPTCheckpoint":
        if Path(model_id).exists():
            return load_checkpoint(model_id)
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        return load_checkpoint(snapshot_download(model_id, **{n: kwargs[n] for n in names if n in kwargs}))


def leaves_t5_out(checkpoint: DPTCheckpoint | None) -> bool:
    """Whether weights were made without the T5 that their base model has, and draw without it."""
    return checkpoint is not None and checkpoint.config.t5 is False


def load_checkpoint(path: str | Path, *, local_files_only: bool = False, **released_settings) -> DPTCheckpoint:
    """Reads our folder, a run's (its newest checkpoint), the released file or its folder, a training folder of the
    reference, or any of them from the hub.

    Args:
        path: a path, or a hub id such as leigangqu/DPT-T2I.
        local_files_only: of a hub id, take what is in the cache and never ask.
        released_settings: for the reference's files, what shapes do not tell: `feature`, `base_model`, and the
            arguments of `infer_adapter_config`.

    Raises:
        ValueError: nothing readable there, or tensors that are missing, left over or of another shape; each is named.
    """
    path = Path(path)
    check_there(path)
    if is_hub_id(path):
        path = fetch_weights(path, local_files_only=local_files_only)
    if (path / "checkpoints").is_dir():
        steps = checkpoints(path)
        if not steps:
            raise ValueError(f"run {path} has no checkpoint yet")
        path = steps[0]
    if (path / CONFIG_FILE).exists():
        return _load_own(path)
    files = [path / name for name in RELEASED_FILES] if path.is_dir() else [path]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise ValueError(f"{path} holds neither {CONFIG_FILE} and {ADAPTER_FILE} nor {' or '.join(RELEASED_FILES)}")
    return _load_released(file, **released_settings)


def _load_own(folder: Path) -> DPTCheckpoint:
    config_path = folder / CONFIG_FILE
    try:
        config = load_config(DPTConfig, config_path)
    except ValueError as error:
        raise ValueError(str(error) if str(config_path) in str(error) else f"{config_path}: {error}") from error
    state = read_tensors(folder / ADAPTER_FILE)
    _check_config(folder, config, state)
    adapter = _fill_adapter(folder / ADAPTER_FILE, config.adapter, state)
    lora, lora_path = {}, folder / "lora" / LORA_FILE
    if config.lora_rank:
        lora = {re.sub(r"^(unet|transformer)\.", "", key): value for key, value in read_tensors(lora_path).items()}
        try:
            rank = _check_lora(lora)
        except ValueError as error:
            raise ValueError(f"{lora_path}: {error}") from error
        if rank != config.lora_rank:
            raise ValueError(f"{config_path}: lora_rank is {config.lora_rank}; {lora_path} is of rank {rank}")
    return DPTCheckpoint(config, adapter, lora, source=str(folder))


def _check_config(folder: Path, config: DPTConfig, state: dict[str, torch.Tensor]) -> None:
    """Compares a config with the tensors beside it, before an adapter is built from its numbers.

    Raises:
        ValueError: a field that the tensors contradict, or a layer that the adapter does not have.
    """
    stated, layer = config.adapter, config.itm_layer
    try:
        found = infer_adapter_config(state, num_queries_itm=stated.num_queries_itm, nheads=stated.nheads)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_FILE}, by {CONFIG_FILE}: {error}") from error
    names = ["fuse", "in_channels", "hidden_dim", "enc_layers", "dec_layers", "dim_feedforward", "pre_norm"]
    names += [
        "position_embedding",
        "normalize_features",
        "num_queries_rec",
        "text_dim",
        "rec_text_dim",
        "contrastive_dim",
    ]
    for name in names + ["fusion_dim"] * found.fuse:
        says, has = getattr(stated, name), getattr(found, name)
        if name == "in_channels" and not found.fuse:  # maps side by side: the tensors tell their sum alone
            fits = min(says, default=0) > 0 and sum(says) == sum(has)
        else:
            fits = says == has
        if not fits:
            raise ValueError(f"{folder / CONFIG_FILE}: adapter.{name} is {says}; {ADAPTER_FILE} is of {has}")
    if not -stated.dec_layers <= layer < stated.dec_layers:
        raise ValueError(f"{folder / CONFIG_FILE}: itm_layer is {layer}; the adapter has {stated.dec_layers} of them")


def _load_released(file: Path, **settings) -> DPTCheckpoint:
    config, adapter_state, lora = read_released(file, **settings)
    try:
        rank = _check_lora(lora)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config = replace(config, lora_rank=rank, lora_alpha=float(rank))
    adapter = _fill_adapter(file, config.adapter, adapter_state)
    return DPTCheckpoint(config, adapter, lora, source=str(file), released=True)


def _check_lora(lora: dict[str, torch.Tensor]) -> int:
    """The rank of LoRA tensors; ValueError names one that is misshapen or missing beside the others."""
    ranks = Counter()
    for key, value in lora.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"tensor {key} belongs to no LoRA")
        if value.ndim != 2:
            raise ValueError(f"LoRA tensor {key} has {value.ndim} dimensions instead of 2")
        ranks[value.shape[0 if ".lora_A." in key else 1]] += 1
    if len(ranks) > 1:
        rank = ranks.most_common(1)[0][0]
        other = next(k for k, v in lora.items() if v.shape[0 if ".lora_A." in k else 1] != rank)
        raise ValueError(f"LoRA tensor {other} is {tuple(lora[other].shape)}; the others are of rank {rank}")
    parts = [f"{name}.lora_{half}.weight" for name in PROJECTIONS for half in "AB"]
    for attention in dict.fromkeys(re.split(r"\.(?:to|add)_", key)[0] for key in lora):
        own = parts[: 6 if attention.startswith("single_") else 8]  # FLUX's single blocks have no to_out
        missing = [part for part in own if f"{attention}.{part}" not in lora]
        if missing:
            raise ValueError(f"incomplete LoRA: {attention}.{missing[0]} is missing")
    return next(iter(ranks), 0)


def _fill_adapter(path: Path, config: AdapterConfig, state: dict[str, torch.Tensor]) -> DiscriminativeAdapter:
    with torch.device("meta"):
        adapter = DiscriminativeAdapter(config)
    expected = adapter.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is left over" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    problems += [f"{name} is {value.dtype}" for name, value in state.items() if not value.is_floating_point()]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems[:5])}" + (f"; {len(problems)} in all" if problems[5:] else ""))
    adapter.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return adapter.eval()


def save_checkpoint(
    checkpoint: DPTCheckpoint, folder: str | Path, *, also: Callable[[Path], None] | None = None
) -> None:
    """Writes our folder under a temporary name, then renames it; one already there is refused.

    Args:
        also: writes more into the temporary folder.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        checkpoint.save_pretrained(temporary)
        if also is not None:
            also(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(checkpoint: DPTCheckpoint) -> str:
    """The contents of a checkpoint, a line each."""
    config, adapter = checkpoint.config, checkpoint.config.adapter
    size = sum(value.numel() for value in checkpoint.adapter.state_dict().values())
    lines = [
        f"{checkpoint.source}: for {config.base_model}, probed at {config.feature} ({adapter.in_channels} channels)",
        f"adapter: {size:,} parameters, width {adapter.hidden_dim}, "
        f"{adapter.enc_layers} + {adapter.dec_layers} layers, "
        f"{adapter.num_queries_itm} ITM + {adapter.num_queries_rec} REC queries, text width {adapter.text_dim}",
        f"logit_scale: exp({checkpoint.adapter.itm_head.logit_scale.item():.4f})",
    ]
    if checkpoint.lora:
        total = sum(value.numel() for value in checkpoint.lora.values())
        blocks = Counter(
            ".".join(key.split(".")[:2]).replace("mid_block.attentions", "mid_block") for key in checkpoint.lora
        )
        lines.append(f"LoRA: {total:,} parameters, rank {config.lora_rank}, alpha {config.lora_alpha:g}")
        lines += [f"  {block}: {count // 2} projections" for block, count in sorted(blocks.items())]
    else:
        lines.append("LoRA: none")
    return "\n".join(lines)
