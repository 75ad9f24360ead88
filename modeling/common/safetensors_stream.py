"""Writes safetensors files by copying bytes from others.

A converter only renames and reshapes, so nothing needs decoding: every dtype is kept bit for bit, and memory holds one
chunk at a time, whatever the checkpoint's size.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .weights import DTYPES, StoredTensor, read_header

CHUNK_BYTES = 8 << 20
# Unsigned view and mask of each float dtype: a value is infinite or NaN when all masked bits are set.
_NONFINITE = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}


@dataclass(frozen=True)
class TensorCopy:
    """One tensor of a file to be written: the bytes of `source` under a new name and shape of equal size."""

    name: str
    shape: tuple[int, ...]
    source: StoredTensor


@dataclass(frozen=True)
class LoadedTensor(StoredTensor):
    """A tensor of a file that is not in the safetensors format; `values` may be mapped from the file."""

    values: torch.Tensor

    @classmethod
    def of(cls, name: str, values: torch.Tensor, file: Path) -> "LoadedTensor":
        """Raises ValueError for a dtype that safetensors has no name for."""
        names = {dtype: n for n, dtype in DTYPES.items()}
        if values.dtype not in names:
            raise ValueError(f"{file} holds {name!r} as {values.dtype}, which safetensors cannot store.")
        return cls(name, names[values.dtype], tuple(values.shape), file, 0, values.nbytes, values.contiguous())


def write_file(path: Path, outputs: Iterable[TensorCopy], progress: Callable[[int], object] = lambda n: None) -> None:
    """Write a safetensors file under a temporary name and rename it when it is complete.

    `progress` is told the number of bytes after each chunk. Raises ValueError at the first tensor with NaN or
    infinity; nothing is left behind then.
    """
    ordered = sorted(outputs, key=_file_order)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(_header(ordered))
            for chunk in _chunks(ordered):
                stream.write(chunk)
                progress(len(chunk))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_written(path: Path, outputs: Iterable[TensorCopy]) -> bool:
    """Whether `path` is a complete file with exactly these names, dtypes and shapes."""
    if not path.is_file():
        return False
    try:
        found = {(t.name, t.dtype, t.shape) for t in read_header(path).values()}
    except ValueError:
        return False
    return found == {(o.name, o.source.dtype, o.shape) for o in outputs}


def split_shards(outputs: Iterable[TensorCopy], max_bytes: int) -> list[list[TensorCopy]]:
    """Consecutive groups of at most `max_bytes` of data each; a larger tensor gets a group of its own."""
    shards: list[list[TensorCopy]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.source.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.source.nbytes
    return shards


def _file_order(output: TensorCopy) -> tuple[int, str]:
    # As the safetensors library does: wide dtypes first keeps every tensor aligned to its own width.
    return -DTYPES[output.source.dtype].itemsize, output.name


def _header(outputs: list[TensorCopy]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        stop = offset + output.source.nbytes
        entries[output.name] = {
            "dtype": output.source.dtype,
            "shape": list(output.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(outputs: list[TensorCopy]) -> Iterator[bytes]:
    file = stream = None
    try:
        for output in outputs:
            if isinstance(output.source, LoadedTensor):
                yield from _loaded_chunks(output.source)
                continue
            if output.source.file != file:
                if stream is not None:
                    stream.close()
                file = output.source.file
                stream = open(file, "rb")
            yield from _tensor_chunks(stream, output.source)
    finally:
        if stream is not None:
            stream.close()


def _tensor_chunks(stream, tensor: StoredTensor) -> Iterator[bytes]:
    stream.seek(tensor.start)
    left = tensor.nbytes
    while left:
        chunk = stream.read(min(CHUNK_BYTES, left))
        if not chunk:
            raise ValueError(f"{tensor.file} became shorter while it was read.")
        left -= len(chunk)
        _require_finite(chunk, tensor)
        yield chunk


def _loaded_chunks(tensor: LoadedTensor) -> Iterator[bytes]:
    values = tensor.values.detach().flatten().view(torch.uint8).numpy()
    for start in range(0, len(values), CHUNK_BYTES):
        chunk = values[start : start + CHUNK_BYTES].tobytes()
        _require_finite(chunk, tensor)
        yield chunk


def _require_finite(chunk: bytes, tensor: StoredTensor) -> None:
    if tensor.dtype in _NONFINITE:
        word, mask = _NONFINITE[tensor.dtype]
        bits = np.frombuffer(chunk, dtype=word) & word(mask)
        if bits.size and int(bits.max()) == mask:
            raise ValueError(f"{tensor.file} holds non-finite values (NaN or infinity) in {tensor.name!r}.")
