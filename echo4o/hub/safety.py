"""What never leaves the machine: pickles, secrets, and files from outside the folder."""

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from echo4o.hub.remote import Source
from echo4o.modeling.common.weights import PICKLE_SUFFIXES

_PICKLES = (*PICKLE_SUFFIXES, ".joblib", ".dill", ".mar")
_SMALL = 1_000_000  # a pickle of the old protocols is looked for in files up to here
_CHUNK = 1 << 22
_LONGEST = 4096  # of a secret; what may be cut at the end of a chunk
_SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}",
    "an OpenAI or similar API key": rb"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{20,}",
    "an AWS access key": rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,})",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
_SECRET = re.compile(b"|".join(b"(%s)" % pattern for pattern in _SECRETS.values()))


def list_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their path in it; names that begin with a dot and `__pycache__` are left out.

    Raises:
        ValueError: a link leads outside, or nowhere.
    """
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts):
            continue
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link that leads outside of {folder}: put the file itself there")
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to nothing")
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{path} is a link to a folder: put the folder itself there")
        if path.is_file():
            found["/".join(parts)] = path
    return found


def left_out(folder: Path) -> int:
    """How many files `list_files` leaves out."""
    return sum(path.is_file() for path in folder.rglob("*")) - len(list_files(folder))


def require_safe(files: Mapping[str, Source]) -> None:
    """Raise ValueError, naming each place, when there are pickles or what looks like a secret among the files."""
    pickles = [name for name, source in files.items() if _is_pickle(name, source)]
    if pickles:
        raise ValueError(
            f"pickles can run code and are not published: {', '.join(pickles[:8])}. Store weights as safetensors."
        )
    secrets = [f"{name}, {place}: {what}" for name, source in files.items() for place, what in _secrets(name, source)]
    if secrets:
        raise ValueError("what looks like a secret is not published:\n  " + "\n  ".join(secrets[:20]))


def _is_pickle(name: str, source: Source) -> bool:
    if Path(name).suffix.lower() in _PICKLES:
        return True
    if isinstance(source, bytes):
        return False
    with open(source, "rb") as stream:
        start = stream.read(16)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if start[:4] == b"PK\x03\x04":  # torch.save writes zip archives, under any name
        try:
            with zipfile.ZipFile(source) as archive:
                return any(Path(member).suffix in _PICKLES for member in archive.namelist())
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{name} begins as a zip archive and cannot be read as one: {error}") from error
    if start[:6] == b"\x93NUMPY":
        return b"|O" in Path(source).read_bytes()[:1000]  # an array of objects is pickled
    return source.stat().st_size <= _SMALL and _parses_as_pickle(source.read_bytes())


def _parses_as_pickle(data: bytes) -> bool:
    """Whether the bytes are a pickle of protocol 0 or 1, which has no mark at its beginning."""
    if not data.rstrip().endswith(b"."):
        return False
    try:
        return any(opcode.name in ("GLOBAL", "INST", "REDUCE", "BUILD") for opcode, _, _ in pickletools.genops(data))
    except Exception:  # whatever a parser of arbitrary bytes runs into: it is none
        return False


def _secrets(name: str, source: Source) -> Iterator[tuple[str, str]]:
    """(place, what) of all that looks like a secret; what it is is never told."""
    if isinstance(source, bytes):
        yield from _in_chunks([source])
    elif name.endswith(".parquet"):
        yield from _in_parquet(source)
    elif name.endswith(".safetensors"):
        yield from _in_chunks([_safetensors_header(source)])
    else:
        with open(source, "rb") as stream:
            yield from _in_chunks(iter(lambda: stream.read(_CHUNK), b""))


def _in_chunks(chunks) -> Iterator[tuple[str, str]]:
    line, tail = 1, b""
    for chunk in chunks:
        text = tail + chunk
        for match in _SECRET.finditer(text):
            if match.end() > len(tail):  # else it was told with the chunk before
                number = line + text.count(b"\n", 0, match.start())
                yield f"line {number}", list(_SECRETS)[match.lastindex - 1]
        tail = text[-_LONGEST:]
        line += text.count(b"\n", 0, len(text) - len(tail))


def _in_parquet(path: Path) -> Iterator[tuple[str, str]]:
    """In the columns of text; Parquet packs them, so that its bytes show nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid:  # whether it is what it should be is for others to say
        yield from _in_chunks([path.read_bytes()])
        return
    with file:
        columns = [f.name for f in file.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        row = 0
        for batch in file.iter_batches(columns=columns, batch_size=1000):
            for column in columns:
                for number, value in enumerate(batch.column(column).to_pylist()):
                    if value and (match := _SECRET.search(value.encode("utf-8", "replace"))):
                        yield f"row {row + number}, column {column}", list(_SECRETS)[match.lastindex - 1]
            row += len(batch)


def _safetensors_header(path: Path) -> bytes:
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(min(length, 100_000_000))
