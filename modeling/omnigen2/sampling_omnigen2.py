"""Guidance, times and the sampling loop.

OmniGen2's time t runs from 0 (noise) to 1 (data) and its velocity is data - noise. diffusers' flow matching schedulers
count sigma = 1 - t and take the velocity noise - data, so that they are given the negative. The original's dynamic
time shift t / (m - m*t + t) is their shift m*sigma / (1 + (m - 1)*sigma), `time_shift_type="linear"`.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common.step_cache import cached_update, reset_step_cache


@dataclass(frozen=True)
class OmniGen2Guidance:
    """Guidance of an image; a scale of 1 is off.

    Args:
        scale: how far to follow the prompt rather than the negative prompt.
        image_scale: how far to follow the references. Without text guidance it has no effect.
        range: guidance is on while `low <= step / steps <= high`, with the step counted from 0.
    """

    scale: float
    image_scale: float
    range: tuple[float, float]

    @classmethod
    def checked(cls, scale, image_scale, guidance_range) -> "OmniGen2Guidance":
        """Raises ValueError for values that are not possible."""
        for name, value in (("guidance_scale", scale), ("image_guidance_scale", image_scale)):
            if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0; 1 disables it.")
        try:
            low, high = (float(value) for value in guidance_range)
        except (TypeError, ValueError) as error:
            raise ValueError(f"guidance_range={guidance_range!r} must be two numbers: (low, high).") from error
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_range={guidance_range!r} must be (low, high) with 0 <= low <= high <= 1.")
        return cls(float(scale), float(image_scale), (low, high))

    def is_on(self, step: int, steps: int) -> bool:
        return self.scale > 1 and self.range[0] <= step / steps <= self.range[1]

    def is_ever_on(self, steps: int) -> bool:
        return any(self.is_on(step, steps) for step in range(steps))


@dataclass
class SampledImage:
    """An image while it is sampled.

    Args:
        latent: (C, h, w) float32.
        text, negative: indices of its text features; `negative` is None if guidance is never on.
        references: indices of its references.
        guidance: of this image.
        scheduler: its own, because times depend on the size.
    """

    latent: torch.Tensor
    text: int
    negative: int | None
    references: tuple[int, ...]
    guidance: OmniGen2Guidance
    scheduler: Any

    def branches(self, is_guided: bool) -> list[tuple[int, tuple[int, ...]]]:
        """(text, references) of each branch: the prompt; negative with references; negative without."""
        branches = [(self.text, self.references)]
        if is_guided:
            assert self.negative is not None
            if self.references and self.guidance.image_scale > 1:
                branches.append((self.negative, self.references))
            branches.append((self.negative, ()))
        return branches

    def combine(self, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The guided velocity from those of [`branches`], in float32."""
        velocities = [velocity.float() for velocity in velocities]
        if len(velocities) == 1:
            return velocities[0]
        condition, unconditional = velocities[0], velocities[-1]
        if len(velocities) == 2:
            return unconditional + self.guidance.scale * (condition - unconditional)
        negative = velocities[1]
        guided = unconditional + self.guidance.image_scale * (negative - unconditional)
        return guided + self.guidance.scale * (condition - negative)


def time_shift(latent_pixels: int) -> float:
    """m of the dynamic time shift for a target of so many latent pixels; 3.2 for 1024 x 1024 image pixels."""
    return math.sqrt(latent_pixels) / 40


def set_times(scheduler, steps: int, latent_pixels: int, times: Sequence[float] | None = None) -> None:
    """Set a scheduler's sigmas for `steps` updates, or for the given times, which are not shifted.

    Raises ValueError for a scheduler that cannot take sigmas.
    """
    shift = time_shift(latent_pixels) if times is None else 1.0
    if times is None:
        sigmas = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1].neg().add(1).tolist()
    else:
        sigmas = [1 - float(time) for time in times]
    is_dynamic = scheduler.config.get("use_dynamic_shifting", False)
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=sigmas, mu=shift if is_dynamic else None)
    elif scheduler.config.get("use_flow_sigmas"):
        if is_dynamic:
            sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
        scheduler.set_timesteps(len(sigmas))
        scheduler.sigmas = torch.tensor([*sigmas, 0.0])
        scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    else:
        raise ValueError(
            f"{type(scheduler).__name__} cannot sample from OmniGen2: use FlowMatchEulerDiscreteScheduler, or "
            "DPMSolverMultistepScheduler with use_flow_sigmas=True and prediction_type='flow_prediction'."
        )
    scheduler.set_begin_index(0)


def set_latents(images: list[SampledImage], latents) -> None:
    """Replace the latents of all images. Raises ValueError for another number, shape, or non-finite values."""
    given = list(latents)
    shapes, wanted = [tuple(x.shape) for x in given], [tuple(image.latent.shape) for image in images]
    if shapes != wanted:
        raise ValueError(f"`latents` of the callback have the shapes {shapes}; they must be {wanted}.")
    if not all(torch.isfinite(x).all() for x in given):
        raise ValueError("`latents` of the callback hold values that are not finite.")
    for image, latent in zip(images, given, strict=True):
        image.latent = latent.to(image.latent)


def check_scheduler(scheduler) -> None:
    """Raise ValueError for a scheduler that cannot sample from OmniGen2, before any work."""
    set_times(type(scheduler).from_config(scheduler.config), 1, 1600)
    if scheduler.config.get("use_dynamic_shifting") and scheduler.config.get("time_shift_type") == "exponential":
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError("The scheduler has time_shift_type='exponential'; OmniGen2 shifts times by 'linear'.")
    if scheduler.config.get("use_flow_sigmas") and scheduler.config.get("prediction_type") != "flow_prediction":
        raise ValueError(f"prediction_type={scheduler.config.get('prediction_type')!r} must be 'flow_prediction'.")


def sample(
    images: list[SampledImage],
    steps: int,
    predict: Callable[[list[torch.Tensor], torch.Tensor, tuple[bool, ...]], Sequence[torch.Tensor]],
    transformer,
    on_step_end: Callable[[int, torch.Tensor], bool],
) -> None:
    """Update the images' latents `steps` times.

    Args:
        predict: latents, times (N,) or (1,), and whether each image is guided -> velocities of all branches of all
            images.
        on_step_end: called with the step and the first image's timestep; returns whether to stop.
    """
    device, before = images[0].latent.device, None
    reset_step_cache(transformer)
    for step in range(steps):
        guided = tuple(image.guidance.is_on(step, steps) for image in images)
        if before not in (None, guided):
            reset_step_cache(transformer)  # the rows change
        before = guided
        times = torch.stack([1 - image.scheduler.sigmas[step].float() for image in images])
        if len(set(times.tolist())) == 1:
            times = times[:1]
        with cached_update(transformer):
            velocities = iter(predict([image.latent for image in images], times.to(device), guided))
        timestep = images[0].scheduler.timesteps[step]
        for image, is_guided in zip(images, guided, strict=True):
            velocity = image.combine([next(velocities) for _ in image.branches(is_guided)])
            stepped = image.scheduler.step(-velocity[None], image.scheduler.timesteps[step], image.latent[None])
            image.latent = stepped.prev_sample[0]
        if on_step_end(step, timestep):
            break
    reset_step_cache(transformer)
