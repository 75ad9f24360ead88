"""Reads the names, dtypes and shapes of stored tensors from the headers of safetensors files.

This file is published beside the pipeline's: it imports nothing of the package.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

# safetensors' name -> torch's
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32},
    **{"I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `nbytes` bytes of `file` from byte `start` on, row-major.

    `dtype` is the name of the dtype in the safetensors format.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_header(file: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, without their values.

    Raises ValueError when the file is no safetensors file, is truncated, is longer than its header says, or when its
    tensors overlap or leave bytes out.
    Format: 8 bytes of little-endian length, a JSON header of that length, the data.
    """
    file = Path(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        first = stream.read(8)
        if first == b"version ":
            raise ValueError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in that folder.")
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{file} ({size} bytes) is not a safetensors file: its header length is {length}.")
        raw = stream.read(length)
    if len(raw) < length:
        raise ValueError(f"{file} is truncated: its header needs {8 + length} bytes, the file has {size}.")
    try:
        header = {k: v for k, v in json.loads(raw).items() if k != "__metadata__"}
        tensors = {name: _stored_tensor(name, entry, file, 8 + length) for name, entry in header.items()}
        _require_tiling(tensors.values(), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a damaged safetensors header: {error}.") from error
    needed = max((t.start + t.nbytes for t in tensors.values()), default=8 + length)
    if size != needed:
        what = "is truncated" if size < needed else "is longer than its header says"
        raise ValueError(f"{file} {what}: the header describes {needed} bytes, the file has {size}.")
    return tensors


def _stored_tensor(name: str, entry: dict, file: Path, data_start: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    if any(type(n) is not int or n < 0 for n in (start, stop, *entry["shape"])):
        raise ValueError(f"tensor {name!r} of shape {entry['shape']} cannot lie at {[start, stop]}")
    if stop - start != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"tensor {name!r} of shape {entry['shape']} cannot be {stop - start} bytes long")
    return StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, data_start + start, stop - start)


def _require_tiling(tensors: Iterable[StoredTensor], data_start: int) -> None:
    end = data_start
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            what = "overlaps another" if tensor.start < end else "follows bytes of no tensor"
            raise ValueError(f"tensor {tensor.name!r} {what}")
        end += tensor.nbytes


def component_tensors(folder: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """All tensors stored in a component's folder, by name, from one file or from shards with an index.

    Raises FileNotFoundError without safetensors weights, ValueError when only pickled weights are there or a file is
    damaged, and what indexed_tensors raises.
    """
    suffix = f".{variant}" if variant and any(folder.glob(f"*.{variant}*.safetensors*")) else ""
    files = sorted(
        f for f in folder.glob("*.safetensors") if f.name.count(".") == 1 + bool(suffix) and suffix in f.name
    )
    indexes = [
        f
        for f in folder.glob("*.safetensors.index*.json")
        if suffix in f.name and f.name.count(".") == 3 + bool(suffix)
    ]
    if indexes:
        return indexed_tensors(indexes[0])
    if not files:
        refuse_pickles(folder)
        raise FileNotFoundError(
            f"{folder} holds no .safetensors weights (pickled ones are neither fetched nor loaded)."
        )
    return _joined(files)


def indexed_tensors(index: Path) -> dict[str, StoredTensor]:
    """The tensors that a `*.safetensors.index.json` names, by name: those are what diffusers and transformers load.

    Raises ValueError for an index that names anything else or tensors that its files do not hold, or a damaged shard,
    and FileNotFoundError for a shard that is not there.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files.")
    names = sorted(set(weight_map.values()))
    bad = [n for n in names if Path(n).name != n or "\\" in n or not n.endswith(".safetensors")]
    if bad:
        raise ValueError(f"{index} names files that are not loaded: {', '.join(bad)}.")
    lost = [n for n in names if not (index.parent / n).is_file()]
    if lost:
        raise FileNotFoundError(f"{index} names files that are not in its folder: {', '.join(lost)}.")
    stored = _joined([index.parent / n for n in names])
    if absent := sorted(set(weight_map) - set(stored)):
        raise ValueError(f"{index} names tensors that its files do not hold: {shortened(absent, ', ')}.")
    return {name: stored[name] for name in weight_map}


def _joined(files: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        if twice := sorted(set(header) & set(tensors)):
            raise ValueError(f"{file.parent} stores tensors in more than one file: {shortened(twice, ', ')}.")
        tensors |= header
    return tensors


def shortened(lines: list[str], separator: str = "\n  ", limit: int = 50) -> str:
    """Join at most `limit` lines, followed by the number of the other ones."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return separator.join([*lines[:limit], *more])


def refuse_pickles(folder: Path, pattern: str = "*") -> None:
    """Raise ValueError naming the pickled weight files that match a pattern, if there are any."""
    pickles = sorted(f.name for f in folder.glob(pattern) if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({', '.join(pickles)}) and no safetensors weights. Pickles can run code and are not "
            "loaded: use or make a .safetensors file."
        )


def main_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype | None:
    """The floating dtype of most bytes; None without floating tensors.

    Float8 weights give bfloat16, because float8 is not used to compute.
    """
    sums: dict[str, int] = {}
    for tensor in tensors.values():
        if DTYPES[tensor.dtype].is_floating_point:
            sums[tensor.dtype] = sums.get(tensor.dtype, 0) + tensor.nbytes
    if not sums:
        return None
    dtype = DTYPES[max(sums, key=lambda name: sums[name])]
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def nonfinite_names(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the floating tensors with NaN or infinity. Reads every tensor once and makes no copies."""
    bad = []
    for name, tensor in named_tensors:
        # aminmax propagates NaN. It does not support one-byte floats and the tensor classes of quantized weights.
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if (
            plain
            and tensor.is_floating_point()
            and tensor.element_size() > 1
            and tensor.numel()
            and not tensor.is_meta
        ):
            low, high = torch.aminmax(tensor.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    return bad


def read_json(file: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError with the name of the file if it contains anything else."""
    try:
        value = json.loads(Path(file).read_text("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object.")
    return value
