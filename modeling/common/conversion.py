"""Writes checkpoints: weight files, shards with their index, and JSON files.

All files are written durably. An interrupted conversion resumes with the first file that is missing.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from echo4o.common.files import replacing, write_text

from .safetensors_stream import TensorCopy, is_written, write_file
from .weights import StoredTensor, read_json, shortened

SHARD_BYTES = 2_000_000_000
_WEIGHTS = "diffusion_pytorch_model"
_MARKER = ".conversion.json"
_LARGE = 256_000_000  # bytes; larger conversions show a progress bar
Tensor = TypeVar("Tensor")


# --- weight files and shards -----------------------------------------------------------------------------------------


def shard_files(
    tensors: Iterable[Tensor], nbytes: Callable[[Tensor], int], max_bytes: int = SHARD_BYTES, stem: str = _WEIGHTS
) -> dict[str, list[Tensor]]:
    """Divide the tensors of a component into weight files: file name -> consecutive tensors.

    Args:
        nbytes: size of a tensor.
        max_bytes: of each file; a larger tensor has a file of its own.
        stem: beginning of the file names; the default is that of diffusers, "model" is that of transformers.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + nbytes(tensor) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes(tensor)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a component's shards. `weight_map`: tensor name -> file name."""
    stem = min(weight_map.values()).rpartition("-of-")[0].rpartition("-")[0]
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    write_json(folder / f"{stem}.safetensors.index.json", content)


# --- conversion ------------------------------------------------------------------------------------------------------


def component_files(
    folder: Path, copies: list[TensorCopy], shard_bytes: int = SHARD_BYTES, stem: str = _WEIGHTS
) -> dict[Path, list[TensorCopy]]:
    """The paths of a component's weight files and the tensors of each; see `shard_files`."""
    shards = shard_files(copies, lambda copy: copy.source.nbytes, shard_bytes, stem)
    return {folder / name: shard for name, shard in shards.items()}


def write_weights(dst: Path, fingerprint: str, files: Mapping[Path, list[TensorCopy]]) -> None:
    """Write the weight files, and an index for each folder with shards. Complete files are not written again.

    The marker file in `dst` with the fingerprint of the source makes it possible to resume an interrupted conversion.
    The caller calls `finish` after all other files are written.

    Raises:
        FileExistsError: `dst` is not empty and not an interrupted conversion of the same source.
        OSError: there is not enough space.
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
    todo = {path: copies for path, copies in files.items() if not is_written(path, copies)}
    total = sum(copy.source.nbytes for copies in todo.values() for copy in copies)
    free = shutil.disk_usage(dst).free
    if total > free:
        raise OSError(f"{dst} has {free / 1e9:.1f} GB free, but the conversion needs {total / 1e9:.1f} GB.")
    write_json(marker, {"source": fingerprint})
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=total < _LARGE) as bar:
        for path, copies in todo.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, copies, bar.update)
    for folder in {path.parent for path in files}:
        shards = {path: copies for path, copies in files.items() if path.parent == folder and "-of-" in path.name}
        if shards:
            weight_map = {copy.name: path.name for path, copies in shards.items() for copy in copies}
            write_index(folder, weight_map, sum(c.source.nbytes for copies in shards.values() for c in copies))


def files_fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """Hash of the names, sizes and modification times of the files that hold these tensors."""
    files = sorted({t.file for t in tensors})
    facts = [(f.parent.name, f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def finish(dst: Path) -> None:
    """Remove the marker file: the conversion is complete."""
    (dst / _MARKER).unlink()


def copy_files(src: Path, dst: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that exist."""
    dst.mkdir(exist_ok=True)
    for name in names:
        if (src / name).is_file():
            with replacing(dst / name) as partial:
                shutil.copyfile(src / name, partial)


def raise_problems(folder: Path, problems: list[str]) -> None:
    """Raise ValueError listing all problems of a checkpoint, if there are any."""
    problems = list(dict.fromkeys(problems))
    if problems:
        raise ValueError(f"The checkpoint {folder} does not fit ({len(problems)}):\n  {shortened(problems)}")


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with sorted keys."""
    write_text(file, json.dumps(value, indent=2, sort_keys=True) + "\n")
