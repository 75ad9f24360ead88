"""Guidance: every branch's prediction, the combined velocity, latents."""

from __future__ import annotations

import torch

from ..golden import GoldenFile
from ..report import TRAJECTORY, Check
from .calls import predictions, run
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    for name, case in file.json["cases"].items():
        with check.trying(name):
            tensors, own = file.tensors.under(name), check.of(name)
            recorder = run(golden, case, tensors, own)
            for index, (branch, velocity) in enumerate(predictions(recorder)):
                own(f"pred.{index}.{branch}", velocity, tensors[f"pred.{index}.{branch}"], TRAJECTORY)
            _check_velocities(recorder, tensors, own)


def _check_velocities(recorder, tensors, check) -> None:
    """The combined velocity is what an Euler update divides by."""
    latents = [torch.stack([*tensors["noise"]]), *map(torch.stack, recorder.latents)]
    times = [time for time, _, _ in recorder.passes] + [1.0]
    wanted = tensors.series("velocity")
    check("velocities", len(times) - 1, len(wanted))
    for step, want in enumerate(wanted):
        velocity = (latents[step + 1] - latents[step]) / (times[step + 1] - times[step])
        check(f"velocity.{step}", velocity, want, TRAJECTORY)
