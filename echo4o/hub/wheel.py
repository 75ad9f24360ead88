"""Packs the installed package as a wheel, so that a Space can install this version without a package index."""

import base64
import hashlib
import importlib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

# The rooms whose folders may lie elsewhere in an editable installation.
_ROOMS = ("echo4o", "echo4o.modeling", "echo4o.dataset_scripts", "echo4o.training", "echo4o.model_cards")
_SUFFIXES = {".py", ".yaml", ".j2", ".json", ".safetensors", ".md", ".typed", ".txt"}
_LEFT_OUT = ("echo4o/testing/",)  # its made-up keys look like secrets, and an app needs no tests


def write_wheel(folder: Path) -> Path:
    """Write the wheel of the package that runs now into a folder; returns the file.

    The wheel is the same, byte for byte, for the same files.
    """
    package = distribution("echo4o")
    info = f"echo4o-{package.version}.dist-info"
    file = folder / f"echo4o-{package.version}-py3-none-any.whl"
    records = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:

        def add(path: str, data: bytes) -> None:
            wheel.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            records.append(f"{path},sha256={digest},{len(data)}")

        for path, source in sorted(_package_files().items()):
            add(path, source.read_bytes())
        # setuptools' own folder in a checkout has PKG-INFO.
        metadata = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
        add(f"{info}/METADATA", metadata.encode())
        add(f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: echo4o\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        add(f"{info}/entry_points.txt", b"[console_scripts]\necho4o = echo4o.cli:main\n")
        records.append(f"{info}/RECORD,,")
        wheel.writestr(zipfile.ZipInfo(f"{info}/RECORD", (2020, 1, 1, 0, 0, 0)), "\n".join(records) + "\n")
    return file


def _package_files() -> dict[str, Path]:
    """The package's files by their path in the wheel."""
    files: dict[str, Path] = {}
    for room in _ROOMS:
        module = importlib.import_module(room)
        for folder in map(Path, module.__path__):
            for path in folder.rglob("*"):
                name = "/".join((*room.split("."), *path.relative_to(folder).parts))
                hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
                if path.is_file() and path.suffix in _SUFFIXES and not hidden and not name.startswith(_LEFT_OUT):
                    files[name] = path
    return files
