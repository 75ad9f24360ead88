"""What all commands share: how a mistake is told, and how a command ends."""

import errno
import sys
import traceback
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

MISTAKE = 2
INTERRUPTED = 130
# Whatever these say, they say about files, networks and templates, not about our code. By name: importing them would
# slow every command down.
OUTSIDE = {
    "datasets",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "openai",
    "safetensors",
    "tarfile",
    "yaml",
    "zipfile",
}


class Group(TyperGroup):
    """Runs a command and turns a user's mistake into one line on stderr (exit code 2) instead of a traceback.

    A mistake is whatever the package, the system or the network refuses: ``ValueError``, ``OSError``, errors of the
    libraries in ``OUTSIDE``, a missing optional module, memory that does not suffice. Anything else is a bug of ours
    and keeps its traceback.
    """

    def main(self, *args, **options):
        try:
            return super().main(*args, **options)
        except OSError as error:  # before a command ran: --help and --version into a full disk
            say_error(explain(error) or str(error))
            sys.exit(MISTAKE)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say_error("interrupted", label="")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            say_error(message)
            raise typer.Exit(MISTAKE) from None


def explain(error: Exception) -> str | None:
    """The sentence that tells a user what went wrong, or None when the error is no user's mistake."""
    if isinstance(error, ImportError):
        # A name that our own code fails to find is a bug; a distribution that is not installed is not.
        missing = (error.name or "").split(".")[0]
        if not isinstance(error, ModuleNotFoundError) or missing in ("", "echo4o"):
            return None
        return f"the Python module '{missing}' is not installed: pip install {missing}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name for the same reason
        return f"out of memory: {error}\ntry a smaller picture (--height, --width), fewer pictures, or --device cpu"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    library = type(error).__module__.partition(".")[0]
    if library == "safetensors":
        return f"the weights cannot be read: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"a text file was expected, and one is no UTF-8: {error}"
    if isinstance(error, OSError):
        # The output was closed early (`echo4o info | head`): the command line's frame ends quietly.
        if error.errno == errno.EPIPE:
            return None
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}"
    elif not isinstance(error, ValueError) and library not in OUTSIDE:
        return None
    return str(error).strip() or type(error).__name__


def say_error(message: str, label: str = "error: ") -> None:
    """Print one red message on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"{label}{message}", style="bold red"))


def say(text: str) -> None:
    """Print a line for the person at the terminal on stderr, so that stdout holds results only."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style="dim"))


def finish(results: list[Path] | Path | None, next_command: str) -> None:
    """End a command: where its results are (stdout) and the next useful command (stderr)."""
    if results is not None:
        for path in [results] if isinstance(results, Path) else results:
            print(path)
    print(end="", flush=True)  # a full disk is told here, not behind the last line
    say(f"next: {next_command}")
