"""Every command of the tree: its help, its examples, and that wrong options are told in a sentence."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.core import TyperGroup
from typer.testing import CliRunner

from echo4o.cli import app
from tests.commands import arguments_of, parse, tree

TREE = dict(tree())
LEAVES = {path: command for path, command in TREE.items() if not isinstance(command, TyperGroup)}


def name(path) -> str:
    return " ".join(("echo4o", *path))


def examples(command) -> list[str]:
    return re.findall(r"\[bold\](.*?)\[/bold\]", command.help, re.S)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("path", TREE, ids=name)
def test_help_says_what_it_does_and_shows_an_example(path):
    command = TREE[path]
    assert re.match(r"[A-Z].*[.?]$", command.help.splitlines()[0]), "the first line is a sentence"
    assert "Example: [bold]" in command.help
    result = run(*path, "--help")
    assert result.exit_code == 0 and "Example: " in result.output
    assert "[bold]" not in result.output


@pytest.mark.parametrize("path", TREE, ids=name)
def test_examples_would_run_this_command(path):
    for example in examples(TREE[path]):
        arguments = arguments_of(example)
        if arguments is None:
            assert "-m echo4o." in example, f"{example!r} calls nothing of ours"
        elif "--help" not in arguments and "..." not in arguments:
            assert parse(arguments)[: len(path)] == path, example


@pytest.mark.parametrize("path", LEAVES, ids=name)
def test_every_option_says_what_it_is(path):
    for parameter in LEAVES[path].params:
        assert getattr(parameter, "help", None), f"{parameter.name} of {name(path)}"


def test_the_root_lists_every_command_in_a_panel():
    root = TREE[()]
    assert set(root.list_commands(None)) == set(root.commands)
    assert all(command.rich_help_panel for command in root.commands.values())


def test_options_of_evaluate_are_the_same_in_every_step():
    whole = {parameter.name: parameter for parameter in LEAVES["evaluate", "run"].params}
    for step in ("generate", "judge", "score"):
        for parameter in LEAVES["evaluate", step].params:
            if parameter.name not in ("benchmark", "model"):
                same = whole[parameter.name]
                assert (parameter.opts, parameter.default, parameter.help) == (same.opts, same.default, same.help)
    assert not any(parameter.rich_help_panel for parameter in LEAVES["chat",].params), "its panels stay its own"


@pytest.mark.parametrize("path", LEAVES, ids=name)
def test_wrong_options_are_reported(path):
    command = LEAVES[path]
    wrong = [["--no-such-option"]]
    for parameter in command.params:
        of = parameter.type_descriptor
        if parameter.opts[-1].startswith("--") and (of.is_choice or of.annotation in (int, float, int | None)):
            wrong.append([parameter.opts[-1], "nonsense"])
    if any(parameter.required for parameter in command.params):
        wrong.append([])
    for arguments in wrong:
        result = run(*path, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert "Usage: " + name(path).split()[0] in result.stderr and "Error" in result.stderr
        assert "Traceback" not in result.output
        if arguments:
            assert arguments[0] in result.stderr


@pytest.mark.parametrize("path", [path for path in TREE if path], ids=name)
def test_a_typing_error_is_reported(path):
    result = run(*path[:-1], path[-1] + "x", "--no-such-option")
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.long
def test_output_that_is_closed_early_is_not_an_error():
    for arguments in (["--help"], ["info", "--json"], ["evaluate", "run", "--help"]):
        command = subprocess.Popen(
            [sys.executable, "-m", "echo4o", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        command.stdout.close()  # as `| head` does
        errors = command.stderr.read()
        command.wait(60)
        assert "Traceback" not in errors and "rror" not in errors, errors


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "--json"]])
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "echo4o", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: [Errno 28] No space left on device"
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.long  # it imports everything
def test_ctrl_c_is_one_word(tmp_path):
    """A real signal, while the quickstart renders."""
    command = subprocess.Popen(
        [sys.executable, "-m", "echo4o", "quickstart", "--short", "--out", str(tmp_path / "q")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "q").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    errors = command.communicate(timeout=120)[1]
    assert command.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
