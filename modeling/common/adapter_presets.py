"""Sampling presets of adapters: how many updates a few-step adapter needs, that it needs no guidance, and its time shift.

An adapter's file stores its preset in its header. While the adapter is active, a call of the pipeline uses the preset
for every argument that it does not pass. This file is published beside the pipeline's.
"""

import functools
import inspect
import math
from dataclasses import asdict, dataclass
from typing import Any

PRESET_KEY = "sampling_preset"


@dataclass(frozen=True)
class SamplingPreset:
    """How images are sampled with an adapter.

    Args:
        num_inference_steps: number of updates.
        guidance_scale, image_guidance_scale: 1 is off.
        shift: of the update times; None: the scheduler's.
    """

    num_inference_steps: int
    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    shift: float | None = None

    @classmethod
    def read(cls, values: Any) -> "SamplingPreset":
        """From stored values. Raises ValueError for anything that is not a preset."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or "num_inference_steps" not in values or set(values) - names:
            raise ValueError(
                f"the adapter's {PRESET_KEY} is {values!r}; it must have the keys {', '.join(sorted(names))}."
            )
        preset = cls(**values)
        steps, numbers = preset.num_inference_steps, [preset.guidance_scale, preset.image_guidance_scale]
        numbers += [] if preset.shift is None else [preset.shift]
        real = all(isinstance(n, (int, float)) and math.isfinite(n) and n > 0 for n in numbers)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1 or not real:
            raise ValueError(f"the adapter's {PRESET_KEY} has impossible values: {values!r}.")
        return preset

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def arguments(self, scheduler: Any, steps: int | None = None) -> dict[str, Any]:
        """The preset as arguments of a pipeline's call.

        Args:
            scheduler: the pipeline's; if it shifts times otherwise, the times are given so that the result is `shift`.
            steps: the number of updates that the call asks for; None: the preset's.
        """
        steps = self.num_inference_steps if steps is None else steps
        chosen = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
        }
        config = dict(getattr(scheduler, "config", {}))
        own = float(config.get("shift") or config.get("flow_shift") or 1.0)
        if self.shift is not None and self.shift != own and not config.get("use_dynamic_shifting"):
            ratio = self.shift / own  # of the shift that remains to be done before the scheduler's
            times = [1 - index / steps for index in range(steps)]
            chosen["sigmas"] = [ratio * t / (1 + (ratio - 1) * t) for t in times]
        return chosen

    def __str__(self) -> str:
        guidance = "off" if max(self.guidance_scale, self.image_guidance_scale) <= 1 else f"{self.guidance_scale:g}"
        shift = "" if self.shift is None else f", shift {self.shift:g}"
        return f"{self.num_inference_steps} updates, guidance {guidance}{shift}"


def common_preset(presets: dict[str, SamplingPreset]) -> SamplingPreset | None:
    """The preset of adapters that are active together; None without one. Raises ValueError naming two that contradict."""
    items = list(presets.items())
    for name, preset in items[1:]:
        if preset != items[0][1]:
            raise ValueError(
                f"The adapters {items[0][0]!r} ({items[0][1]}) and {name!r} ({preset}) need different sampling: activate "
                "one of them."
            )
    return items[0][1] if items else None


def uses_adapter_preset(call):
    """Decorator of a pipeline's call: arguments that are not passed, or None, are those of the active adapters' preset."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def with_preset(self, *args, **kwargs):
        preset = self.sampling_preset
        if preset is None:
            return call(self, *args, **kwargs)
        bound = signature.bind_partial(self, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if value is not None}
        chosen = preset.arguments(self.scheduler, given.get("num_inference_steps"))
        if "sigmas" in given or "timesteps" in given:
            chosen.pop("sigmas", None)
        bound.arguments.update({n: v for n, v in chosen.items() if n in signature.parameters and n not in given})
        return call(*bound.args, **bound.kwargs)

    return with_preset
