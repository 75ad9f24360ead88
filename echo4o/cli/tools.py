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
    from echo4o.modeling.bagel import convert as conversion

    function = conversion.convert_to_diffusers if to is Layout.diffusers else conversion.convert_to_original
    function(src, dst)
    say(f"the {to.value} checkpoint:")
    if to is Layout.diffusers:
        finish(dst, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", str(dst)]))
    else:
        finish(dst, shlex.join(["echo4o", "convert", str(dst), f"{dst}-diffusers"]))


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
) -> None:
    """Versions, devices and what is installed.

    Example: [bold]echo4o info --json[/bold]
    """
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
