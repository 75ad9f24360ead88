"""The ``echo4o`` command.

Commands import torch, diffusers and datasets when they run, so that ``echo4o --help`` answers at once.
"""

import sys
from typing import Annotated

import typer

from echo4o import __version__
from echo4o.cli import convert, dataset, evaluate, generate, info, precompute, push, quantize, quickstart, serve, train
from echo4o.cli.frame import Command, Group


class _Root(Group):
    """Lists the commands in the order of a workflow. Typer would list groups of commands last."""

    ORDER = (
        "quickstart",
        "info",
        "convert",
        "quantize",
        "generate",
        "chat",
        "serve",
        "dataset",
        "train",
        "export",
        "evaluate",
        "push",
    )

    def list_commands(self, ctx):
        return sorted(super().list_commands(ctx), key=self.ORDER.index)


app = typer.Typer(
    name="echo4o",
    cls=_Root,
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
    """Echo-4o: the dataset, the model, training, evaluation and publishing.

    Example: [bold]echo4o quickstart[/bold] takes a tiny model from data to scored images, in minutes on a CPU.
    Each command shows examples with --help, and prints the next useful command when it ends.
    """


START, USE, MAKE, SHARE = "Start here", "Use a model", "Prepare data and train", "Evaluate and publish"
app.command(rich_help_panel=START)(quickstart.quickstart)
app.command(rich_help_panel=START)(info.info)
app.command(rich_help_panel=USE)(convert.convert)
app.command(rich_help_panel=USE)(quantize.quantize)
app.command(rich_help_panel=USE, cls=Command)(generate.generate)
app.command(rich_help_panel=USE)(generate.chat)
app.command(rich_help_panel=USE)(serve.serve)
dataset.app.command()(precompute.precompute)
app.add_typer(dataset.app, name="dataset", rich_help_panel=MAKE)
app.command(rich_help_panel=MAKE)(train.train)
app.command(rich_help_panel=MAKE)(train.export)
app.add_typer(evaluate.app, name="evaluate", rich_help_panel=SHARE)
app.command(rich_help_panel=SHARE)(push.push)


def main() -> None:
    """Run the command line. ``--debug`` may be anywhere before ``--``."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" in arguments[:end]:
        arguments = ["--debug", *(a for a in arguments[:end] if a != "--debug"), *arguments[end:]]
    app(args=arguments, prog_name="echo4o")
