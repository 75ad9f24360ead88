"""The tree of commands, and whether a command line that somebody wrote down would be understood."""

import re
import shlex
from collections.abc import Iterator

import typer
from typer.core import TyperGroup

from echo4o.cli import app

# What may stand before the command on a line: a variable, a launcher, an interpreter.
_COMMAND = re.compile(
    r"^(?:\w+=\S*\s+)*(?:accelerate launch\b.*?\s-m\s+|python3? -m )?(?:\S*/)?echo4o(?=\s|$)(.*)$", re.S
)


def tree() -> Iterator[tuple[tuple[str, ...], object]]:
    """Every command and group of commands with its path, the root first with an empty one."""

    def below(path, command):
        yield path, command
        if isinstance(command, TyperGroup):
            for name, inner in command.commands.items():
                yield from below((*path, name), inner)

    return below((), typer.main.get_command(app))


def arguments_of(line: str) -> list[str] | None:
    """What follows `echo4o` on a line of a shell, or None where the line calls something else."""
    found = _COMMAND.match(line.strip())
    return None if found is None else shlex.split(found[1], comments=True)


def parse(arguments: list[str]) -> tuple[str, ...]:
    """Which command would run; typer's UsageError or Exit (--help, --version) when none would."""
    command, context, path = typer.main.get_command(app), None, ()
    name = "echo4o"
    arguments = [argument for argument in arguments if argument != "--debug"]
    while True:
        context = command.make_context(name, arguments, parent=context)
        if not isinstance(command, TyperGroup):
            return path
        rest = [*context._protected_args, *context.args]
        if not rest:
            context.fail("Missing command.")
        name, command, arguments = command.resolve_command(context, rest)
        path = (*path, name)
