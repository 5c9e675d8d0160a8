"""Peak memory of a process or a device, and how a process on a CPU keeps what it frees."""

import ctypes
import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device | str = "cpu") -> None:
    """Forgets the peak so far (on a CPU: Linux only)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        if malloc_trim := _libc("malloc_trim"):
            malloc_trim(0)  # what was freed and kept is none of what follows
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device | str = "cpu") -> float:
    """Peak memory in MB: allocated on a CUDA device, else resident in this process (what is now, on a Mac)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        import psutil  # comes with accelerate

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**20
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def keep_freed_memory() -> None:
    """Lets a process on a CPU keep freed memory for later tensors; does nothing without glibc.

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
