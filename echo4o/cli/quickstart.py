"""``echo4o quickstart``."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[Path, typer.Option(help="The folder for all results.")] = Path("quickstart"),
    short: Annotated[
        bool, typer.Option("--short", help="Run a few steps only, to check that everything works.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data, the training and the images.")] = 0,
) -> None:
    """Run the whole workflow on a CPU: render a small dataset, fine-tune a tiny model, generate and score images.

    Example: [bold]echo4o quickstart --out quickstart[/bold]
    """
    from echo4o.quickstart.run import run

    # `run` prints the scores, the path of the report and the next command.
    run(out=out, short=short, seed=seed)
