"""Finds what looks like a secret in files.

Text of any Unicode encoding, rows of Parquet and Arrow files, safetensors headers, archives, and compressed texts of PNG
images are searched.
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from echo4o.hub.remote import Source

_CHUNK = 1 << 22
_LONGEST = 4096  # bytes of the longest secret; consecutive chunks overlap by this
_MAX_DEPTH = 4  # archives within archives
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = 1 << 21  # bytes of all compressed texts of an image that are read
_SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}",
    "an OpenAI or similar API key": rb"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{20,}",
    "an AWS access key": rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,})",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a Google API key": rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    # New keys contain a fixed signature, storage keys are in connection strings, old keys are 32 hexadecimal digits.
    "an Azure key": rb"[A-Za-z0-9]{40,60}JQQJ9[9DH][A-Za-z0-9]{20,}"
    rb"|(?i:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{43,86}="
    rb"|(?<![A-Za-z0-9_~.-])[A-Za-z0-9_~.]{3}[78]Q~[A-Za-z0-9_~.-]{31,34}(?![A-Za-z0-9_~.-])"
    rb"|(?i:azure[a-z_]*key|api-key)[\"']?\s*[:=]\s*[\"']?[0-9a-fA-F]{32}(?![0-9a-zA-Z])",
}
_SECRET = re.compile(b"|".join(b"(%s)" % pattern for pattern in _SECRETS.values()))
_ENCRYPTED = "an encrypted file, which cannot be searched for secrets"
_LONG = "a compressed text that is too long to be searched for secrets"
_CLOSED = "an archive of a kind that cannot be searched for secrets"
_CLOSED_KINDS = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x28\xb5\x2f\xfd")  # 7z, rar, zstd
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError,
    RuntimeError, ValueError,
)  # fmt: skip


def find_secrets(name: str, source: Source) -> Iterator[tuple[str, str]]:
    """Yields the place and the kind of everything that looks like a secret; never the secret itself."""
    if match := _SECRET.search(name.encode()):
        yield "its name", _name_of(match)
    if isinstance(source, bytes):
        yield from _in_stream(io.BytesIO(source))
    elif name.endswith((".parquet", ".arrow")):
        yield from _in_table(source, Path(name).suffix)
    elif name.endswith(".safetensors"):
        yield from _in_chunks([_safetensors_header(source)])
    else:
        with open(source, "rb") as stream:
            yield from _in_stream(stream)


def _in_stream(stream: BinaryIO, depth: int = 0) -> Iterator[tuple[str, str]]:
    for what in _in_png_texts(stream):
        yield "a compressed text", what
    if depth < _MAX_DEPTH and (kind := _archive_kind(stream)):
        try:
            for member, content in _members(kind, stream):
                if content is None:
                    yield member, _ENCRYPTED
                    continue
                if match := _SECRET.search(member.encode("utf-8", "replace")):
                    yield "a member's name", _name_of(match)
                for place, what in _in_stream(content, depth + 1):
                    yield (f"{member}, {place}" if member else place), what
            return
        except _BROKEN:  # not an archive, or damaged: search its bytes
            stream.seek(0)
    first = stream.read(_CHUNK)
    if first.startswith(_CLOSED_KINDS):
        yield "the whole file", _CLOSED
    yield from _in_chunks(chain([first], iter(lambda: stream.read(_CHUNK), b"")))


def _in_png_texts(stream: BinaryIO) -> Iterator[str]:
    """The kinds of secrets in the compressed chunks (texts, color profile) of a PNG image; nothing for other files."""
    if stream.read(8) == _PNG:
        room = _PNG_TEXT
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind not in (b"zTXt", b"iTXt", b"iCCP"):
                stream.seek(length + 4, io.SEEK_CUR)
                continue
            chunk = stream.read(min(length, _PNG_TEXT))
            stream.seek(length - len(chunk) + 4, io.SEEK_CUR)  # to behind the checksum
            text = _decompressed(_compressed_part(kind, chunk), room + 1)
            room -= len(text)
            if match := _SECRET.search(text):
                yield _name_of(match)
            if room < 0 or length > _PNG_TEXT:
                yield _LONG
                break
    stream.seek(0)


def _compressed_part(kind: bytes, chunk: bytes) -> bytes:
    """What a chunk compresses: after the keyword and a byte for the method; of an iTXt chunk, after its languages."""
    _, _, rest = chunk.partition(b"\0")
    if kind != b"iTXt":
        return rest[1:]
    return rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""


def _decompressed(data: bytes, most: int) -> bytes:
    """At most so many decompressed bytes; of damaged data those before the damage."""
    engine, text = zlib.decompressobj(-15), bytearray()  # without the checksum at the end, which may be wrong
    data = data[2:]  # the header
    try:
        while not engine.eof and len(text) < most:
            part = engine.decompress(data, min(1 << 16, most - len(text)))
            data = engine.unconsumed_tail
            if not part and not data:
                break
            text += part
    except zlib.error:
        pass
    return bytes(text)


def _archive_kind(stream: BinaryIO) -> str | None:
    start = stream.read(512)
    stream.seek(0)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if start[:2] == b"\x1f\x8b":
        return "gz"
    if start[:3] == b"BZh" and start[4:10] == b"1AY&SY":
        return "bz2"
    if start[:6] == b"\xfd7zXZ\x00":
        return "xz"
    return "tar" if start[257:262] == b"ustar" else None


def _members(kind: str, stream: BinaryIO) -> Iterator[tuple[str, BinaryIO | None]]:
    """Yields name and content of each file in an archive.

    The content is None if it is encrypted; the name is empty for a compressed single file.
    """
    if kind == "zip":
        with zipfile.ZipFile(stream) as archive:
            yield "its comment", io.BytesIO(archive.comment)
            for info in archive.infolist():
                if info.flag_bits & 1:
                    yield info.filename, None
                elif not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, cast(BinaryIO, content)
    elif kind == "tar":
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if content := archive.extractfile(member) if member.isfile() else None:
                    yield member.name, cast(BinaryIO, content)
    else:
        opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind]
        with opened(stream) as content:
            yield "", cast(BinaryIO, content)


def _in_chunks(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    line, tail = 1, b""
    for chunk in chunks:
        text = tail + chunk
        searched = len(tail)  # matches that end before this were found in the previous chunk
        for match in _SECRET.finditer(text):
            if match.end() > searched:
                yield _line(line, text, match.start()), _name_of(match)
        if b"\0" in text:
            yield from _in_wide_text(text, searched, line)
        tail = text[-_LONGEST:]
        line += text.count(b"\n", 0, len(text) - len(tail))


def _in_wide_text(text: bytes, searched: int, line: int) -> Iterator[tuple[str, str]]:
    """Searches text in UTF-16 or UTF-32, where each ASCII character is one byte among zero bytes."""
    for match in _SECRET.finditer(text.replace(b"\0", b"")):
        for width in (2, 4):
            wide = (b"\0" * (width - 1)).join(bytes([letter]) for letter in match[0])
            place = text.find(wide, max(0, searched - len(wide) + 1))
            if place >= 0:
                yield _line(line, text, place), _name_of(match)
                break


def _line(first: int, text: bytes, place: int) -> str:
    number = first + text.count(b"\n", 0, place)
    return f"line {number}"


def _name_of(match: re.Match[bytes]) -> str:
    return next(name for name, found in zip(_SECRETS, match.groups()) if found is not None)


def _in_table(path: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """Searches the values of a table and, if they hold no secret, the bytes of the file.

    The bytes hold the names of columns, values of types that are not searched, and what is left of a damaged file.
    """
    import pyarrow as pa

    found = []
    try:
        for place in _in_columns(path, suffix):
            found.append(place)
    except (pa.ArrowException, OSError):  # damaged; validating it is not the task of this module
        pass
    yield from found
    if not found:
        with open(path, "rb") as stream:
            yield from _in_stream(stream)


def _in_columns(path: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """Searches texts and bytes in all columns, and the metadata; their bytes in the file may be compressed."""
    with ExitStack() as opened:
        metadata, batches = _open_table(path, suffix, opened)
        for key, value in metadata.items():
            if key != b"ARROW:schema":  # the other entries again, in base64
                yield from _in_chunks([value])
        row = 0
        for batch in (part.slice(first, 100) for part in batches for first in range(0, len(part), 100)):
            for column, values in zip(batch.schema.names, batch.columns):
                if not _kind_in_array(values):
                    continue
                for number in range(len(batch)):
                    if kind := _kind_in_array(values.slice(number, 1)):
                        yield f"row {row + number}, column {column}", kind
            row += len(batch)


def _open_table(path: Path, suffix: str, opened: ExitStack) -> tuple[dict[bytes, bytes], Iterable[Any]]:
    """Metadata and batches of a Parquet file, or of an Arrow file in either of its formats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix == ".parquet":
        parquet = opened.enter_context(pq.ParquetFile(path))
        return parquet.metadata.metadata or {}, parquet.iter_batches(batch_size=100)
    source = opened.enter_context(pa.memory_map(str(path)))
    if source.read(6) == b"ARROW1":
        file = opened.enter_context(pa.ipc.open_file(source))
        return file.schema.metadata or {}, (file.get_batch(number) for number in range(file.num_record_batches))
    source.seek(0)
    stream = opened.enter_context(pa.ipc.open_stream(source))
    return stream.schema.metadata or {}, stream


def _kind_in_array(array: Any) -> str | None:
    """The kind of the first secret among the texts and bytes in an Arrow array."""
    import pyarrow as pa

    kind, types = array.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _kind_in_array(array.storage)
    if types.is_dictionary(kind):
        return _kind_in_array(array.dictionary_decode())
    if types.is_struct(kind):
        return next(filter(None, map(_kind_in_array, array.flatten())), None)
    if types.is_map(kind):  # keys and items are those of the array that this one is a slice of
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        parts = (part.slice(first, last - first) for part in (array.keys, array.items))
        return next(filter(None, map(_kind_in_array, parts)), None)
    lists = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    if any(is_kind(kind) for is_kind in lists):
        return _kind_in_array(array.flatten())
    if any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view)):
        values = (value.encode("utf-8", "replace") for value in array.to_pylist() if value)
    elif any(
        is_kind(kind)
        for is_kind in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    ):
        values = (value for value in array.to_pylist() if value)
    else:
        return None
    return next(filter(None, map(_kind_in_value, values)), None)


def _kind_in_value(value: bytes) -> str | None:
    if match := _SECRET.search(value):
        return _name_of(match)
    return next(_in_png_texts(io.BytesIO(value)), None)


def _safetensors_header(path: Path) -> bytes:
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(min(length, 100_000_000))
