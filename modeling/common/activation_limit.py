"""How many bytes of activations one forward pass may use, so that larger batches are computed in groups."""

import os
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def activation_limit(device: torch.device) -> float:
    """Bytes of activations of one forward pass on a device.

    On the CPU half of the last cache level: activations of more rows are written to memory and read again, so that
    a batch is slower than its parts (docs/performance.md). On CUDA half of the free memory. Elsewhere, and where the
    cache is unknown, there is no limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    return last_cache_bytes() / 2 if device.type == "cpu" else float("inf")


def last_cache_bytes() -> float:
    """Size of the last level of the CPU's caches; infinite if the system does not say."""
    sizes = [_bytes(file) for file in _CACHES.glob("index*/size")]
    if not sizes and hasattr(os, "sysconf") and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        sizes = [os.sysconf("SC_LEVEL3_CACHE_SIZE")]
    return max(sizes, default=0) or float("inf")


def _bytes(file: Path) -> int:
    """The bytes of a size such as "32768K"; 0 if it cannot be read."""
    try:
        text = file.read_text().strip()
        return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)
    except (OSError, ValueError, IndexError):
        return 0
