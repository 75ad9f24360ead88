"""Echo-4o for the Hugging Face ecosystem.

The public names are loaded when they are first used, because torch and diffusers take seconds to import:
``import echo4o`` alone is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "Echo4oPipeline": "echo4o.pipeline",
    "load_pipeline": "echo4o.pipeline",
    "BagelTransformer2DModel": "echo4o.modeling.bagel.transformer_bagel",
    "BagelVisionModel": "echo4o.modeling.bagel.vision_bagel",
    "Echo4oImage": "echo4o.dataset_scripts.builder",
    "training_rows": "echo4o.dataset_scripts.loading",
    "use_dataset": "echo4o.dataset_scripts.bare_name",
}

__all__ = [
    "BagelTransformer2DModel",
    "BagelVisionModel",
    "Echo4oImage",
    "Echo4oPipeline",
    "__version__",
    "load_pipeline",
    "training_rows",
    "use_dataset",
]

if TYPE_CHECKING:
    from echo4o.dataset_scripts.bare_name import use_dataset
    from echo4o.dataset_scripts.builder import Echo4oImage
    from echo4o.dataset_scripts.loading import training_rows
    from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
    from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
    from echo4o.pipeline import Echo4oPipeline, load_pipeline


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


# load_dataset("echo-4o-image") is understood from now on; imports nothing heavy.
import_module("echo4o.dataset_scripts.bare_name").install()
