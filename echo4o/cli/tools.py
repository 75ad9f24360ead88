"""``echo4o quickstart``, ``convert`` and ``info``."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say


class Layout(StrEnum):
    """The two layouts of a checkpoint."""

    diffusers = "diffusers"
    original = "original"


def quickstart(
    out: Annotated[Path, typer.Option(help="The folder for everything that is made.")] = Path("quickstart"),
    short: Annotated[bool, typer.Option("--short", help="A few steps only: shows that everything runs.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data, the training and the pictures.")] = 0,
) -> None:
    """From data to pictures on a CPU: render a small dataset, fine-tune a tiny model, draw, score.

    Example: [bold]echo4o quickstart --out quickstart[/bold]
    """
    from echo4o.quickstart.run import run

    # It prints the scores, the place of the report and the next command itself.
    run(out=out, short=short, seed=seed)


def convert(
    src: Annotated[Path, typer.Argument(help="The checkpoint folder to read.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    to: Annotated[Layout, typer.Option("--to", help="The layout to write.")] = Layout.diffusers,
) -> None:
    """Convert a checkpoint of the original release to a diffusers folder, or back, bit by bit.

    Example: [bold]echo4o convert BAGEL-7B-MoT echo-4o[/bold]
    Back: [bold]echo4o convert echo-4o original --to original[/bold]
    """
    from echo4o.modeling.pipelines import PIPELINES, class_named, original_class, pipeline_class

    if to is Layout.original:
        cls = pipeline_class(src)
    else:
        cls = original_class(src) or class_named(next(iter(PIPELINES)))  # its checks say what the folder lacks
    conversion = cls.conversion()
    function = conversion.convert_to_diffusers if to is Layout.diffusers else conversion.convert_to_original
    function(src, dst)
    say(f"the {to.value} checkpoint:")
    if to is Layout.diffusers:
        finish(dst, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", str(dst)]))
    else:
        finish(dst, shlex.join(["echo4o", "convert", str(dst), f"{dst}-diffusers"]))


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="With --plan: a pipeline folder, a Hub repository, or `release`.", show_default=False),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="What the model needs to draw, and what fits.")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="With --plan: the GPU's memory.", show_default="this machine's")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Of the picture.", show_default="the largest")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the picture.", show_default="the largest")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    references: Annotated[int, typer.Option(min=0, help="Reference pictures of each prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
) -> None:
    """Versions, devices and what is installed; with --plan, what a model needs before it is loaded.

    Example: [bold]echo4o info --json[/bold]
    Memory: [bold]echo4o info MODEL --plan --gpu 24GB[/bold]
    """
    if plan:
        _print_plan(model, gpu, height, width, batch, references, as_json)
        return
    if model is not None:
        raise ValueError(f"info {model}: say --plan for what this model needs; without a model, info tells versions")
    from echo4o.info import collect

    facts = collect()
    if as_json:
        import json

        print(json.dumps(facts, indent=2))
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
        raise ValueError("info --plan: name the model, or `release` for the released BAGEL's sizes")
    from echo4o.info import gpu_bytes
    from echo4o.planning import generation_memory as memory
    from echo4o.training.backbones.base import ImageCall

    size = gpu_bytes(gpu)
    call = ImageCall(height, width, batch, references)
    plan = memory.make_plan(memory.read_stored(model), size, call)
    print(memory.as_json(plan) if as_json else memory.as_text(plan))
    if plan.recommended is None:  # as `train --plan`: scripts see it, too
        finish(None, "echo4o info --help")
        raise typer.Exit(1)
    command = (
        ["generate", "a lighthouse made of glass", "--model", model] if model != "release" else ["info", "--help"]
    )
    finish(None, shlex.join(["echo4o", *command]))
