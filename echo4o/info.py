"""Collects versions of libraries and the available devices."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

# The libraries that results depend on, and those that are optional.
LIBRARIES = ("torch", "diffusers", "transformers", "datasets", "huggingface_hub", "peft", "accelerate")
LIBRARIES += ("safetensors", "evaluate", "openai", "numpy", "pillow", "pyarrow")
OPTIONAL = ("bitsandbytes", "torchao", "flash-attn", "xformers", "tensorboard", "wandb", "gradio")


def collect() -> dict[str, dict[str, str | None]]:
    """Versions of echo4o, Python and the libraries, and the devices that torch sees.

    An optional library that is not installed has the value None. Nothing about accounts or tokens is read.
    """
    from echo4o import __version__

    return {
        "echo4o": {
            "version": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu cores": str(os.cpu_count()),
        },
        "devices": _devices(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str | None]:
    import torch

    devices: dict[str, str | None] = {"cpu": f"{torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return devices


def gpu_bytes(text: str | None) -> float:
    """Parses `24GB` or `16GiB` to bytes; None is the memory of the first GPU. Raises ValueError if there is none."""
    import torch

    from echo4o.common.sizes import parse_bytes

    if text is not None:
        return parse_bytes(text)
    if not torch.cuda.is_available():
        raise ValueError("this machine has no GPU: pass the memory to plan for, for example --gpu 24GB")
    return float(torch.cuda.get_device_properties(0).total_memory)
