"""Model-specific parts of training: one module per backbone, named as its folder in `modeling/`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from echo4o.modeling.pipelines import PIPELINES, pipeline_class

if TYPE_CHECKING:
    from echo4o.training.backbones.base import Backbone


def backbone_names() -> dict[str, str]:
    """Backbone name -> class name of its pipeline."""
    return {module.split(".")[-2]: class_name for class_name, module in PIPELINES.items()}


def backbone_class(name: str) -> type[Backbone]:
    """The backbone of that name, for example "bagel". Raises ValueError if there is no such backbone."""
    names = backbone_names()
    if name not in names:
        raise ValueError(f"backbone: {name!r} is unknown; there are {', '.join(names)}.")
    return importlib.import_module(f"echo4o.training.backbones.{name}").BACKBONE


def backbone_of(model: str) -> str:
    """The backbone's name for a pipeline folder or Hub repository."""
    return PIPELINES[pipeline_class(model).__name__].split(".")[-2]
