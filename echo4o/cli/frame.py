"""Shared by all commands: error messages, renamed options, and the last lines of a command."""

import errno
import sys
import traceback
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

MISTAKE = 2
INTERRUPTED = 130
# Option of 0.1 -> its name now, for commands of the class `Command`.
RENAMED_OPTIONS = {
    "--guidance": "--guidance-scale",
    "--image-guidance": "--image-guidance-scale",
    "--pictures": "--num-images",
}
# Errors of these libraries concern files, networks and templates, not this package. Named, because importing them is slow.
EXTERNAL_LIBRARIES = {
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
    """Runs a command, and prints a user error as one line on stderr (exit code 2) instead of a traceback.

    User errors are ``ValueError``, ``OSError``, errors of the libraries in ``EXTERNAL_LIBRARIES``, a missing optional
    module, and insufficient memory. Any other exception is a bug and keeps its traceback.
    """

    def main(self, *args, **options):
        try:
            return super().main(*args, **options)
        except OSError as error:  # before a command runs: --help and --version with a full disk
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


class Command(TyperCommand):
    """A command that accepts the option names of 0.1, with a warning."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, [_current_name(arg) for arg in args])


def _current_name(argument: str) -> str:
    old, equals, value = argument.partition("=")
    if old not in RENAMED_OPTIONS:
        return argument
    say(f"warning: {old} is now called {RENAMED_OPTIONS[old]}; the old name works until 0.3")
    return f"{RENAMED_OPTIONS[old]}{equals}{value}"


def explain(error: Exception) -> str | None:
    """The message for a user error, or None if the error is a bug."""
    if isinstance(error, ImportError):
        # A name that this package fails to import is a bug; a distribution that is not installed is a user error.
        missing = (error.name or "").split(".")[0]
        if not isinstance(error, ModuleNotFoundError) or missing in ("", "echo4o"):
            return None
        return f"the Python module '{missing}' is not installed: pip install {missing}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; named, because importing torch is slow
        return f"out of memory: {error}\ntry a smaller image (--height, --width), fewer images, or --device cpu"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    library = type(error).__module__.partition(".")[0]
    if library == "safetensors":
        return f"the weights cannot be read: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"a text file is not UTF-8: {error}"
    if isinstance(error, OSError):
        # The reader closed the pipe (`echo4o info | head`): click ends the command silently.
        if error.errno == errno.EPIPE:
            return None
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}"
    elif not isinstance(error, ValueError) and library not in EXTERNAL_LIBRARIES:
        return None
    return str(error).strip() or type(error).__name__


def say_error(message: str, label: str = "error: ") -> None:
    """Print one red message on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"{label}{message}", style="bold red"))


def say(text: str) -> None:
    """Print a line on stderr. stdout contains results only."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style="dim"))


def finish(results: list[Path] | Path | None, next_command: str) -> None:
    """End a command: print the paths of its results (stdout) and the next useful command (stderr)."""
    if results is not None:
        for path in [results] if isinstance(results, Path) else results:
            print(path)
    print(end="", flush=True)  # reports a full disk before the last line
    say(f"next: {next_command}")
