"""Writes the result of a run: an adapter, or a pipeline folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from echo4o.common.files import replacing_folder
from echo4o.training import export
from echo4o.training.checkpoints import Checkpoint
from echo4o.training.ema import MovingAverage
from echo4o.training.model import cast, trainable
from echo4o.training.recipe import LoraTuning, TrainingRecipe


def write_result(
    recipe: TrainingRecipe,
    accelerator: Accelerator,
    model: torch.nn.Module,
    pipeline,
    average: MovingAverage | None,
    save_checkpoint: Callable[[], Path],
) -> Path:
    """Write the adapter, or the trained pipeline in `save_dtype`; with `ema`, the averaged weights.

    Args:
        model: as Accelerate prepared it.
        save_checkpoint: writes a checkpoint of the last step; a sharded pipeline is exported from it.
    """
    dtype = getattr(torch, recipe.save_dtype)
    values = average.values if average else {n: p.detach() for n, p in trainable(model)}
    if isinstance(recipe.tune, LoraTuning):
        folder = recipe.output_dir / "adapter"
        gathered = {name: whole(value) for name, value in values.items()}  # small; a collective operation
        if accelerator.is_main_process:
            preset = export.few_step_preset(recipe)
            export.write_adapter(folder, pipeline.transformer, recipe.tune, gathered, torch.float32, preset)
    elif accelerator.distributed_type == DistributedType.FSDP:
        folder = recipe.output_dir / "pipeline"
        saved = save_checkpoint()
        if accelerator.is_main_process:
            export.export_checkpoint(Checkpoint(saved), folder)
    else:
        folder = recipe.output_dir / "pipeline"
        accelerator.unwrap_model(model).eval()
        if accelerator.is_main_process:
            with torch.no_grad():
                for name, parameter in trainable(model) if average else ():
                    parameter.copy_(values[name])
            cast(pipeline, dtype)
            with replacing_folder(folder) as work:
                pipeline.save_pretrained(work)
    accelerator.wait_for_everyone()
    return folder


def whole(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor, if `value` is the sharded tensor of this process."""
    return value.full_tensor() if isinstance(value, DTensor) else value
