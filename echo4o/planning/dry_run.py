"""Peak memory of code that runs on the meta device, where tensors have sizes but no values."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echo4o.modeling.common.images import vae_scale_factor


class FusedAttention(TorchFunctionMode):
    """Within the context, attention allocates only its result, as fused kernels do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """Within the context, measures the peak bytes of new tensors, on any device."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and storage._cdata not in before:
                self._allocated(storage)
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def vae_bytes(vae: Any, height: int, width: int, dtype: torch.dtype, decode: bool) -> int:
    """Peak bytes that a VAE allocates for one image without tiling, from a dry run.

    Args:
        vae: on the meta device.
        height, width: pixels.
    """
    with torch.device("meta"), torch.no_grad():
        vae = torch.nn.Module.to(vae, dtype)  # diffusers' own `to` warns about modules that do not exist
        factor = vae_scale_factor(vae.config)
        with PeakBytes() as peak, FusedAttention():
            if decode:
                vae.decode(torch.empty(1, vae.config.latent_channels, height // factor, width // factor, dtype=dtype))
            else:
                vae.encode(torch.empty(1, 3, height, width, dtype=dtype))
    return peak.peak
