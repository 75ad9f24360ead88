"""Reports on which devices a pipeline's weights are stored and compute."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from .mixin_base import PipelineMixin

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ComponentPlacement:
    """The devices of one component's weights.

    Args:
        stored: bytes by storage ("cuda:0", "cpu", "disk"), largest first.
        dtypes: bytes by dtype, largest first.
        runs_on: the device that computes with the weights.
        offload: how the weights are moved to that device ("model offload", ...); "" if they stay on it.
    """

    name: str
    stored: dict[str, int]
    dtypes: dict[str, int]
    runs_on: str
    offload: str

    @property
    def nbytes(self) -> int:
        return sum(self.stored.values())

    def __str__(self) -> str:
        stored = " + ".join(f"{amount(size)} on {place}" for place, size in self.stored.items())
        computes = f", computes on {self.runs_on} ({self.offload})" if self.offload else ""
        return f"{self.name} {stored} ({'+'.join(self.dtypes)}){computes}"


@dataclass(frozen=True)
class Placement:
    """The devices of all components. Printing it gives one line per component; `line` is a single line."""

    components: tuple[ComponentPlacement, ...]

    def __getitem__(self, name: str) -> ComponentPlacement:
        return next(component for component in self.components if component.name == name)

    def __str__(self) -> str:
        return "\n".join(map(str, self.components))

    @property
    def line(self) -> str:
        return "; ".join(map(str, self.components))


class PlacementMixin(PipelineMixin):
    """Adds `placement()`, a fast execution device and safe offloading to disk. Put it before `DiffusionPipeline`."""

    @property
    def _execution_device(self) -> torch.device:
        """As in diffusers, which searches all modules for offloading hooks several times.

        That takes longer than encoding a short prompt with a tiny model. Without hooks, and with all weights on one
        device, that device is the answer.
        """
        models = [value for value in vars(self).values() if isinstance(value, torch.nn.Module)]
        devices = {parameter.device for model in models if (parameter := next(model.parameters(), None)) is not None}
        if len(devices) == 1 and not any(_has_hook(module) for model in models for module in model.modules()):
            return devices.pop()
        return super()._execution_device

    def placement(self) -> Placement:
        """The devices on which the weights of every component are stored and compute. Moves nothing."""
        return Placement(tuple(_component_placement(name, module) for name, module in modules_by_name(self).items()))

    def register_modules(self, **kwargs):
        super().register_modules(**kwargs)
        for name, module in kwargs.items():
            warn_of_device_map(name, getattr(module, "hf_device_map", None))

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        *args,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """As in diffusers, but `offload_to_disk_path` must be new or empty, and each component uses a folder in it.

        diffusers names the files by layers alone, so that components would read each other's files.
        """
        onload_device = torch.device(onload_device)
        exclude = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        if offload_to_disk_path is None:
            super().enable_group_offload(onload_device, *args, exclude_modules=exclude, **kwargs)
            return
        root = Path(offload_to_disk_path)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(f"offload_to_disk_path={str(root)!r} must be a new or an empty folder.")
        for name, module in modules_by_name(self).items():
            if name in exclude:
                module.to(onload_device)
            else:
                typed: Any = module  # nn.Module declares no methods of diffusers
                typed.enable_group_offload(onload_device, *args, offload_to_disk_path=str(root / name), **kwargs)


def _has_hook(module: torch.nn.Module) -> bool:
    """Whether diffusers or accelerate hooked the module, for example to move its weights."""
    return "_diffusers_hook" in vars(module) or "_hf_hook" in vars(module)


def modules_by_name(pipeline) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that are torch modules."""
    return {name: module for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}


def warn_of_device_map(name: str, device_map: dict | None) -> None:
    """Warn of parts that a device map placed on disk, or on the CPU beside a faster device."""
    places = {part: str(place) for part, place in device_map.items()} if isinstance(device_map, dict) else {}
    faster = set(places.values()) - {"cpu", "disk"}
    slow = {part: place for part, place in places.items() if place == "disk" or (place == "cpu" and faster)}
    if slow:
        parts = ", ".join(f"{part} on {place}" if part else place for part, place in list(slow.items())[:5])
        more = f" and {len(slow) - 5} more" if len(slow) > 5 else ""
        logger.warning(
            f"The device map places parts of {name} where they are slow: {parts}{more}. `echo4o info MODEL --plan "
            "--gpu SIZE` lists options that fit on the GPU."
        )


def amount(size: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _component_placement(name: str, module: torch.nn.Module) -> ComponentPlacement:
    on_disk, runs_on, offload = _group_offload(module) or _accelerate_hook(module) or (False, None, "")
    stored: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for owner in module.modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None:
                continue
            for part in _plain_tensors(tensor):
                place = "disk" if on_disk else _stored_place(owner, key) if part.is_meta else str(part.device)
                stored[place] += part.nbytes
                dtypes[str(part.dtype).removeprefix("torch.")] += part.nbytes
    largest = stored.most_common(1)[0][0] if stored else "cpu"
    by_size = dict(stored.most_common()), dict(dtypes.most_common())
    return ComponentPlacement(name, *by_size, str(runs_on or largest), offload)


def _plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that store a tensor; a quantized weight has several."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
        return
    yield tensor
    if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes with 4 bits
        yield state.absmax


def _group_offload(module: torch.nn.Module) -> tuple[bool, torch.device, str] | None:
    parts: list[Any] = list(module.modules())
    for part in parts:
        hook = part._diffusers_hook.get_hook("group_offloading") if hasattr(part, "_diffusers_hook") else None
        if hook is not None:
            settings = hook.config
            disk = settings.offload_to_disk_path is not None
            kind = getattr(settings.offload_type, "value", settings.offload_type)
            return disk, settings.onload_device, f"group offload, {kind}{', from disk' if disk else ''}"
    return None


def _accelerate_hook(module: torch.nn.Module) -> tuple[bool, torch.device, str] | None:
    hooks: list[Any] = [part._hf_hook for part in module.modules() if hasattr(part, "_hf_hook")]
    hooks = [inner for hook in hooks for inner in getattr(hook, "hooks", (hook,))]
    devices = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
    if not devices:
        return None
    if type(hooks[0]).__name__ == "CpuOffload":
        return False, devices[0], "model offload"
    parts: dict = getattr(module, "hf_device_map", None) or {}
    return False, devices[0], "device map" if len(set(parts.values())) > 1 else "sequential offload"


def _stored_place(owner: torch.nn.Module, key: str) -> str:
    """Where accelerate stores a tensor that is on the meta device until its module runs."""
    hook = getattr(owner, "_hf_hook", None)
    for inner in getattr(hook, "hooks", (hook,)):
        weights = getattr(inner, "weights_map", None)
        if weights is not None:
            source = getattr(weights, "dataset", weights)
            kept = getattr(source, "state_dict", source)
            return "cpu" if getattr(weights, "prefix", "") + key in kept else "disk"
    return "meta"
