"""Finds the parts of the published layout in a folder or a Hub repository (hf://): row files, archives, loose images."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from echo4o.dataset_scripts.archives import is_archive
from echo4o.dataset_scripts.names import PARTS
from echo4o.dataset_scripts.schema import FolderMapping
from echo4o.model_cards.facts import ABOUT, read_about

ROW_SUFFIXES = (".jsonl", ".json", ".ndjson")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Patterns of folder names (letters only, lower case) by configuration; the upstream spelling is "Surrel".
_NAMES = {
    "surreal_fantasy": re.compile(r"surr?eal|surrel|fantasy"),
    "multi_reference": re.compile(r"multi\w*(ref|image)|reference"),
    "instruction_following": re.compile(r"following"),
}


@dataclass(frozen=True)
class SourceFile:
    """A file of the source; `path` is relative to its root."""

    path: str
    size: int
    modified: float = 0.0  # local files only


@dataclass
class SourcePart:
    """One folder of the published layout. `configuration` is None if it is unknown."""

    folder: str
    configuration: str | None
    rows: list[SourceFile] = field(default_factory=list)
    archives: list[SourceFile] = field(default_factory=list)
    images: list[SourceFile] = field(default_factory=list)  # outside of archives
    others: list[SourceFile] = field(default_factory=list)


class PublishedSource:
    """A folder or a Hub repository in the published layout. Hidden files are ignored."""

    def __init__(self, location: str | Path):
        self.location = os.path.expanduser(str(location)).rstrip("/")
        self.fs, self.root, self.revision = _open(self.location)
        self.name = PurePosixPath(self.root.split("@")[0]).name
        self.files = self._list()
        self.parts = self._parts()

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading from front to back."""
        options = {"block_size": 0} if self.revision else {}  # hf: one request, resumed after an interruption
        return self.fs.open(f"{self.root}/{path}", "rb", **options)

    def about(self) -> dict | None:
        """The content of `about.yaml`; None if there is no such file."""
        if not any(file.path == ABOUT for file in self.files):
            return None
        with self.open(ABOUT) as stream:
            return read_about(stream.read(1 << 20).decode("utf-8"), f"{self.location}/{ABOUT}").model_dump()

    def fingerprint(self, times: bool = False) -> str:
        """A digest of the names and sizes of all files (with `times`, also of their dates) and of the revision."""
        stated = (f"{f.size} {f.modified if times else 0} {f.path}" for f in self.files)
        text = "\n".join([self.revision or "", *stated])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def select(self, configuration: str, plan: Mapping[str, FolderMapping]) -> list[SourcePart]:
        """The parts of a configuration, in the order of their folders; `all` takes every one.

        Raises:
            ValueError: there is no such part, or with `all`, the configuration of a folder is unknown.
        """
        named = {part.folder for part in self.parts}
        if unknown := sorted(set(plan) - named):
            raise ValueError(f"the mapping names {unknown[0]!r}; the folders with rows are {', '.join(sorted(named))}")
        chosen = []
        for part in self.parts:
            decided = plan.get(part.folder, FolderMapping()).configuration or part.configuration
            if decided is None and configuration == "all":
                raise ValueError(
                    f"nothing says which configuration the folder {part.folder!r} is: assign it with "
                    f"--assign {part.folder}=multi_reference, or in a mapping file (echo4o dataset inspect --write)"
                )
            if configuration in ("all", decided):
                chosen.append(SourcePart(part.folder, decided, part.rows, part.archives, part.images, part.others))
        if not chosen:
            found = (
                ", ".join(f"{p.folder} ({p.configuration or 'unknown'})" for p in self.parts) or "no folder with rows"
            )
            raise ValueError(f"{self.location} holds nothing for the configuration {configuration}; it holds {found}")
        return chosen

    def _list(self) -> list[SourceFile]:
        found = self.fs.find(self.root, detail=True)
        files = []
        for path, info in found.items():
            relative = path[len(self.root) :].lstrip("/")
            if not any(step.startswith(".") for step in relative.split("/")):
                files.append(SourceFile(relative, info["size"] or 0, info.get("mtime") or 0.0))
        return sorted(files, key=lambda f: _natural(f.path))

    def _parts(self) -> list[SourcePart]:
        depths = {f.path.count("/") for f in self.files if f.path.lower().endswith(ROW_SUFFIXES)}
        is_part = depths == {0}  # the source is one of the folders itself
        parts: dict[str, SourcePart] = {}
        for f in self.files:
            top = self.name if is_part else f.path.split("/")[0] if "/" in f.path else None
            if top is None:
                continue
            part = parts.setdefault(top, SourcePart(top, configuration_of(top)))
            suffix = PurePosixPath(f.path).suffix.lower()
            if is_archive(f.path):
                part.archives.append(f)
            elif suffix in ROW_SUFFIXES:
                part.rows.append(f)
            elif suffix in IMAGE_SUFFIXES:
                part.images.append(f)
            else:
                part.others.append(f)
        order = {name: number for number, name in enumerate(PARTS)}
        return sorted(
            (p for p in parts.values() if p.rows), key=lambda p: order.get(p.configuration or "", len(order))
        )


class CompleteStream:
    """Raises OSError if a stream ends before the listed size of its file, as after a lost connection."""

    def __init__(self, stream: BinaryIO, file: SourceFile):
        self.stream, self.file, self.given = stream, file, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.given += len(data)
        if not data and size and self.given < self.file.size:
            raise OSError(f"{self.file.path}: the stream ended after {self.given:,} of {self.file.size:,} bytes")
        return data


def configuration_of(folder: str) -> str | None:
    """The configuration that a folder's name indicates, or None."""
    letters = re.sub(r"[^a-z]", "", folder.lower())
    matches = [name for name, pattern in _NAMES.items() if pattern.search(letters)]
    return matches[0] if len(matches) == 1 else None


def _natural(path: str) -> tuple:
    """Sorts 5000-10000 before 10000-15000."""
    steps = re.split(r"(\d+)", path)
    return tuple((1, int(s), s) if s.isdigit() and s.isascii() else (0, 0, s) for s in steps), path


def _open(location: str) -> tuple[Any, str, str | None]:
    """Returns the file system (of fsspec), the root in it and, on the Hub, the commit."""
    if location.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        fs = HfFileSystem()
        resolved: Any = fs.resolve_path(location)
        if not fs.exists(location):
            raise FileNotFoundError(f"{location}: there is no such repository or folder on the Hub")
        commit = fs._api.repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision).sha
        return fs, f"{resolved.repo_type}s/{resolved.repo_id}@{commit}/{resolved.path_in_repo}".rstrip("/"), commit
    from fsspec.implementations.local import LocalFileSystem

    fs = LocalFileSystem()
    if not fs.isdir(location):
        raise FileNotFoundError(f"{location}: there is no such folder")
    return fs, fs._strip_protocol(location), None
