"""The options that select a model and its device, and how commands load a model."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echo4o.common.hub_names import is_repository_name

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """Dtypes that a model can be loaded in; ``auto`` is the stored dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A pipeline folder, an original checkpoint folder, or a Hub repository."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="The dtype to load the weights in; auto: as stored.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model plan in words first.")]


def check_model(model: str) -> None:
    """Raises an error if ``model`` is neither a checkpoint folder nor a Hub repository. Imports nothing slow."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file() and not _is_original(folder):
            raise ValueError(
                f"--model {model}: the folder contains neither model_index.json nor an original checkpoint"
            )
    elif folder.exists():
        raise NotADirectoryError(f"--model {model} is a file; pass a folder or a Hub repository")
    elif not is_repository_name(model):
        raise FileNotFoundError(
            f"--model {model}: there is no such folder, and it is not a Hub repository (owner/name)"
        )


def choose_device(name: str) -> "torch.device":
    """Returns the torch device of a name. ``auto`` is the first accelerator, or the CPU if there is none."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: unknown device; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: not available, torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: not available on this machine; use --device cpu")
    return device


def _is_original(folder: Path) -> bool:
    from echo4o.modeling.pipelines import original_class

    return original_class(folder) is not None


# Argument of a pipeline -> the option of the command line that sets it.
_OPTIONS = {
    "image": "--image",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "image_guidance_scale": "--image-guidance-scale",
    "height": "--height",
    "width": "--width",
    "think": "--think",
}


def require_options(model: str, method: str, arguments: dict) -> None:
    """Raises ValueError, naming the options, if the pipeline of the model does not accept one of these arguments."""
    from echo4o.modeling.pipelines import require_supported

    require_supported(class_of(model), {_OPTIONS[name]: name for name in arguments}, method)


def class_of(model: str) -> type:
    """Returns the pipeline class of a pipeline folder, a Hub repository or an original checkpoint."""
    from echo4o.modeling.pipelines import original_class, pipeline_class

    original = original_class(model) if Path(model).is_dir() else None
    return original or pipeline_class(model)


def load_pipeline(model: str, device: "torch.device", dtype: Dtype) -> Any:
    """Loads a pipeline folder, a Hub repository or an original checkpoint onto a device.

    The class of the pipeline is not known here; `require_options` checks the arguments that its call accepts.
    """
    import torch

    import echo4o

    options = {} if dtype is Dtype.auto else {"dtype": getattr(torch, dtype.value)}
    cls = class_of(model)
    is_original = cls.is_original(model)
    cls = getattr(echo4o, cls.__name__, cls)
    pipe = cls.from_original(model, **options) if is_original else cls.from_pretrained(model, **options)
    return pipe.to(device)
