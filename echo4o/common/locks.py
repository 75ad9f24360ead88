"""One process at a time per output folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self


class FolderLock:
    """Holds an output folder for this process, so that a second run into it is refused instead of mixed in.

    The lock is a file beside the folder, which may not exist yet and whose content may be published. Where nothing can
    be created beside it, as with a mounted volume, the folder itself is locked, which cannot name its process. The lock
    ends with `release`, with the `with` block, or with the process. Where the operating system has no `flock`, nothing
    is locked.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._place = Path(os.path.realpath(self.folder))  # one lock for all links to a folder
        self._file: Path | None = self._place.parent / f".{self._place.name}.lock"  # None: the folder itself
        self._descriptor: int | None = None

    def acquire(self) -> Self:
        """Take the folder. Raises ValueError naming the process that holds it, or if the folder cannot be created."""
        try:
            import fcntl
        except ImportError:  # Windows
            return self
        while True:
            try:
                descriptor = self._open()
            except OSError as error:
                reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
                raise ValueError(f"{self.folder} cannot be created: {reason}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = b"" if self._file is None else os.read(descriptor, 100).strip()
                os.close(descriptor)
                raise ValueError(
                    f"{self.folder} is in use by another process (process {owner.decode('utf-8', 'replace') or 'unknown'}): "
                    "wait until it ends, or choose another folder"
                ) from None
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its owner removed the file between our open and our lock
        if self._file is not None:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        return self

    def _open(self) -> int:
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                return os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not self._place.is_dir():
                    raise
                self._file = None
        return os.open(self._place, os.O_RDONLY)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file or self._place))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the folder up; a second call does nothing."""
        if self._descriptor is not None:
            if self._file is not None:
                self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *error) -> None:
        self.release()
