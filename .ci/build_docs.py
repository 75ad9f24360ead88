"""Build the documentation site into build/site, strictly: a broken link or an unlisted page fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "docs-source"
COPIED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "LICENSE",
    "docs/*.md",
    "docs/images/*",
    "examples/*",
)
API = {
    "Pipelines and models": ["echo4o.pipeline", "echo4o.modeling.pipelines"],
    "Dataset": [
        "echo4o.dataset_scripts.builder",
        "echo4o.dataset_scripts.loading",
        "echo4o.dataset_scripts.bare_name",
    ],
    "Training": ["echo4o.training.recipe", "echo4o.training.backbones.base"],
    "Evaluation": ["echo4o.evaluation.run", "echo4o.evaluation.score", "echo4o.evaluation.compare"],
    "Planning": ["echo4o.planning.training_memory", "echo4o.planning.generation_memory"],
    "Testing": ["echo4o.testing.openai_server", "echo4o.testing.hub"],
}


def stage() -> None:
    """Copy the pages and what they link to into SOURCE, and write the reference pages."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    files = [path for pattern in COPIED for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    for page in [path for path in files if path.suffix == ".md"]:
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked.is_file() and linked not in files and linked.is_relative_to(ROOT):
                files.append(linked)
    for path in files:
        copy = SOURCE / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    reference = SOURCE / "docs" / "reference"
    reference.mkdir(parents=True)
    lines = ["# Python API", ""]
    for title, modules in API.items():
        lines += [f"## {title}", ""] + [line for module in modules for line in (f"::: {module}", "")]
    (reference / "python.md").write_text("\n".join(lines))
    (reference / "commands.md").write_text("\n".join(["# Command line", "", *command_pages()]))


def command_pages() -> list[str]:
    """The help of every command, as text."""
    from typer.main import get_command

    from echo4o.cli import app

    pages: list[str] = []

    def visit(command, path: list[str]) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                visit(child, [*path, name])
            return
        done = subprocess.run(
            [sys.executable, "-m", "echo4o", *path, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PATH": "/usr/bin:/bin"},
        )
        pages.extend([f"## echo4o {' '.join(path)}", "", "```text", done.stdout.strip(), "```", ""])

    visit(get_command(app), [])
    return pages


if __name__ == "__main__":
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml")]
    sys.exit(subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode)
