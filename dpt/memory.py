"""Memory: what a step of training will take, and what a process or a device peaked at."""

import ctypes
import sys
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dpt.adapter import DiscriminativeAdapter
from dpt.config import AdapterConfig
from dpt.lora import add_lora
from dpt.unet_features import Conditioning, unet_features


def reset_peak(device: torch.device | str = "cpu") -> None:
    """Forgets the peak so far (on a CPU: Linux only)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        if malloc_trim := _libc("malloc_trim"):
            malloc_trim(0)  # what was freed and kept is none of what follows
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device | str = "cpu") -> float:
    """Peak memory in MB: allocated on a CUDA device, else resident in this process (Linux; nan elsewhere)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def keep_freed_memory() -> None:
    """Lets a process that computes on a CPU keep what tensors free for those to come; without glibc nothing.

    By default every large tensor's pages are returned to the system and cleared anew.
    """
    mallopt = _libc("mallopt")
    if mallopt and not torch.accelerator.is_available():
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 2**28)


def _libc(name: str):
    """The C library's function of that name; None where it has none, and off Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once while it is active; meant for tensors without data (meta)."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._track, out)
        return out

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _FusedAttention:
    """Attention that never holds its matrix of scores, as the fused kernels of a GPU do."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        heads = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)[0]
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class _FusedAdapterAttention(TorchFunctionMode):
    """The same for `nn.MultiheadAttention`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        inputs, num_heads, weight, bias, out_weight, out_bias = args[:3], args[4], args[5], args[6], args[11], args[12]
        projected = (F.linear(*x) for x in zip(inputs, weight.chunk(3), bias.chunk(3), strict=True))
        heads = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in projected)  # from (L, B, E)
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)[0]
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def _cast_like_autocast(module: nn.Module, dtype: torch.dtype) -> None:
    """Norms give float32, as under autocast on a GPU; what multiplies matrices takes `dtype`."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_hook(lambda _, inputs, output: output.float())
        elif isinstance(part, nn.Linear | nn.Conv2d):
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def estimate_step(
    unet_config: dict,
    adapter_config: AdapterConfig,
    blocks: tuple[str, ...],
    *,
    batch_size: int,
    dtype: torch.dtype,
    early_passes: int,
    full_passes: int,
    lora_rank: int = 0,
    lora_blocks: tuple[str, ...] = (),
    gradient_checkpointing: bool = False,
    text_length: int = 77,
) -> dict[str, int]:
    """Parameters, and bytes that a step's activations and gradients take at their peak, from a run without data.

    Args:
        unet_config: a diffusers U-Net's.
        early_passes: passes a sample that stop at the probed block.
        full_passes: how many more go to the end, of which the adapter reads one.
        lora_rank: above 0 the U-Net is trained, at 0 only the adapter.
    """
    default = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            unet = UNet2DConditionModel.from_config(unet_config).requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
        frozen = sum(p.numel() for p in unet.parameters())
        adapter, peak = DiscriminativeAdapter(adapter_config), PeakBytes()
        unet.set_attn_processor(_FusedAttention())
        _cast_like_autocast(unet, dtype)
        if lora_rank:
            add_lora(unet, rank=lora_rank, alpha=lora_rank, blocks=lora_blocks)
        if gradient_checkpointing:
            unet.train().enable_gradient_checkpointing()
        size, width = unet.config.sample_size, unet.config.cross_attention_dim

        def features(count, **options):
            latents = torch.empty(count, unet.config.in_channels, size, size, dtype=dtype)
            context = torch.empty(count, text_length, width, dtype=dtype)
            return unet_features(
                unet, blocks, latents, torch.empty(count, dtype=torch.long), Conditioning(context), **options
            )

        with peak:
            maps, losses = [], []
            with torch.set_grad_enabled(bool(lora_rank)):
                if early_passes:
                    maps.append(features(early_passes * batch_size)[0])
                if full_passes:
                    early, noise_pred = features(batch_size, with_noise_pred=True)
                    maps.append(early)
                    losses.append(noise_pred.float().sum())
                if full_passes > 1:
                    _, noise_pred = features((full_passes - 1) * batch_size, with_noise_pred=True)
                    losses.append(noise_pred.float().sum())
            joined = [torch.cat(parts).float() for parts in zip(*maps, strict=True)]
            with _FusedAdapterAttention():
                hs = adapter(joined, torch.empty(len(joined[0]), dtype=torch.long))
            torch.stack([*losses, hs.sum()]).sum().backward()
    trained = [p.numel() for p in (*unet.parameters(), *adapter.parameters()) if p.requires_grad]
    adapter_count = sum(p.numel() for p in adapter.parameters())
    return {
        "unet_parameters": frozen,
        "adapter_parameters": adapter_count,
        "lora_parameters": sum(trained) - adapter_count,
        "step_bytes": peak.peak,
    }
