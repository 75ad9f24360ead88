"""Starts the app as a gradio Space, also on ZeroGPU, where a GPU exists only during a call."""

import json
import os
from pathlib import Path

from echo4o.serving.engine import Engine
from echo4o.serving.limits import Limits
from echo4o.serving.served_model import ServedModel

_SECONDS = 120  # of a GPU that one call may take on ZeroGPU


def launch(settings: Path) -> None:
    """Load the model that a settings file names, and serve the app until the Space stops.

    The address is gradio's: GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, which Spaces set.
    """
    from echo4o.serving.app.page import build_page, launch_options

    values = json.loads(settings.read_text("utf-8"))
    engine = Engine(load_model(values))
    build_page(engine).launch(**launch_options(engine))


def load_model(values: dict) -> ServedModel:
    """The model of a Space with its adapters, on the GPU if there is one."""
    import torch

    from echo4o.pipeline import load_pipeline

    on_zero = on_zero_gpu()
    pipe = load_pipeline(values["model"])
    for adapter in values["adapters"]:
        pipe.load_lora_weights(adapter["source"], adapter_name=adapter["name"])
    pipe.to("cuda" if on_zero or torch.cuda.is_available() else "cpu")
    scales = tuple((adapter["name"], float(adapter["scale"])) for adapter in values["adapters"])
    model = ServedModel(pipe, source=values["model"], adapters=scales, limits=Limits(batch=4, images=4))
    if on_zero:
        use_zero_gpu(model)
    return model


def on_zero_gpu() -> bool:
    """Whether this Space runs on ZeroGPU."""
    return bool(os.environ.get("SPACES_ZERO_GPU"))


def use_zero_gpu(model: ServedModel) -> None:
    """Run every call of the pipeline in the process that ZeroGPU lends a GPU to; there is no progress in between."""
    import spaces  # pyright: ignore[reportMissingImports]  # part of Spaces with ZeroGPU

    @spaces.GPU(duration=_SECONDS)
    def generate(arguments, seeds, adapters):
        return model.call_pipeline(arguments, seeds, adapters)

    model.call = generate
    if model.can_chat:
        chat = model.pipe.chat

        @spaces.GPU(duration=_SECONDS)
        def answer(*args, **kwargs):
            return chat(*args, **kwargs)

        model.call_chat = answer
