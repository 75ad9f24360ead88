"""Reads a golden directory, of whatever form, and remembers what was looked at, so that nothing in it can go unchecked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from .report import Check


class Record:
    """A JSON object that knows which of its fields were read.

    Objects inside it, also in lists, are records as well. A field that is a plain text needs no check of its own
    (notes, descriptions); texts that matter are compared where they are read.
    """

    def __init__(self, fields: dict[str, Any]):
        self._fields = {key: self._wrap(value) for key, value in fields.items()}
        self._unread = set(fields)

    @classmethod
    def _wrap(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return cls(value)
        if isinstance(value, list) and any(isinstance(x, dict) for x in value):
            return [cls._wrap(x) for x in value]
        return value

    def __getitem__(self, key: str) -> Any:
        value = self._fields[key]
        self._unread.discard(key)
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __len__(self) -> int:
        return len(self._fields)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def items(self) -> Iterator[tuple[str, Any]]:
        for key in self:
            yield key, self[key]

    def plain(self) -> dict[str, Any]:
        """The whole object as it is in the file, all of it read."""
        return {key: _plain(value) for key, value in self.items()}

    def note(self, *keys: str) -> None:
        """Pass over fields that describe how the file was made and hold nothing to compare."""
        for key in keys:
            _plain(self.get(key))

    def unread(self) -> Iterator[str]:
        """Dotted names of the fields that nobody looked at."""
        for key, value in self._fields.items():
            if key in self._unread:
                if not isinstance(value, str):
                    yield key
            else:
                yield from (f"{key}.{name}" for name in _unread(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.plain()
    return [_plain(x) for x in value] if isinstance(value, list) else value


def _unread(value: Any) -> Iterator[str]:
    if isinstance(value, Record):
        yield from value.unread()
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from (f"{index}.{name}" for name in _unread(item))


class Tensors:
    """The tensors of a file, or those whose names begin with a prefix; it knows which were read."""

    def __init__(self, values: dict[str, torch.Tensor], prefix: str = "", unread: set[str] | None = None):
        self._values, self._prefix = values, prefix
        self._unread = set(values) if unread is None else unread

    def __getitem__(self, key: str) -> torch.Tensor:
        value = self._values[self._prefix + key]
        self._unread.discard(self._prefix + key)
        return value

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._values

    def __iter__(self) -> Iterator[str]:
        return (key[len(self._prefix) :] for key in self._values if key.startswith(self._prefix))

    def under(self, prefix: str) -> Tensors:
        """Those named `prefix.*`, without the prefix."""
        return Tensors(self._values, f"{self._prefix}{prefix}.", self._unread)

    def series(self, prefix: str) -> list[torch.Tensor]:
        """`prefix.0`, `prefix.1`, ... as far as they go."""
        values = []
        while f"{prefix}.{len(values)}" in self:
            values.append(self[f"{prefix}.{len(values)}"])
        return values

    def unread(self) -> list[str]:
        return sorted(self._unread)


class GoldenFile:
    """`X.json` with `X.safetensors`, where that exists."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.json = Record(json.loads(path.read_text("utf-8")))
        tensors = path.with_suffix(".safetensors")
        self.tensors = Tensors(load_file(tensors) if tensors.exists() else {})

    def check_table(self, check: Check) -> None:
        """The tensors are those that the json lists, in shape and type."""
        listed = self.json["tensors"].plain() if "tensors" in self.json else {}
        present = {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in self.tensors._values.items()
        }
        check("tensors listed in the json", sorted(present), sorted(listed))
        wrong = [name for name in present if name in listed and present[name] != listed[name]]
        check("shapes and types as listed", wrong, [])

    def check_coverage(self, check: Check) -> None:
        """A row for every tensor and every field that no check used."""
        for name in self.tensors.unread():
            check.fail(name, "tensor not checked")
        for name in self.json.unread():
            check.fail(name, "field of the json not checked")


class GoldenSet:
    """A golden directory: its manifest, its pictures and its files. Each form adds what its checks need."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = GoldenFile(self.directory / "manifest.json")
        self._pictures: set[str] = set()

    def picture(self, name: str) -> Image.Image:
        """One of `inputs/`, as a user would open it."""
        self._pictures.add(name)
        with Image.open(self.directory / "inputs" / name) as picture:
            picture.load()
            return picture

    def is_picture(self, name: str) -> bool:
        return (self.directory / "inputs" / name).is_file()

    def unused_pictures(self) -> list[str]:
        folder = self.directory / "inputs"
        return sorted({p.name for p in folder.iterdir()} - self._pictures) if folder.is_dir() else []
