"""Checks that a scheduler of diffusers can be used with a flow-matching model.

Accepted are schedulers that give the results of Euler steps at the shifted times, and UniPC, whose multistep formula is
defined for flow matching.
"""

import copy
from typing import Any

import numpy as np
import torch

# Settings of schedulers that change the given times or add noise -> the value that does neither.
_PLAIN = {
    "use_dynamic_shifting": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "shift_terminal": None,
    "thresholding": False,
}
_UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
_TOLERANCE = 2e-6  # UniPC starts at 1 - 1e-6


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError, naming the scheduler and the setting, unless it can sample a flow-matching model.

    Updates of a small tensor, made by a scheduler of the same class and configuration, are compared with Euler's formula:
    x + (sigma' - sigma) * v at sigma = shift * s / (1 + (shift - 1) * s) for the given times s. The velocity v is
    constant, so that UniPC's formula gives the same.
    """
    name, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    is_unipc = name == "UniPCMultistepScheduler"
    wanted = _PLAIN | (_UNIPC if is_unipc else {})
    for setting, value in wanted.items():
        given = config.get(setting, value)
        if (given != value) if isinstance(value, str) else (bool(given) != bool(value)):
            raise _unusable(name, f"{setting}={given!r} must be {value!r}")
    # from_config also keeps settings of the checkpoint's scheduler that the new class does not have.
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    if not 0 < shift < np.inf:
        raise _unusable(name, f"shift={shift:g} must be above 0")
    times = np.linspace(1.0, 0.0, 5)[:-1]
    expected = np.append(shift * times / (1 + (shift - 1) * times), 0.0)
    sigmas, updates = _try(scheduler, times)
    if sigmas is None or sigmas.shape != expected.shape or np.abs(sigmas - expected).max() > _TOLERANCE:
        hint = f"; give flow_shift={shift:g}" if is_unipc and config.get("flow_shift") != shift else ""
        raise _unusable(name, f"it does not follow the given times with shift={shift:g}{hint}")
    if updates is None or not _is_euler(updates, expected):
        how = "fail where the velocity is constant" if is_unipc else "are not those of Euler's method"
        raise _unusable(name, f"its updates {how}, or ignore the generator")


def _unusable(name: str, why: str) -> ValueError:
    return ValueError(
        f"{name} cannot generate with this model: {why}. Use FlowMatchEulerDiscreteScheduler with a fixed shift, or "
        "UniPCMultistepScheduler with use_flow_sigmas=True, prediction_type='flow_prediction' and flow_shift."
    )


_START, _VELOCITY = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.7, 0.4]])


def _try(scheduler: Any, times: np.ndarray) -> tuple[np.ndarray | None, list[torch.Tensor] | None]:
    """The scheduler's sigmas for `times`, and a tensor after each update; None for what fails."""
    sigmas = updates = None
    try:
        trial = copy.deepcopy(scheduler)
        trial.__dict__.pop("step", None)  # a wrapper set on the instance would step the original
        trial.set_timesteps(sigmas=times, device="cpu")
        sigmas = np.asarray([float(sigma) for sigma in trial.sigmas])
        sample, updates = _START, []
        for timestep in trial.timesteps:
            sample = trial.step(_VELOCITY, timestep, sample, return_dict=False)[0]
            updates.append(sample)
    except Exception:  # foreign code with arguments that it may not know
        return sigmas, None
    return sigmas, updates


def _is_euler(updates: list[torch.Tensor], sigmas: np.ndarray) -> bool:
    sample = _START
    for index, update in enumerate(updates):
        sample = sample + float(sigmas[index + 1] - sigmas[index]) * _VELOCITY
        if update.shape != sample.shape or not torch.allclose(update.cpu(), sample, atol=1e-5):
            return False
    return True
