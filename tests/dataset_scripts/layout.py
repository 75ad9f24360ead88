"""Writes folders in the published layout, sound ones and nasty ones."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SURREAL = "Surrel-Fantasy-Image"
FOLLOWING = "Instruction-Following-Image"
REFERENCE = "Multi-Reference-Image"


def picture(seed: int, kind: str = "JPEG", size: int = 24) -> bytes:
    """The bytes of a small picture; another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size // 4, size // 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(stream, kind)
    return stream.getvalue()


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive; `fields` are those of TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, members: Iterable, mode: str = "w:gz") -> Path:
    """Members are (name, bytes) or what `member` returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info, data = (name, data) if isinstance(name, tarfile.TarInfo) else member(name, data)
            archive.addfile(info, io.BytesIO(data) if data else None)
    return path


def row(number: int, instruction: str | None = None, folder: str = SURREAL, **more) -> dict:
    path = f"/Echo-4o-Image/{folder}/images/{number:05d}.jpg"
    text = f"row {number} of {folder}" if instruction is None else instruction
    return {"task_type": "t2i", "instruction": text, "output_image": path, "type": "T1"} | more


def reference_row(number: int, *references: str, folder: str = REFERENCE) -> dict:
    return {
        "instruction": f"row {number} of {folder}",
        "input_images": [f"/Echo-4o-Image/{folder}/images/{name}" for name in references],
        "output_image": f"/Echo-4o-Image/{folder}/images/{number:05d}.jpg",
    }


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def small_release(root: Path, rows: int = 6, per_archive: int = 3) -> Path:
    """A sound release of all three parts; each part has `rows` rows."""
    for seed, folder in ((0, SURREAL), (1000, FOLLOWING)):
        for start in range(0, rows, per_archive):
            numbers = range(start, min(start + per_archive, rows))
            name = f"{start}-{start + per_archive}.tar.gz"
            write_tar(root / folder / "images" / name, [(f"{n:05d}.jpg", picture(seed + n)) for n in numbers])
        write_rows(root / folder / "rows.jsonl", [row(n, folder=folder) for n in range(rows)])
    targets = [(f"{n:05d}.jpg", picture(2000 + n)) for n in range(rows)]
    references = [(f"r{n}.png", picture(3000 + n, "PNG")) for n in range(rows + 1)]
    write_tar(root / REFERENCE / "images" / "0-1.tar.gz", references[: rows // 2] + targets[rows // 2 :])
    write_tar(root / REFERENCE / "images" / "1-2.tar.gz", targets[: rows // 2] + references[rows // 2 :])
    write_rows(root / REFERENCE / "rows.jsonl", [reference_row(n, f"r{n}.png", f"r{n + 1}.png") for n in range(rows)])
    return root
