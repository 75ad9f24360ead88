"""Every write and rename of the builder, so that what it leaves behind when it is killed can be reasoned about.

A file gets its name when its bytes are on the disk; a line is on the disk before anything refers to it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


def sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def rename(source: Path, target: Path) -> None:
    """Replace `target`; afterwards the new name is on the disk, too."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, text: str) -> None:
    """Write a whole file at once: it is there completely, or as it was before."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as stream:
        write(stream, text.encode())
        sync(stream)
    rename(partial, path)


def to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class HashingFile:
    """A new file that knows the digest of what was written to it. It is given its name by `finish`."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.stream = open(self.partial, "wb")
        self.digest, self.size = hashlib.sha256(), 0
        self.closed = False

    def write(self, data) -> int:
        write(self.stream, data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Called by pyarrow; the file stays open until it is finished or given up."""

    def finish(self) -> None:
        sync(self.stream)
        self.stream.close()
        rename(self.partial, self.path)

    def give_up(self) -> None:
        self.stream.close()
        self.partial.unlink(missing_ok=True)


class Lines:
    """A file of JSON lines that grows; `length` bytes of it count, whatever lies behind is cut off."""

    def __init__(self, path: Path, length: int | None = 0):
        self.path = path
        self.stream = open(path, "r+b" if path.exists() else "w+b")
        if length is not None:
            self.stream.truncate(length)
        self.length = self.stream.seek(0, os.SEEK_END)

    def append(self, value: dict) -> None:
        # ASCII: escapes keep what is no valid Unicode, too.
        data = json.dumps(value).encode() + b"\n"
        write(self.stream, data)
        self.length += len(data)

    def sync(self) -> None:
        sync(self.stream)

    def close(self) -> None:
        self.stream.close()


def read_lines(path: Path) -> Iterator[tuple[dict, int]]:
    """The values of a JSON-lines file with the byte where each ends; a last line that is torn is left out."""
    end = 0
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield json.loads(line), end
