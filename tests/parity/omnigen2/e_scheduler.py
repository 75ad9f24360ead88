"""Times of the updates, and the schedulers on a synthetic field."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from echo4o.modeling.omnigen2.sampling_omnigen2 import set_times

from ..golden import GoldenFile
from ..report import SINGLE, TRAJECTORY, Check
from .golden_set import GoldenSet

FIELD_TOKENS, FIELD_STEPS = 36, 6  # as the file's description of the field says


def euler(is_dynamic: bool = True) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=is_dynamic, time_shift_type="linear")


def dpm_solver() -> DPMSolverMultistepScheduler:
    """The original's optional solver, with a shift that `set_times` computes."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        final_sigmas_type="zero",
    )


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    with check.trying("released"):
        config = golden.pipe.scheduler.config
        check("released", [config.use_dynamic_shifting, config.time_shift_type], [True, "linear"])
    for case in file.json["cases"]:
        with check.trying(case["key"]):
            tokens = case["num_tokens"]  # None: no shift, whatever the configuration says
            scheduler = euler(case["dynamic_time_shift"] and tokens is not None)
            set_times(scheduler, case["steps"], 1600 if tokens is None else tokens)
            check(case["key"], 1 - scheduler.sigmas, file.tensors[case["key"]], 1e-6)
    with check.trying("custom"):
        want = file.tensors["ts.custom"]
        scheduler = euler()
        set_times(scheduler, len(want) - 1, FIELD_TOKENS, want[:-1].tolist())
        check("ts.custom", 1 - scheduler.sigmas, want, 1e-6)
    for name, scheduler in (("euler", euler()), ("dpm", dpm_solver())):
        with check.trying(f"field.{name}"):
            set_times(scheduler, FIELD_STEPS, FIELD_TOKENS)
            _check_field(scheduler, name, file.tensors.under("field"), check.of(f"field.{name}"))
            if name == "dpm":
                check("dpm.sigmas", scheduler.sigmas, file.tensors["dpm.sigmas"], SINGLE)
                check("dpm.timesteps", 1 - scheduler.sigmas[:-1], file.tensors["dpm.timesteps"], SINGLE)


def _check_field(scheduler, name, tensors, check) -> None:
    """v(x, t) = (A over channels)(x) * (1 - t) + t."""
    matrix, x = tensors["A"], tensors["x0"]
    wanted = tensors.series(name)
    check("updates", len(scheduler.timesteps), len(wanted))
    for step, want in enumerate(wanted):
        t = 1 - scheduler.sigmas[step]
        velocity = torch.einsum("cd,bdhw->bchw", matrix, x) * (1 - t) + t
        x = scheduler.step(-velocity, scheduler.timesteps[step], x).prev_sample
        check(step, x, want, TRAJECTORY)
