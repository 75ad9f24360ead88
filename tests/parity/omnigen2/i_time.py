"""Times of training, and the released schedules."""

from __future__ import annotations

import torch
from torch import nn

from echo4o.training.backbones.omnigen2 import OmniGen2Backbone
from echo4o.training.backbones.omnigen2_recipe import OmniGen2Objective, OmniGen2Recipe
from echo4o.training.ema import MovingAverage

from ..golden import GoldenFile
from ..report import Check
from .comparing import compare_relative
from .golden_set import GoldenSet

# The released options for learning rates; see FACTS.md in the golden directory.
RATE, WARMUP, FIRST_RATE = 8e-7, 500, 1e-18


def released_rate(k: int, rate: float, warmup: int, first: float) -> float:
    """lr(k) of the released schedule; without accumulation update n uses lr(max(n - 1, 0))."""
    return first + k * (rate - first) / warmup if k < warmup else rate


def backbone_of(golden: GoldenSet, objective: OmniGen2Objective) -> OmniGen2Backbone:
    recipe = OmniGen2Recipe(
        backbone="omnigen2", model=".", output_dir=".", data={"path": "."}, steps=1, batch_size=1, objective=objective
    )
    return OmniGen2Backbone(golden.pipe, recipe)


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    for case in file.json["cases"]:
        with check.trying(case["key"]):
            _check_times(golden, case, file.tensors.under(case["key"]), check.of(case["key"]))
    for step, want in file.json["released_lr_used_by_update"].items():
        got = released_rate(max(int(step) - 1, 0), RATE, WARMUP, FIRST_RATE)
        compare_relative(check, f"released_lr.{step}", got, want, 1e-9)
    average = MovingAverage(nn.Linear(1, 1), 0.9999, copy_first=True)
    for step, want in file.json["ema_decay_by_step"].items():
        average.updates = int(step)
        check(f"ema_decay.{step}", average.decay_now(), want, 1e-12)


def _check_times(golden, case, tensors, check) -> None:
    stride, channels = golden.pipe.latent_stride, golden.pipe.transformer.config.in_channels
    objective = OmniGen2Objective(
        time_shift=case["version"],
        dynamic_time_shift=case["dynamic_time_shift"],
        max_output_pixels=case["seq_len"] * stride**2,
    )
    targets = [torch.empty(channels, *size, device="meta") for size in case["latent_hw"]]
    times = backbone_of(golden, objective).times(tensors["u"], targets)
    check("t", times, tensors["t"], 1e-6)
    # The original draws x0 of every target first, then u at once.
    generator = torch.Generator().manual_seed(case["global_seed"])
    noises = [torch.randn(x0_channels(tensors, channels), *size, generator=generator) for size in case["latent_hw"]]
    for name in [n for n in tensors if n.startswith("x0.")]:
        check(name, noises[int(name.split(".")[1])], tensors[name])
    check("u", torch.randn(len(targets), generator=generator), tensors["u"])


def x0_channels(tensors, default: int) -> int:
    """Channels of the noise that the file was recorded with."""
    names = [name for name in tensors if name.startswith("x0.")]
    return tensors[names[0]].shape[0] if names else 4
