"""Loads the pipeline of ``echo4o generate`` and ``echo4o serve``: adapters, offloading, quantization, step caches, compilation."""

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from echo4o.cli.generate_options import Adapter, Cache, ModelOptions, Offload, Quantize
from echo4o.cli.models import Dtype, class_of, load_pipeline

if TYPE_CHECKING:
    import torch


def load_for_generation(
    model: str, device: "torch.device", options: ModelOptions, adapters: Sequence[Adapter] = ()
) -> Any:
    """Load a pipeline as the options ask, with all adapters active.

    Raises ValueError, naming the option, where the model or a missing package does not allow it.
    """
    if options.quantize in (Quantize.int8, Quantize.nf4):
        pipe = _load_quantized(model, device, options)
    elif options.offload is Offload.none:
        pipe = load_pipeline(model, device, options.dtype)
    else:
        pipe = load_pipeline(model, _cpu(), options.dtype)
    _load_adapters(pipe, adapters)
    if options.quantize is Quantize.fp8:
        _cast_to_fp8(pipe)
    _enable_cache(pipe, options.cache)
    if options.compile:
        pipe.transformer.compile_repeated_blocks()
    _offload(pipe, device, options.offload)
    return pipe


def _cpu() -> "torch.device":
    import torch

    return torch.device("cpu")


def _load_quantized(model: str, device: "torch.device", options: ModelOptions) -> Any:
    import torch

    import echo4o
    from echo4o.modeling.common.quantization import METHODS, load_quantized, require_packages

    cls = class_of(model)
    if cls.is_original(model):
        raise ValueError(f"--quantize: {model} has the original layout; convert it first: echo4o convert {model} DST")
    method = METHODS[options.quantize.value]
    require_packages(method, "--quantize ")
    loading: dict[str, Any] = {} if options.dtype is Dtype.auto else {"dtype": getattr(torch, options.dtype.value)}
    pipe = load_quantized(getattr(echo4o, cls.__name__, cls), model, method, **loading)
    return pipe if options.offload is not Offload.none else pipe.to(device)


def _load_adapters(pipe: Any, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        try:
            pipe.load_lora_weights(adapter.place, adapter_name=adapter.name)
        except (OSError, ValueError) as error:
            raise ValueError(f"--lora {adapter.place}: {error}") from error
    if adapters:
        pipe.set_adapters([adapter.name for adapter in adapters], [adapter.scale for adapter in adapters])


def _cast_to_fp8(pipe: Any) -> None:
    import torch

    computes_in = pipe.transformer.dtype
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, computes_in)


def _enable_cache(pipe: Any, cache: Cache) -> None:
    if cache is Cache.none:
        return
    import torch
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
    from diffusers.models.cache_utils import CacheMixin

    if not isinstance(pipe.transformer, CacheMixin):
        raise ValueError(f"--cache {cache.value}: {type(pipe).__name__} has no step cache.")
    if cache is Cache.first_block:
        config: Any = FirstBlockCacheConfig(threshold=0.05)
    else:
        # Measured in docs/performance.md: 54% of the layers run, 2.6% error.
        config = TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=3,
            taylor_factors_dtype=torch.float32,
            skip_predict_identifiers=[r"layers\.\d+"],
            cache_identifiers=["proj_out"],
        )
    try:
        pipe.transformer.enable_cache(config)
    except ValueError as error:
        raise ValueError(f"--cache {cache.value}: {error}") from error


def _offload(pipe: Any, device: "torch.device", offload: Offload) -> None:
    if offload is Offload.model:
        pipe.enable_model_cpu_offload(device=device)
    elif offload is Offload.group:
        pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    elif offload is Offload.disk:
        folder = tempfile.TemporaryDirectory(prefix="echo4o-offload-")
        pipe.enable_group_offload(
            device, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder.name
        )
        pipe._offload_folder = folder  # deleted with the pipeline
