"""Keeps the outputs of encoders and the keys and values of prompts for later calls.

Entries are keyed by a hash of the input and a fingerprint of the weights.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)
SAMPLES = 16  # number of values of every weight that are part of the fingerprint


class PrefillCache:
    """Keeps tensors by key, up to a number of bytes. The least recently used entries are dropped first.

    Args:
        max_bytes: largest number of bytes of all tensors together. They stay on the device that computed them.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.nbytes = max_bytes, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        used = f"{self.nbytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB"
        return f"PrefillCache({len(self)} entries, {used}, {self.hits} hits, {self.misses} misses)"

    def recall(self, key: bytes, compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """The tensors of `key`. Without an entry, `compute` is called and its tensors are kept if they fit.

        Do not modify the tensors in place.
        """
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        computed = compute()
        size = _nbytes(computed)
        if size > self.max_bytes:
            logger.warning(f"A result of {size} bytes is not kept: the prefill cache holds {self.max_bytes} bytes.")
            return computed
        while self.nbytes + size > self.max_bytes:
            self.nbytes -= _nbytes(self._entries.popitem(last=False)[1])
        self._entries[key] = computed
        self.nbytes += size
        return computed

    def clear(self) -> None:
        """Drop all entries; the counts of hits and misses stay."""
        self._entries.clear()
        self.nbytes = 0


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def digest(*parts) -> bytes:
    """Hash of numbers, texts, bytes, tensors, and lists of them; the boundaries between the parts count."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, (list, tuple)):
            part = digest(*part)
        elif isinstance(part, torch.Tensor):
            part = digest(str(part.dtype), tuple(part.shape), part.detach().cpu().contiguous().numpy().tobytes())
        elif not isinstance(part, bytes):
            part = repr(part).encode()
        state.update(len(part).to_bytes(8, "big") + part)
    return state.digest()


def fingerprint(device: torch.device, *models: torch.nn.Module) -> bytes:
    """Hash of a device and of the state of models.

    It covers names, dtypes, shapes, counts of in-place changes and some values of every tensor, the active adapters and
    their scales, the configuration, attributes such as the VAE's tiling, the attention backend, and autocast. Merging
    an adapter, loading weights or training changes it.
    """
    parts: list = [str(device)]
    if torch.is_autocast_enabled(device.type):
        parts.append(str(torch.get_autocast_dtype(device.type)))
    for model in models:
        config: Any = model.config
        switches = {k: v for k, v in vars(model).items() if isinstance(v, (bool, int, float, str))}
        parts += [repr(dict(config)), repr(switches)]
        samples: dict[torch.device, list[torch.Tensor]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                raise ValueError(
                    f"The prefill cache cannot tell whether {name} changes: its values are offloaded piece by piece. "
                    "Call disable_prefill_cache(), or use another way of offloading."
                )
            changes = 0 if tensor.is_inference() else tensor._version
            parts.append((name, str(tensor.dtype), tuple(tensor.shape), changes))
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):  # quantized classes have no plain values
                values = tensor.detach().flatten()
                values = values[:: max(1, len(values) // SAMPLES)].double()
                samples.setdefault(tensor.device, []).append(values)
        parts += [torch.cat(values) for values in samples.values()]
        for name, module in model.named_modules():
            parts.append(str(getattr(getattr(module, "processor", None), "_attention_backend", None)))
            if hasattr(module, "merged_adapters"):
                state = (module.active_adapters, module.merged_adapters, module.disable_adapters)
                parts.append((name, *state, repr(getattr(module, "scaling", None))))
    return digest(*parts)
