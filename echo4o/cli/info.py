"""``echo4o info``."""

import shlex
from typing import Annotated

import typer

from echo4o.cli.frame import finish
from echo4o.common import strict_json


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="With --plan: a pipeline folder, a Hub repository, `release` (BAGEL) or `release:NAME`, for example `release:omnigen2`.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the memory that generation needs, and the options that fit.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="With --plan: memory of the GPU, for example 24GB.", show_default="this machine's"),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="With --plan: image height in pixels.", show_default="the largest")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="With --plan: image width in pixels.", show_default="the largest")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --plan: prompts per call.")] = 1,
    references: Annotated[
        int | None,
        typer.Option(min=0, help="With --plan: reference images per prompt.", show_default="1 if the model takes any"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
) -> None:
    """Show versions, devices and installed libraries; with --plan, the memory that a model needs.

    Example: [bold]echo4o info --json[/bold]
    Memory: [bold]echo4o info MODEL --plan --gpu 24GB[/bold]
    """
    if plan:
        _print_plan(model, gpu, height, width, batch, references, as_json)
        return
    if model is not None:
        raise ValueError(f"info {model}: add --plan to see what this model needs, or omit the model to see versions")
    from echo4o.info import collect

    facts = collect()
    if as_json:
        print(strict_json.dumps(facts, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("what", "value", show_header=False, box=None)
        for section, values in facts.items():
            table.add_row(f"[bold]{section}[/bold]", "")
            for name, value in values.items():
                table.add_row(f"  {name}", str(value) if value is not None else "[dim]not installed[/dim]")
        Console().print(table)
    finish(None, "echo4o quickstart")


def _print_plan(model, gpu, height, width, batch, references, as_json) -> None:
    if model is None:
        raise ValueError("info --plan: pass a model, or `release` for the sizes of the released BAGEL")
    from echo4o.info import gpu_bytes
    from echo4o.planning import generation_memory as memory
    from echo4o.training.backbones.base import ImageCall

    size = gpu_bytes(gpu)
    stored = memory.read_stored(model)
    if references is None:
        references = int(stored.backbone.takes_references)
    plan = memory.make_plan(stored, size, ImageCall(height, width, batch, references))
    print(memory.as_json(plan) if as_json else memory.as_text(plan))
    if plan.recommended is None:  # a nonzero exit code, as in `train --plan`
        finish(None, "echo4o info --help")
        raise typer.Exit(1)
    command = (
        ["info", "--help"]
        if model.partition(":")[0] == "release"
        else ["generate", "a lighthouse made of glass", "--model", model]
    )
    finish(None, shlex.join(["echo4o", *command]))
