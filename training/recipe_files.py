"""Recipes as YAML: bundled ones, changes from the command line, errors that name every wrong setting."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from echo4o.common import configuration
from echo4o.training.backbones import backbone_class
from echo4o.training.recipe import RecipeError, Section, TrainingRecipe

# What speaks against other adapters of PEFT, in diffusers 0.42 and PEFT 0.21
UNSUPPORTED_ADAPTERS = {
    "lokr": "diffusers loads LoKr files, but merges, scales and hotswaps LoRA only, and stores no LoKr configuration.",
    "loha": "diffusers has no loader for LoHa files.",
}


def load_recipe(path: str | Path, changes: dict | None = None) -> TrainingRecipe:
    """Read a YAML recipe. Relative paths in it are relative to the working folder.

    Args:
        path: a file, or the name of a bundled recipe (`lora_single_gpu`).
        changes: settings that replace the file's, by dotted name: `{"optimizer.lr": 1e-4}`.

    Raises:
        RecipeError: the file is unreadable or a setting is unknown or impossible; the message lists all of them.
    """
    file = bundled_recipe(str(path)) if str(path) in bundled_names() and not Path(path).exists() else Path(path)
    try:
        values = yaml.safe_load(file.read_text("utf-8-sig"))
    except (OSError, yaml.YAMLError) as error:
        names = ", ".join(bundled_names())
        raise RecipeError(f"{path} cannot be read: {error} (bundled recipes: {names})") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a mapping of settings.")
    _rename_old_keys(values, str(path), warn=True)
    changes = dict(changes or {})
    _rename_old_keys(changes, "--set", warn=True)
    for name, value in changes.items():
        _set(values, name, value)
    try:
        return _recipe_class(values).model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{describe(error, _recipe_class(values))}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def read_recipe(values: dict, changes: dict | None = None) -> TrainingRecipe:
    """The recipe that a checkpoint stored, as the class of its backbone; keys of 0.1 are accepted.

    Args:
        changes: settings that replace others, by dotted name.
    """
    values = dict(values)
    _rename_old_keys(values, "checkpoint", warn=False)
    for name, value in (changes or {}).items():
        _set(values, name, value)
    return _recipe_class(values).model_validate(values)


def _recipe_class(values: dict) -> type[TrainingRecipe]:
    return backbone_class(values.get("backbone", "bagel")).recipe_class


_OLD_KEYS = {"pictures": "images"}  # of 0.1


def _rename_old_keys(values: dict, where: str, warn: bool) -> None:
    for name in list(values):
        section, dot, rest = name.partition(".")
        if section in _OLD_KEYS:
            new = _OLD_KEYS[section]
            values[new + dot + rest] = values.pop(name)
            if warn:
                text = f"{where}: the setting `{section}` is now called `{new}`; the old name works until 0.3."
                warnings.warn(text, FutureWarning, stacklevel=3)


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """`["optimizer.lr=1e-5", ...]` -> {"optimizer.lr": 1e-05}; values are YAML."""
    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RecipeError(f"--set {pair}: write section.key=value, for example optimizer.lr=1e-5.")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {pair}: {value!r} is not a YAML value.") from error
    return changes


def _set(values: dict, name: str, value: Any) -> None:
    *parents, key = name.split(".")
    section: Any = values
    for depth, parent in enumerate([*parents, None]):
        if isinstance(section, list) and (parent or key).isdigit():
            if int(parent or key) >= len(section):
                raise RecipeError(f"--set {name}: there is no entry {parent or key}, only {len(section)}.")
            place: Any = int(parent or key)
        elif isinstance(section, dict):
            place = parent or key
        else:
            raise RecipeError(f"--set {name}: {'.'.join(parents[:depth])} is {section!r} and has no settings inside.")
        if parent is None:
            section[place] = value
        else:
            if isinstance(section, dict) and section.get(place) is None:
                section[place] = {}
            section = section[place]


def dump_recipe(recipe: TrainingRecipe) -> str:
    """The resolved recipe as YAML, every default written out; it loads again as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def describe(error: ValidationError, recipe_class: type[Section]) -> str:
    """One line per wrong setting, as `key: what is wrong (given: value)`."""
    method = next((item for item in error.errors() if item["type"].startswith("union_tag")), None)
    if method is not None:
        given = str(method["input"].get("method") if isinstance(method["input"], dict) else method["input"]).lower()
        if given in UNSUPPORTED_ADAPTERS:
            return f"  tune.method: {given} is not available: {UNSUPPORTED_ADAPTERS[given]} Use `method: lora`."
        return f"  tune: set `method: full` or `method: lora` (given: {method['input']!r})"
    return configuration.describe(
        error, key_of=_key_of, known_keys=lambda location: _section_at(recipe_class, location[:-1]).model_fields
    )


def _key_of(location: tuple) -> str:
    """The dotted key; the chosen member of the union `tune` is part of the location, but not of the key."""
    return ".".join(str(p) for i, p in enumerate(location) if not (i == 1 and location[0] == "tune"))


def _section_at(recipe_class: type[Section], location: tuple) -> type[Section]:
    """The section class that a pydantic error location points into."""
    section = recipe_class
    for part in location:
        if not isinstance(part, str) or part not in section.model_fields:
            continue  # an index, or the tag of a union
        classes = [c for c in _classes_in(section.model_fields[part].annotation) if issubclass(c, Section)]
        tagged = (
            [c for c in classes if location[-1] in get_args(c.model_fields["method"].annotation)]
            if len(classes) > 1
            else classes
        )
        section = (tagged or classes or [section])[0]
    return section


def _classes_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in _classes_in(part)]


def bundled_names() -> list[str]:
    """Names of the recipes that the package contains."""
    return sorted(file.stem for file in (Path(__file__).parent / "recipes").glob("*.yaml"))


def bundled_recipe(name: str) -> Path:
    """The file of a bundled recipe."""
    return Path(__file__).parent / "recipes" / f"{name}.yaml"
