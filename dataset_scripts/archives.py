"""Streams the members of tar archives once from start to end, with a bounded buffer and without extracting files.

Archives are not trusted: members that are not plain files, lie outside of the archive or are too large are reported and
skipped. Damage ends the archive with a remark.
"""

import bz2
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from echo4o.dataset_scripts.findings import Remark
from echo4o.dataset_scripts.images import MAX_IMAGE_BYTES
from echo4o.dataset_scripts.json_rows import ByteStream

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz")
UNREAD_SUFFIXES = (".zip", ".7z", ".rar", ".zst", ".tzst", ".tbz", ".tbz2", ".txz", ".tar.lz4", ".tar.br", ".gz")
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # names and extended headers
MAX_INFLATION = 100  # bytes out per byte in, beyond the first gigabyte; images hardly compress
_FREE_INFLATION = 1 << 30
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ArchiveMember:
    """A plain file of an archive with its bytes, or the problem of a member or of the archive."""

    number: int  # from 0 in each archive
    name: str
    data: bytes | None = None
    problem: Remark | None = None
    detail: str = ""


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read_members(
    stream: ByteStream, name: str, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[ArchiveMember]:
    """The members of the archive in `stream`, in order. `data` is read only for names that are `wanted`."""
    number = -1
    try:
        window = _StreamWindow(_inflate(stream, name))
        tar: Any = tarfile.TarFile(fileobj=cast(BinaryIO, window), mode="r", errorlevel=2)
        while (info := tar.next()) is not None:
            number += 1
            tar.members = []  # tarfile would keep every header in memory
            if not info.isdir():
                yield _read_member(window, info, number, wanted)
        if detail := _bad_end(window):
            yield ArchiveMember(number + 1, "", problem=Remark.DAMAGED_ARCHIVE, detail=detail)
    except _DecompressionBomb as error:
        yield ArchiveMember(number + 1, "", problem=Remark.DECOMPRESSION_BOMB, detail=str(error))
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        yield ArchiveMember(
            number + 1, "", problem=Remark.DAMAGED_ARCHIVE, detail=f"{error}; the rest of it is not read"
        )


def _read_member(
    window: "_StreamWindow", info: tarfile.TarInfo, number: int, wanted: Callable[[str], bool]
) -> ArchiveMember:
    if info.size < 0:
        raise tarfile.ReadError("a member of negative size")
    if detail := _unsafe(info):
        return ArchiveMember(number, info.name, problem=Remark.UNSAFE_MEMBER, detail=detail)
    if not wanted(info.name):
        return ArchiveMember(number, info.name)
    if info.size > MAX_IMAGE_BYTES:
        detail = f"{info.size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read"
        return ArchiveMember(number, info.name, problem=Remark.DECOMPRESSION_BOMB, detail=detail)
    window.seek(info.offset_data)
    data = window.read_data(info.size)
    if len(data) < info.size:
        raise EOFError(f"it ends inside {info.name}")
    return ArchiveMember(number, info.name, data)


def _unsafe(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to {info.linkname}"
    if info.type not in tarfile.REGULAR_TYPES or info.sparse is not None:
        return "a device, a pipe or a sparse file"
    path = PurePosixPath(info.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")) or "\0" in info.name:
        return "the path leads outside the archive"
    return ""


def _bad_end(window: "_StreamWindow") -> str:
    """The problem at the end of the archive, or "". tarfile treats a damaged header as the end."""
    last = window.last_header
    if len(last) == _BLOCK and not last.strip(b"\0"):
        rest = window.drain()
        return f"{rest:,} bytes follow its end mark" if rest else ""
    if not last:
        return "no end mark; it may be cut short"
    return f"no header can be read at byte {window.position - len(last):,}; the rest of it is not read"


class _DecompressionBomb(Exception):
    pass


class _StreamWindow:
    """The file interface that tarfile needs, over a stream of chunks: tell, seek forward (and one byte back), read."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks = chunks
        self.buffer, self.offset = b"", 0  # the current chunk, and the position in it
        self.position = 0
        self.last_header = b""

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        """Read a header, for tarfile."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last_header = self.read_data(size)
        return self.last_header

    def read_data(self, size: int) -> bytes:
        have = self.buffer[self.offset : self.offset + size]
        self.offset += len(have)
        pieces, missing = [have], size - len(have)
        while missing and self._fill():
            pieces.append(self.buffer[:missing])
            self.offset = len(pieces[-1])
            missing -= self.offset
        self.position += size - missing
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def seek(self, position: int) -> None:
        step = position - self.position
        if step < 0:
            if -step > self.offset:
                raise tarfile.ReadError("a header that leads backwards")
            self.offset += step
            self.position = position
            return
        while step:
            if self.offset == len(self.buffer) and not self._fill():
                return  # the next read reports the end
            used = min(step, len(self.buffer) - self.offset)
            self.offset += used
            self.position += used
            step -= used

    def drain(self) -> int:
        """Read to the end, which also verifies the checksums of a compressed archive. Returns the bytes that are not padding."""
        rest = self.buffer[self.offset :]
        count = len(rest.rstrip(b"\0")) and len(rest)
        for chunk in self.chunks:
            if count or chunk.strip(b"\0"):
                count += len(chunk)
        return count

    def _fill(self) -> bool:
        """Take the next chunk behind the last byte of the one before, which a seek may ask for again."""
        chunk = next(self.chunks, b"")
        if not chunk:
            return False
        self.buffer, self.offset = chunk, 0
        return True


def _inflate(stream: ByteStream, name: str) -> Iterator[bytes]:
    """The decompressed chunks. The compression is recognised by the first bytes, not by the name."""
    head = stream.read(CHUNK_BYTES)
    if head.startswith(b"\x1f\x8b"):
        make = _Gunzip
    elif head.startswith(b"BZh"):
        make = bz2.BZ2Decompressor
    elif head.startswith(b"\xfd7zXZ"):
        make = lzma.LZMADecompressor
    else:
        while head:
            yield head
            head = stream.read(CHUNK_BYTES)
        return
    yield from _decompress(stream, head, make)


def _decompress(stream: ByteStream, data: bytes, make: Callable) -> Iterator[bytes]:
    engine, inside, outside = make(), len(data), 0
    while data or not engine.eof:
        chunk = engine.decompress(data, CHUNK_BYTES)
        data = b""
        outside += len(chunk)
        if outside > max(_FREE_INFLATION, MAX_INFLATION * inside):
            raise _DecompressionBomb(
                f"{inside:,} bytes became more than {outside:,}; the rest of the archive is not read"
            )
        if chunk:
            yield chunk
        if engine.eof:
            data = engine.unused_data.lstrip(b"\0")  # padding, or a next compressed stream joined to this one
            if not data:
                more = stream.read(CHUNK_BYTES)
                inside += len(more)
                data = more.lstrip(b"\0")
                if not more:
                    return
            if data:
                engine = make()
        elif engine.needs_input:
            data = stream.read(CHUNK_BYTES)
            inside += len(data)
            if not data:
                raise EOFError("the compressed data ends too early")


class _Gunzip:
    """zlib with the interface of the bz2 and lzma decompressors."""

    def __init__(self):
        self.engine = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self.engine.decompress(self.engine.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self.engine.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self.engine.eof

    @property
    def unused_data(self) -> bytes:
        return self.engine.unused_data
