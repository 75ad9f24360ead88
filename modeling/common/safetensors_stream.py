"""Writes safetensors files by copying bytes from other files.

Tensors are renamed and reshaped without decoding them: their bits do not change, and memory holds one chunk at a time.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from echo4o.common import files

from .weights import DTYPES, StoredTensor, read_header

CHUNK_BYTES = 8 << 20
# Unsigned view and mask of each float dtype: a value is infinite or NaN if all masked bits are set.
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
    """A tensor to write: the bytes of `source` under another name and a shape of the same size."""

    name: str
    shape: tuple[int, ...]
    source: StoredTensor


@dataclass(frozen=True)
class LoadedTensor(StoredTensor):
    """A tensor of a file in another format. `values` may be memory-mapped."""

    values: torch.Tensor

    @classmethod
    def of(cls, name: str, values: torch.Tensor, file: Path) -> "LoadedTensor":
        """A tensor with these values. Raises ValueError for a dtype that safetensors does not support."""
        names = {dtype: n for n, dtype in DTYPES.items()}
        if values.dtype not in names:
            raise ValueError(f"{file} holds {name!r} as {values.dtype}, which safetensors cannot store.")
        return cls(name, names[values.dtype], tuple(values.shape), file, 0, values.nbytes, values.contiguous())


def write_file(path: Path, copies: Iterable[TensorCopy], progress: Callable[[int], object] = lambda n: None) -> None:
    """Write a safetensors file durably: `path` exists only when the file is complete and flushed to the disk.

    `progress` is called with the number of bytes of each chunk. Raises ValueError at the first tensor with NaN or
    infinity and removes the unfinished file.
    """
    ordered = sorted(copies, key=_file_order)
    with files.replacing(path) as partial, open(partial, "wb") as stream:
        files.write(stream, _header(ordered))
        for chunk in _chunks(ordered):
            files.write(stream, chunk)
            progress(len(chunk))


def is_written(path: Path, copies: Iterable[TensorCopy]) -> bool:
    """Whether `path` is a complete file with exactly these names, dtypes and shapes."""
    if not path.is_file():
        return False
    try:
        found = {(t.name, t.dtype, t.shape) for t in read_header(path).values()}
    except ValueError:
        return False
    return found == {(o.name, o.source.dtype, o.shape) for o in copies}


def _file_order(copy: TensorCopy) -> tuple[int, str]:
    # The order of the safetensors library: with wide dtypes first, every tensor is aligned to its width.
    return -DTYPES[copy.source.dtype].itemsize, copy.name


def _header(copies: list[TensorCopy]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for copy in copies:
        stop = offset + copy.source.nbytes
        entries[copy.name] = {
            "dtype": copy.source.dtype,
            "shape": list(copy.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(copies: list[TensorCopy]) -> Iterator[bytes]:
    stream: BinaryIO | None = None
    file: Path | None = None
    try:
        for copy in copies:
            if isinstance(copy.source, LoadedTensor):
                yield from _loaded_chunks(copy.source)
                continue
            if stream is None or copy.source.file != file:
                if stream is not None:
                    stream.close()
                file = copy.source.file
                stream = open(file, "rb")
            yield from _tensor_chunks(stream, copy.source)
    finally:
        if stream is not None:
            stream.close()


def _tensor_chunks(stream: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
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
