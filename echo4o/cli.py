"""The ``echo4o`` command (first form: the frame that the commands are added to)."""

import typer

app = typer.Typer(name="echo4o", no_args_is_help=True, help="Echo-4o: dataset, model, training, evaluation.")


@app.callback()
def root() -> None:
    """Echo-4o: dataset, model, training, evaluation."""


def main() -> None:
    """Run the command line."""
    app()
