"""Pipeline classes by the `_class_name` of their model_index.json."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

PIPELINES = {
    "Echo4oPipeline": "echo4o.modeling.bagel.pipeline_echo4o",
    "OmniGen2Pipeline": "echo4o.modeling.omnigen2.pipeline_omnigen2",
    "Blip3oPipeline": "echo4o.modeling.blip3o.pipeline_blip3o",
}


def class_named(name: str) -> type:
    """The pipeline class of a name in `PIPELINES`."""
    return getattr(import_module(PIPELINES[name]), name)


def pipeline_class(model: Any, **hub_options) -> type:
    """The class of a pipeline folder or a Hub repository, as its `model_index.json` names it.

    Args:
        model: a folder, or the name of a Hub repository.
        hub_options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        FileNotFoundError: there is no such folder or no `model_index.json`, or the Hub cannot be reached.
        ValueError: a pipeline of a class that is not in `PIPELINES`; huggingface_hub's errors as they are.
    """
    from echo4o.modeling.common.loading import download_index, require_name
    from echo4o.modeling.common.publishing import INDEX_NAME
    from echo4o.modeling.common.weights import read_json

    require_name(model)
    if Path(model).is_dir():
        file = Path(model, INDEX_NAME)
        if not file.is_file():
            if original := original_class(model):
                raise FileNotFoundError(
                    f"{model} has no {INDEX_NAME}; it looks like a checkpoint in the original layout. Use "
                    f"{original.__name__}.from_original, or convert it once with `echo4o convert SRC DST`."
                )
            raise FileNotFoundError(f"{model} is not a pipeline folder: it has no {INDEX_NAME}.")
    else:
        file = Path(download_index(str(model), **hub_options))
    name = read_json(file).get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    if not isinstance(name, str) or name not in PIPELINES:
        raise ValueError(f"{model} holds a pipeline of the class {name}; known classes are {', '.join(PIPELINES)}.")
    return class_named(name)


def original_class(folder: str | Path) -> type | None:
    """The pipeline class whose original layout a folder has; None for any other folder."""
    return next((cls for cls in map(class_named, PIPELINES) if cls.is_original(folder)), None)


def supported_options(call: Callable) -> set[str]:
    """The names of the arguments that a pipeline's `__call__` or `chat` takes."""
    return set(inspect.signature(call).parameters) - {"self"}


def require_supported(cls: type, options: dict[str, str], method: str = "__call__") -> None:
    """Raise ValueError if a pipeline class lacks the method or one of the options.

    Args:
        options: option as the user wrote it -> name of the argument that it sets.
    """
    if not hasattr(cls, method):
        raise ValueError(f"{cls.__name__} has no {method}.")
    known = supported_options(getattr(cls, method))
    if unknown := [option for option, argument in options.items() if argument not in known]:
        raise ValueError(f"{', '.join(unknown)}: {cls.__name__} does not take this option.")
