"""Append-only files of JSON lines. A last line without its line end was torn by a crash: it does not count.

lines = JsonLines(path)
with lines.appending() as append:  # one process at a time; cuts off a torn line first
    append({"id": "1"})
for value in lines:
    ...
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo4o.common import files, strict_json

_BLOCK = 1 << 16  # bytes read at a time when looking for the last line end


class JsonLines:
    """A file of JSON lines; iterating yields the values of its complete lines, none if there is no file.

    Iterating raises ValueError at a complete line that is not JSON.
    """

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        return (value for value, _ in self.with_ends())

    def with_ends(self) -> Iterator[tuple[Any, int]]:
        """The values, each with the position in the file (in bytes) where its line ends."""
        if not self.path.is_file():
            return
        end = 0
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                try:
                    value = json.loads(line)
                except ValueError:
                    raise ValueError(f"{self.path}, line {number} is not JSON; delete the line") from None
                yield value, end

    @contextmanager
    def appending(self) -> Iterator[Callable[[dict], None]]:
        """Yield a function that appends a value and hands it to the system.

        Raises ValueError if another process is appending to the file.
        """
        writer = JsonLinesWriter(self.path, exclusive=True, ascii=False, allow_nan=False)
        try:
            yield writer.append
        finally:
            writer.close()


class JsonLinesWriter:
    """Appends JSON lines to a file. Each line is handed to the system at once, and is on the disk after `sync`.

    Args:
        path: the file; it is created with its folder if it is not there.
        length: how many bytes of the file to keep, the rest is cut off; None cuts off a torn last line only.
        exclusive: raise ValueError if another process has opened the file like this.
        ascii: write characters beyond ASCII as escapes, which also keeps text that is not valid Unicode.
        allow_nan: write NaN and infinity, which JSON does not have, as null instead of raising ValueError.

    Attributes:
        length: the size of the file in bytes.
    """

    def __init__(
        self,
        path: Path,
        length: int | None = None,
        *,
        exclusive: bool = False,
        ascii: bool = True,
        allow_nan: bool = True,
    ):
        self.path, self._ascii, self._allow_nan = path, ascii, allow_nan
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if exclusive:
                _lock(self._stream, path)
            self._stream.truncate(_complete_bytes(self._stream) if length is None else length)
            self.length = self._stream.seek(0, os.SEEK_END)
        except BaseException:
            self._stream.close()
            raise

    def append(self, value: dict) -> None:
        """Append a value as one line."""
        if self._allow_nan:
            text = strict_json.dumps(value, ensure_ascii=self._ascii)
        else:
            text = json.dumps(value, ensure_ascii=self._ascii, allow_nan=False)
        data = text.encode() + b"\n"
        files.write(self._stream, data)
        self._stream.flush()
        self.length += len(data)

    def sync(self) -> None:
        """Flush all lines to the disk."""
        files.sync(self._stream)

    def close(self) -> None:
        """Close the file, and with it give up the lock."""
        self._stream.close()


def _complete_bytes(stream) -> int:
    """The number of bytes up to and with the last line end."""
    start = stream.seek(0, os.SEEK_END)
    while start:
        start, stop = max(0, start - _BLOCK), start
        stream.seek(start)
        found = stream.read(stop - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


def _lock(stream, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{path}: another process is writing to this file") from None
