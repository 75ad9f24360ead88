"""Refuses to publish pickles, secrets and links to files outside the folder."""

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path

from echo4o.hub.remote import Source
from echo4o.hub.secrets import find_secrets
from echo4o.modeling.common.weights import PICKLE_SUFFIXES

_PICKLES = (*PICKLE_SUFFIXES, ".joblib", ".dill", ".mar")
_SMALL = 1_000_000  # bytes; only files up to this size are parsed as pickles of protocol 0 or 1


def list_files(folder: Path) -> dict[str, Path]:
    """Lists the files of a folder by their relative path, without hidden files and `__pycache__`.

    Raises:
        ValueError: a link points outside of the folder, to a folder, or to a file that does not exist.
    """
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts):
            continue
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link to a file outside of {folder}: replace it by the file")
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to a file that does not exist")
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{path} is a link to a folder: replace it by the folder")
        if path.is_file():
            found["/".join(parts)] = path
    return found


def left_out(folder: Path) -> int:
    """Returns the number of files that `list_files` leaves out."""
    return sum(path.is_file() for path in folder.rglob("*")) - len(list_files(folder))


def require_safe(files: Mapping[str, Source]) -> None:
    """Raises ValueError, naming each place, if a file is a pickle or contains what looks like a secret."""
    pickles = [name for name, source in files.items() if _is_pickle(name, source)]
    if pickles:
        raise ValueError(
            f"pickles can run code when they are loaded and are not published: {', '.join(pickles[:8])}. Store weights as safetensors."
        )
    secrets = [
        f"{name}, {place}: {what}" for name, source in files.items() for place, what in find_secrets(name, source)
    ]
    if secrets:
        raise ValueError(
            "secrets must not be published; these places look like secrets:\n  "
            + "\n  ".join(list(dict.fromkeys(secrets))[:20])
        )


def _is_pickle(name: str, source: Source) -> bool:
    if Path(name).suffix.lower() in _PICKLES:
        return True
    if isinstance(source, bytes):
        return False
    with open(source, "rb") as stream:
        start = stream.read(16)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if start[:4] == b"PK\x03\x04":  # torch.save writes zip archives with arbitrary suffixes
        try:
            with zipfile.ZipFile(source) as archive:
                return any(Path(member).suffix in _PICKLES for member in archive.namelist())
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{name} starts like a zip archive but cannot be read: {error}") from error
    if start[:6] == b"\x93NUMPY":
        return b"|O" in Path(source).read_bytes()[:1000]  # an array of objects is pickled
    return source.stat().st_size <= _SMALL and _parses_as_pickle(source.read_bytes())


def _parses_as_pickle(data: bytes) -> bool:
    """Whether the bytes are a pickle of protocol 0 or 1, which does not start with a magic number."""
    if not data.rstrip().endswith(b"."):
        return False
    try:
        return any(opcode.name in ("GLOBAL", "INST", "REDUCE", "BUILD") for opcode, _, _ in pickletools.genops(data))
    except Exception:  # genops raises various errors for bytes that are not a pickle
        return False
