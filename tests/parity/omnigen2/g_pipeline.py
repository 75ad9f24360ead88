"""Whole calls of the pipeline: noise, latents after every update, images."""

from __future__ import annotations

import re

import torch

from echo4o.modeling.omnigen2.inputs_omnigen2 import DEFAULT_SIZE

from ..golden import GoldenFile
from ..report import Check
from .calls import run
from .e_scheduler import dpm_solver
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    check("default_output_hw", [DEFAULT_SIZE, DEFAULT_SIZE], file.json["default_output_hw"])
    for name, case in file.json["cases"].items():
        with check.trying(name):
            tensors = file.tensors.under(name)
            is_dpm = "dpmsolver" in case.get("note", "")
            run(golden, case, tensors, check.of(name), dpm_solver() if is_dpm else None)
            _check_draws(case, tensors, check.of(name))


def _check_draws(case, tensors, check) -> None:
    """Noise comes from the caller's generator; the original draws the references' noise from the global one."""
    if "generator" in case:
        seed = int(re.search(r"manual_seed\((\d+)\)", case["generator"])[1])
        noise = tensors["noise"]
        check("noise drawn", torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)), noise)
    if "global_seed" in case:
        generator = torch.Generator().manual_seed(case["global_seed"])
        for index, noise in enumerate(tensors.series("vae_noise")):
            check(f"vae_noise.{index} drawn", torch.randn(noise.shape, generator=generator), noise)
