"""``echo4o quantize``: a pipeline with a quantized transformer, saved."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say
from echo4o.cli.models import check_model, class_of


class Method(StrEnum):
    """Quantization methods whose weights can be saved in safetensors."""

    int8 = "int8"
    nf4 = "nf4"


def quantize(
    source: Annotated[str, typer.Argument(help="A pipeline folder or a Hub repository.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must be new.", show_default=False)],
    method: Annotated[
        Method, typer.Option(help="int8: torchao, weights only, runs everywhere. nf4: bitsandbytes, needs a GPU.")
    ] = Method.int8,
) -> None:
    """Save a pipeline with the weights of its transformer in fewer bits. Images change a little.

    The projections in and out, the time embedding, norms and embeddings stay in full precision. The folder loads as
    any other, and is compared with the weights in memory before it is moved into place.

    Example: [bold]echo4o quantize DIR DIR-int8 --method int8[/bold]
    """
    check_model(source)
    cls = class_of(source)
    if cls.is_original(source):
        raise ValueError(f"{source} has the original layout; convert it first: echo4o convert {source} DST")
    from echo4o.modeling.common.quantization import METHODS, quantize_pipeline

    facts = quantize_pipeline(cls, source, target, METHODS[method.value])
    say(f"transformer: {facts['bytes'] / 1e6:,.1f} MB with {facts['library']}; the pipeline:")
    finish(target, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", str(target)]))
