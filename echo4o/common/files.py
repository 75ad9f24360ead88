"""Durable writes: after a crash or a kill, a file holds its old content or its new one, never half of it.

New content goes into a hidden file beside the target, is flushed to the disk (fsync) and takes the target's name; then
the folder is flushed, so that the new name survives a power failure, too.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from echo4o.common.locks import FolderLock

# All writes of this package go through `write`, `sync` and `rename`: tests interrupt them at every call.


def write(stream: BinaryIO, data: bytes) -> None:
    """Write bytes to an open file."""
    stream.write(data)


def sync(stream: BinaryIO) -> None:
    """Flush an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file of that name, and flush the folders on both sides."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a hidden path to write to; it becomes `path` when the block ends, and is removed if the block raises.

    Args:
        shared: several processes may write `path` at the same time; the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a process number in the name, the next attempt overwrites what a killed process left behind.
    partial = path.with_name(f".{path.name}.{f'{os.getpid()}.' if shared else ''}partial")
    try:
        yield partial
        with open(partial, "rb+") as stream:
            sync(stream)
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a whole file. `shared`: see [`replacing`]."""
    with replacing(path, shared=shared) as partial, open(partial, "wb") as stream:
        write(stream, data)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a whole file as UTF-8. `shared`: see [`replacing`]."""
    write_bytes(path, text.encode(), shared=shared)


def to_json(value: Any) -> str:
    """Indented JSON with a line end. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file."""
    write_text(path, to_json(value))


def read_json(path: Path) -> Any:
    """The value of a JSON file; None if there is no such file. Raises ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it to start over") from None


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new hidden folder to write into; it replaces `folder` when the block ends, or is removed if it raises.

    Raises ValueError if another process is writing this folder.
    """
    work, old = folder.parent / f".{folder.name}.tmp", folder.parent / f".{folder.name}.old"
    with FolderLock(folder):
        for leftover in (work, old):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            sync_tree(work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        rename(work, folder)
        shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush all files and folders under a folder to the disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with open(path, "rb+") as stream:
                sync(stream)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, read in chunks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
