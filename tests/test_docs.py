"""README and guides: every example is run or says why not, every command would be understood, every link leads somewhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from echo4o.cli import app
from echo4o.testing.hub import LoopbackHub
from echo4o.testing.openai_server import API_KEY, OpenAIServer
from echo4o.training.recipe_files import bundled_names, load_recipe, parse_changes
from tests.commands import arguments_of, parse
from tests.dataset_scripts.layout import small_release
from tests.documents import BLOCK, CHECKPOINT, DOCUMENTS, ROOT, blocks, commands, prose, scripts, starts_with

NEED_MARKS = ("bash", "python")
# Guides whose marked blocks a test of their own runs, with a world of its own.
RUN_ELSEWHERE = {
    "synthesis.md": "tests/dataset_scripts/synthesis/test_guide.py",
    "publishing.md": "tests/test_push_published.py",
    "adapters.md": "tests/modeling/test_guides.py",
    "memory.md": "tests/modeling/test_guides.py",
}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)


@every_document
def test_every_example_is_run_or_says_why_not(document):
    for block in blocks(document):
        if block.language in NEED_MARKS:
            says_why = re.fullmatch(r"not run: \w.{5,}", block.mark or "")
            assert block.is_run or says_why, f"{block} needs a mark; see tests/documents.py"
        assert block.language in (*NEED_MARKS, "yaml", "json", "mermaid", "text", ""), f"{block}: {block.language}"


def test_marks_stand_right_above_blocks():
    for document in DOCUMENTS:
        marks = re.findall(r"^<!-- (?:test|not run).*$", document.read_text("utf-8"), re.M)
        marks = [mark for mark in marks if not mark.startswith("<!-- tests start")]
        assert len(marks) == sum(block.mark is not None for block in blocks(document)), named(document)


def _lines() -> list:
    found = []
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language == "bash":
                found += [pytest.param(line, id=f"{block} {line[:60]}") for line in commands(block.code)]
    return found


@pytest.mark.parametrize("line", _lines())
def test_commands_would_be_understood(line):
    """Also of examples that are not run: commands and options exist, recipes take their settings."""
    if (arguments := arguments_of(line)) is not None:
        try:
            parse(arguments)
        except typer.Exit:
            pass  # --help, --version
    if module := re.search(r"(?:^|\s)-m (echo4o[\w.]+|benchmarks)\b(?: (\w+))?", line):
        assert importlib.util.find_spec(module[1]), f"there is no module {module[1]}"
        if module[1] == "benchmarks" and module[2]:
            assert (ROOT / "benchmarks" / f"bench_{module[2]}.py").is_file(), line
    if made := re.match(r"make ([a-z-]+)", line):
        assert re.search(rf"^{made[1]}:.*##", (ROOT / "Makefile").read_text("utf-8"), re.M), line
    if recipe := re.search(r"\b(?:echo4o|training\.)\s?train (\w+)", line):
        if recipe[1] in bundled_names():
            load_recipe(recipe[1], parse_changes(re.findall(r"--set (\S+)", line)))
    for file in re.findall(r"(?:^|\s)((?:training|docs|tests|benchmarks)/[\w./-]+)", line):
        assert (ROOT / file).exists(), file


@every_document
def test_commands_within_sentences_exist(document):
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        arguments = arguments_of(code)
        if arguments is None:
            continue
        command, context, options = typer.main.get_command(app), None, set()
        while isinstance(command, TyperGroup):
            context = command.make_context(command.name, [], parent=context, resilient_parsing=True)
            options |= {name for parameter in command.params for name in parameter.opts}
            words = [word for word in arguments if not word.startswith("-")]
            if not words:
                break
            name, command, _ = command.resolve_command(context, words)
            arguments = arguments[arguments.index(words[0]) + 1 :] if name == words[0] else arguments
        options |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.partition("=")[0] in {*options, "--help", "--debug"}, f"{named(document)}: {code}"


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(document), re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


@every_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose(document)):
        place, _, anchor = target.partition("#")
        file = (document.parent / place).resolve() if place else document
        assert file.exists() and file.is_relative_to(ROOT), f"{named(document)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{named(document)} links to {target}; there are {sorted(anchors(file))}"


def test_every_guide_is_listed_once_in_the_index_the_readme_and_the_site():
    index, readme, site = ((ROOT / name).read_text("utf-8") for name in ("docs/README.md", "README.md", "mkdocs.yml"))
    listed = readme[readme.index("\nGuides: ") :]
    for guide in (ROOT / "docs").glob("*.md"):
        if guide.name != "README.md":
            assert len(re.findall(rf"^.*\]\({guide.name}\).*$", index, re.M)) == 1, guide.name
            assert listed.count(f"](docs/{guide.name})") == 1, guide.name
            assert len(re.findall(rf": docs/{guide.name}$", site, re.M)) == 1, guide.name


def test_troubleshooting_answers_every_row_with_a_link():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    answers = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(answers) >= 20
    for answer in answers:
        assert re.search(r"\]\([\w./#-]+\)", answer), f"{answer.splitlines()[0]!r} links to no guide"


def _echo_4o(folder: Path) -> None:
    from echo4o.modeling.bagel.convert import convert_to_diffusers

    convert_to_diffusers(folder / "BAGEL-7B-MoT", folder / "echo-4o")


def _echo_4o_image(folder: Path) -> None:
    from echo4o.dataset_scripts.build import build

    build(str(folder / "Echo-4o-Image"), folder / "echo-4o-image")


PREPARED = {"echo-4o": _echo_4o, "echo-4o-image": _echo_4o_image}
RUN_HERE = [d for d in DOCUMENTS if d.name not in RUN_ELSEWHERE and any(block.is_run for block in blocks(d))]


def _with_its_length(document: Path):
    """The README's examples run with every change, the guides' with `make test-long`."""
    marks = [] if document == ROOT / "README.md" else [pytest.mark.long]
    return pytest.param(document, id=named(document), marks=marks)


# Processes that import torch and diffusers: on a machine busy with other work that takes minutes.
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", [_with_its_length(document) for document in RUN_HERE])
def test_examples_run(document, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(CHECKPOINT, folder / "BAGEL-7B-MoT")
    small_release(folder / "Echo-4o-Image")
    for name in starts_with(document):
        PREPARED[name](folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with OpenAIServer() as judge, LoopbackHub(user="owner") as hub:
        # The model is tiny: more threads would only wait for each other.
        environment = hub.environment(tmp_path / "home") | {"PATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {"OPENAI_BASE_URL": judge.url, "OPENAI_API_KEY": API_KEY}
        for block, script in scripts(document):
            done = subprocess.run(
                script, cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
            )
            told = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            assert done.returncode == 0, f"{block}\n{block.code}\n{told}"


def test_there_is_something_to_run():
    assert BLOCK.search((ROOT / "README.md").read_text("utf-8")) and len(RUN_HERE) >= 6
