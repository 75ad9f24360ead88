"""Which version of a model was loaded: the commit of a Hub repository, or a fingerprint of a folder."""

import hashlib
from pathlib import Path

_SAMPLE = 1 << 20  # bytes read at the start and at the end of a file of weights


def model_revision(model: str | Path, pipe=None) -> str:
    """The commit of the Hub model that `pipe` was loaded from, or the fingerprint of a folder or file.

    Returns "unknown" if `model` is a Hub repository and the pipeline does not say which commit it is.
    """
    place = Path(model)
    if place.exists():
        return f"folder:{_fingerprint(place)}"
    parts = Path(str(pipe.config.get("_name_or_path", ""))).parts if pipe is not None else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "unknown"


def public_name(model: str) -> str:
    """A Hub repository as it is; of a local folder only the last part of its path."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _fingerprint(place: Path) -> str:
    """16 hex digits of the names and sizes of all files, the configurations, and samples of the weights."""
    content = hashlib.sha256()
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    root = place if place.is_dir() else place.parent
    for path in files:
        if not path.is_file() or path.name.startswith("."):
            continue
        content.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        if path.suffix == ".json":
            content.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:  # names and shapes, and a sample of the values
                content.update(file.read(_SAMPLE))
                file.seek(max(0, path.stat().st_size - _SAMPLE))
                content.update(file.read())
    return content.hexdigest()[:16]
