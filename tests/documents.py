"""The project's documents: their code blocks, and how the ones that are marked are run.

A bash or python block has a mark right above it:

    <!-- test -->                        it is run by the tests
    <!-- test, goes on -->               a python block that uses the variables of the one before
    <!-- not run: needs a GPU -->        it is not, and why

A guide is run from top to bottom in one folder that holds what a reader has at hand: BAGEL-7B-MoT (tiny), Echo-4o-Image
(small), and whatever a line of the guide names, made from these: <!-- tests start with: echo-4o echo-4o-image -->
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKPOINT = ROOT / "tests" / "parity" / "golden" / "checkpoint"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
EXAMPLE = re.compile(r"^<!-- test -->\n```(bash|python)\n(.*?)^```$", re.M | re.S)
_MARKED = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_START = re.compile(r"^<!-- tests start with: (.*) -->$", re.M)


@dataclass
class Block:
    """A fenced block; `line` is where it begins."""

    document: Path
    line: int
    mark: str | None
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        return self.mark in ("test", "test, goes on")

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    return [
        Block(document, text.count("\n", 0, found.start()) + 1, found["mark"], found["language"], found["code"])
        for found in _MARKED.finditer(text)
    ]


def starts_with(document: Path) -> list[str]:
    found = _START.search(document.read_text("utf-8"))
    return found[1].split() if found else []


def prose(document: Path) -> str:
    """A document without its blocks."""
    return BLOCK.sub("", document.read_text("utf-8"))


def commands(code: str) -> list[str]:
    """The commands of a bash block, continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.split(r" && | \| ", line) if part.strip()]


def scripts(document: Path) -> list[tuple[Block, list[str]]]:
    """What to run, with the first block of each. Neighbouring Python blocks share a process: imports are slow."""
    found, neighbours = [], []

    def flush():
        if neighbours:
            code = ""
            for block in neighbours:
                if block.mark == "test":
                    code += "scope = {'__name__': '__main__'}\n"
                code += f"exec(compile({block.code!r}, {str(block)!r}, 'exec'), scope)\n"
            found.append((neighbours[0], [sys.executable, "-c", code]))
            neighbours.clear()

    for block in blocks(document):
        if not block.is_run:
            continue
        if block.language == "python":
            neighbours.append(block)
        else:
            flush()
            found.append((block, ["bash", "-euo", "pipefail", "-c", block.code]))
    flush()
    return found
