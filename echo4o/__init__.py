"""Echo-4o for the Hugging Face ecosystem.

The public names are loaded when they are first used, because torch and diffusers take seconds to import:
``import echo4o`` alone is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "Echo4oPipeline": "echo4o.modeling.bagel.pipeline_echo4o",
    "BagelTransformer2DModel": "echo4o.modeling.bagel.transformer_bagel",
    "BagelVisionModel": "echo4o.modeling.bagel.vision_bagel",
}

__all__ = ["BagelTransformer2DModel", "BagelVisionModel", "Echo4oPipeline", "__version__"]

if TYPE_CHECKING:
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
    from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
    from echo4o.modeling.bagel.vision_bagel import BagelVisionModel


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
