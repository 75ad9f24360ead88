"""Pipeline classes by the `_class_name` of their model_index.json."""

import importlib
import json
from pathlib import Path

from huggingface_hub import hf_hub_download

PIPELINES = {"Echo4oPipeline": "echo4o.modeling.bagel.pipeline_echo4o"}


def pipeline_class(model: str) -> type:
    """The class of a pipeline folder or Hub repository."""
    file = Path(model, "model_index.json") if Path(model).is_dir() else hf_hub_download(model, "model_index.json")
    name = json.loads(Path(file).read_text("utf-8"))["_class_name"]
    name = name if isinstance(name, str) else name[-1]
    return getattr(importlib.import_module(PIPELINES[name]), name)
