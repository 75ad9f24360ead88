"""Which room may import which: arrows point one way, also those of imports inside functions."""

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import echo4o

ROOT = Path(__file__).parents[1]
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
# From top to bottom: a room may import its own layer and every layer below. Modules beside `echo4o/__init__.py`
# count as rooms.
LAYERS = (
    {"__main__", "cli", "serving", "testing"},
    {"pipeline"},
    {"hub", "evaluation", "quickstart"},
    {"planning", "endpoints", "training", "info", "memory"},
    {"dataset_scripts"},
    {"modeling", "model_cards"},
    {"common"},
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Imports that break the rule today, (importing room, imported room). Each one goes; none may be added.
STILL_TO_GO = {}
# Libraries that take long to import.
HEAVY = {"torch", "diffusers", "transformers", "datasets", "numpy", "pyarrow", "matplotlib", "huggingface_hub"}


class Import(NamedTuple):
    """One import statement of a module of the project."""

    module: str
    imported: str
    place: str  # file:line
    lazy: bool  # inside a function


def imports() -> list[Import]:
    """Every import of the project's modules, relative ones resolved."""
    found = []
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            module = ".".join(parts).removesuffix(".__init__")
            parent = ".".join(parts[:-1])
            tree = ast.parse(file.read_text("utf-8"))
            at_top = {id(node) for node in tree.body}
            for node in ast.walk(tree):
                for name in _names(node, parent):
                    found.append(
                        Import(module, name, f"{file.relative_to(ROOT)}:{node.lineno}", id(node) not in at_top)
                    )
    return found


def _names(node: ast.AST, package: str) -> list[str]:
    """The modules that a statement imports; for `from package import name`, name may be a module or not."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [echo4o._EXPORTS.get(a.name, f"echo4o.{a.name}") for a in node.names] if module == "echo4o" else [module]


def room_of(module: str) -> str | None:
    """The room of a module; None for other libraries and for the package's root."""
    parts = module.split(".")
    return parts[1] if parts[0] == "echo4o" and len(parts) > 1 and parts[1] != "__version__" else None


IMPORTS = imports()
BETWEEN_ROOMS = [
    (room_of(i.module), room_of(i.imported), i.place)
    for i in IMPORTS
    if room_of(i.module) and room_of(i.imported) and room_of(i.module) != room_of(i.imported)
]


def test_every_room_has_a_layer():
    rooms = {room for source, target, _ in BETWEEN_ROOMS for room in (source, target)}
    assert rooms <= LAYER_OF.keys(), "name the new room in LAYERS, and in CONTRIBUTING.md"


def test_arrows_point_one_way():
    wrong = [
        f"{place}: {source} imports {target}"
        for source, target, place in BETWEEN_ROOMS
        if LAYER_OF[source] > LAYER_OF[target] and (source, target) not in STILL_TO_GO
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_still_to_go_is_still_there():
    assert STILL_TO_GO.keys() <= {(source, target) for source, target, _ in BETWEEN_ROOMS}, (
        "remove it from STILL_TO_GO"
    )


def test_there_is_no_circle_between_rooms():
    edges = {(source, target) for source, target, _ in BETWEEN_ROOMS} - STILL_TO_GO.keys()
    graph = {}
    for source, target in edges:
        graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_a_circle_would_be_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
    package = "echo4o.modeling.bagel"
    (relative,) = ast.parse("from ..common.x import y").body
    assert _names(relative, package) == ["echo4o.modeling.common.x"]
    (public,) = ast.parse("from echo4o import Echo4oPipeline").body
    assert room_of(_names(public, package)[0]) == "pipeline"
    assert any(i.lazy and room_of(i.imported) == "hub" for i in IMPORTS), "imports inside functions count"


def test_modules_of_training_import_no_circle():
    """Imports inside functions count."""
    graph = {}
    for i in IMPORTS:
        if room_of(i.module) == room_of(i.imported) == "training" and i.imported != i.module:
            graph.setdefault(i.module, set()).add(i.imported)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_module_can_be_imported_first():
    """Importing a module runs the packages above it: they are part of a circle unless they contain the importer."""
    modules = {i.module for i in IMPORTS}
    graph = {}
    for i in IMPORTS:
        parts = i.imported.split(".")
        for target in {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & modules:
            if not i.lazy and not f"{i.module}.".startswith(f"{target}."):
                graph.setdefault(i.module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_the_ground_floor_imports_nothing_heavy_and_nothing_of_ours():
    for i in IMPORTS:
        if room_of(i.module) == "common":
            assert not i.imported.startswith("echo4o") or room_of(i.imported) == "common", i.place
            assert i.lazy or i.imported.split(".")[0] not in HEAVY, i.place
