"""Writes converted checkpoints: files of weights, shards with their index, JSON.

A file gets its name when it is complete, and an interrupted conversion resumes with the first file that is missing.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .safetensors_stream import TensorCopy, is_written, split_shards, write_file
from .weights import StoredTensor, read_json, shortened

SHARD_BYTES = 2_000_000_000
_WEIGHTS = "diffusion_pytorch_model"
_MARKER = ".conversion.json"
_LARGE = 256_000_000  # bytes; a progress bar is shown from here on


def component_files(
    folder: Path, outputs: list[TensorCopy], shard_bytes: int = SHARD_BYTES, stem: str = _WEIGHTS
) -> dict[Path, list[TensorCopy]]:
    """The weight files of a component and the tensors of each.

    `stem` begins their names: the default is diffusers', "model" is transformers'.
    """
    shards = split_shards(outputs, shard_bytes)
    if len(shards) == 1:
        return {folder / f"{stem}.safetensors": shards[0]}
    return {folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards, 1)}


def write_weights(dst: Path, fingerprint: str, files: Mapping[Path, list[TensorCopy]]) -> None:
    """Write the weight files, and an index for each folder with shards. Files that are complete already are kept.

    Leaves a marker in `dst` with the fingerprint of the source, by which an interrupted conversion resumes; the caller
    calls `finish` after everything else is written.

    Raises:
        FileExistsError: `dst` holds something else than an interrupted conversion of the same source.
        OSError: there is not enough room.
    """
    if dst.exists() and not dst.is_dir():
        raise FileExistsError(f"{dst} is a file.")
    marker = dst / _MARKER
    if dst.is_dir() and any(dst.iterdir()):
        if not marker.is_file() or read_json(marker).get("source") != fingerprint:
            raise FileExistsError(
                f"{dst} is not empty, and not an interrupted conversion of the same weights; remove it."
            )
    dst.mkdir(parents=True, exist_ok=True)
    todo = {path: outputs for path, outputs in files.items() if not is_written(path, outputs)}
    total = sum(o.source.nbytes for outputs in todo.values() for o in outputs)
    free = shutil.disk_usage(dst).free
    if total > free:
        raise OSError(f"{dst} has room for {free / 1e9:.1f} GB, the conversion needs {total / 1e9:.1f} GB.")
    write_json(marker, {"source": fingerprint})
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=total < _LARGE) as bar:
        for path, outputs in todo.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, outputs, bar.update)
    for folder in {path.parent for path in files}:
        shards = {path: outputs for path, outputs in files.items() if path.parent == folder and "-of-" in path.name}
        if shards:
            _write_index(folder, shards)


def _write_index(folder: Path, shards: Mapping[Path, list[TensorCopy]]) -> None:
    total = sum(o.source.nbytes for outputs in shards.values() for o in outputs)
    weight_map = {o.name: path.name for path, outputs in shards.items() for o in outputs}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    stem = min(path.name for path in shards).rpartition("-of-")[0].rpartition("-")[0]
    write_json(folder / f"{stem}.safetensors.index.json", content)


def files_fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """Hash of the names, sizes and modification times of the files that hold these tensors."""
    files = sorted({t.file for t in tensors})
    facts = [(f.parent.name, f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def finish(dst: Path) -> None:
    """Remove the marker of an unfinished conversion."""
    (dst / _MARKER).unlink()


def copy_files(src: Path, dst: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that exist."""
    dst.mkdir(exist_ok=True)
    for name in names:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def raise_problems(folder: Path, problems: list[str]) -> None:
    """Raise ValueError with all problems of a checkpoint, if there are any."""
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ValueError(f"The checkpoint {folder} does not fit ({len(problems)}):\n  {shortened(problems)}")


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with sorted keys."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
