"""The ``echo4o`` command.

Nothing here imports torch, diffusers or datasets before a command needs them: ``echo4o --help`` must answer at once.
"""

import sys
from typing import Annotated

import typer

from echo4o import __version__
from echo4o.cli import dataset, evaluate, pictures, precompute, tools, train
from echo4o.cli.frame import Group

app = typer.Typer(
    name="echo4o",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"echo4o {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Echo-4o: the dataset, the model, training and evaluation.

    Start with [bold]echo4o quickstart[/bold]; each command shows an example in its --help.
    """


app.command()(tools.quickstart)
app.command()(pictures.generate)
app.command()(pictures.chat)
app.command()(train.train)
app.command()(train.export)
app.add_typer(evaluate.app, name="evaluate")
dataset.app.command()(precompute.precompute)
app.add_typer(dataset.app, name="dataset")
app.command()(tools.convert)
app.command()(tools.info)


def main() -> None:
    """Run the command line; ``--debug`` may stand anywhere before ``--``."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" in arguments[:end]:
        arguments = ["--debug", *(a for a in arguments[:end] if a != "--debug"), *arguments[end:]]
    app(args=arguments, prog_name="echo4o")
