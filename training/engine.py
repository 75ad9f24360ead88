"""Builds the Accelerator of a run and checks that the launch matches the recipe."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule

from echo4o.training.recipe import RecipeError, TrainingRecipe

# Timeout of collective operations: other processes wait while the main one generates images or writes 30 GB.
WAIT = timedelta(hours=1)


def build_accelerator(recipe: TrainingRecipe) -> Accelerator:
    """Build the Accelerator of a run.

    Raises:
        RecipeError: the number of processes differs from the recipe or the launch, sharding was requested and would
            not happen, or a tracker is not installed.
    """
    for tracker in recipe.trackers:
        _require(tracker)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1") and recipe.sharding == "none":
        raise RecipeError("The launcher asks for FSDP, and the recipe says sharding: none. Make them agree.")
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        cpu=recipe.device == "cpu",
        fsdp_plugin=_fsdp2(recipe) if recipe.sharding == "fsdp2" else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=WAIT),
        ],
        log_with=list(recipe.trackers) or None,
        project_dir=str(recipe.output_dir),
        step_scheduler_with_optimizer=False,
    )
    try:
        _check_launch(accelerator, recipe)
    except RecipeError:
        # Accelerate sets this variable, and the next run of this process would read it as a launcher's.
        if recipe.sharding == "fsdp2":
            os.environ.pop("ACCELERATE_USE_FSDP", None)
        raise
    return accelerator


def _require(tracker: str) -> None:
    """Raise RecipeError where a tracker is not installed (wandb's own folder `./wandb` looks like a module)."""
    try:
        importlib.metadata.version(tracker)
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(f"trackers: {tracker} is not installed: pip install {tracker}") from None


def _check_launch(accelerator: Accelerator, recipe: TrainingRecipe) -> None:
    running, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if started != running:
        raise RecipeError(f"{started} processes were started, but Accelerate runs {running}: nothing was trained.")
    # `accelerate launch` names a port where it was asked for several processes, and a precision in any case.
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if recipe.processes is None and running == 1 and launched and "WORLD_SIZE" not in os.environ:
        raise RecipeError(
            "accelerate launch was asked for several processes and started one (it does so with --cpu): start with "
            "`torchrun --nproc-per-node N -m echo4o.training.train RECIPE`, or without --cpu and with --multi_gpu."
        )
    if recipe.processes is not None and recipe.processes != running:
        raise RecipeError(
            f"processes: {recipe.processes} was asked for, but {running} run"
            f"{'s' if running == 1 else ''}: start with `torchrun --nproc-per-node {recipe.processes} -m "
            "echo4o.training.train RECIPE` or `accelerate launch` (which, with --cpu, runs one process only), "
            "or set processes."
        )
    if recipe.sharding == "fsdp2" and accelerator.distributed_type != DistributedType.FSDP:
        raise RecipeError(
            f"sharding: fsdp2 was asked for, but Accelerate would run {accelerator.distributed_type.value} on "
            f"{running} process{'es' if running > 1 else ''} (FSDP2 needs several, each with an accelerator)."
        )


def _fsdp2(recipe: TrainingRecipe) -> FullyShardedDataParallelPlugin:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = None
    if recipe.mixed_precision == "bf16":  # gradients are summed in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )


@contextmanager
def hidden_buffers(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Hide persistent buffers while FSDP wraps the model: Accelerate would treat them as sharded parameters."""
    hidden = []
    if accelerator.distributed_type == DistributedType.FSDP:
        for module in model.modules():
            names = module._buffers.keys() - module._non_persistent_buffers_set
            hidden.append((module, names))
            module._non_persistent_buffers_set |= names
    yield
    for module, names in hidden:
        module._non_persistent_buffers_set -= names


def loads_weights(accelerator: Accelerator) -> bool:
    """Whether this process reads the weights. Of a sharded model, only the main process reads and broadcasts them."""
    return accelerator.distributed_type != DistributedType.FSDP or accelerator.is_main_process


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of a sharded model; without a backward pass, FSDP2 keeps those of the outermost module."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: on its accelerator, or resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a square matrix product on this device: the best of six short runs."""
    side = 4096 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
