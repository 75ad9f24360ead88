"""``echo4o convert``."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say


class CheckpointLayout(StrEnum):
    """The two layouts of a checkpoint."""

    diffusers = "diffusers"
    original = "original"


def convert(
    src: Annotated[Path, typer.Argument(help="The checkpoint folder to read.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    to: Annotated[CheckpointLayout, typer.Option("--to", help="The layout to write.")] = CheckpointLayout.diffusers,
) -> None:
    """Convert a checkpoint of the original release to a diffusers folder, or back. Every tensor is copied bit by bit.

    Example: [bold]echo4o convert BAGEL-7B-MoT echo-4o[/bold]
    Back: [bold]echo4o convert echo-4o original --to original[/bold]
    """
    from echo4o.common.locks import FolderLock
    from echo4o.modeling.pipelines import PIPELINES, class_named, original_class, pipeline_class

    if to is CheckpointLayout.original:
        cls = pipeline_class(src)
    else:
        cls = original_class(src) or class_named(next(iter(PIPELINES)))  # its checks say what the folder lacks
    conversion = cls.conversion()
    function = conversion.convert_to_diffusers if to is CheckpointLayout.diffusers else conversion.convert_to_original
    with FolderLock(dst):
        function(src, dst)
    say(f"the {to.value} checkpoint:")
    if to is CheckpointLayout.diffusers:
        finish(dst, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", str(dst)]))
    else:
        finish(dst, shlex.join(["echo4o", "convert", str(dst), f"{dst}-diffusers"]))
