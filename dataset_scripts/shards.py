"""Writes rows as one Parquet shard with content-defined pages, a page index and small row groups for streaming."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echo4o.common import files
from echo4o.dataset_scripts.features import features

ROW_GROUP_BYTES = 32 << 20
ROW_GROUP_ROWS = 1000
# The values that `datasets` writes with: two versions of a dataset share the pages that did not change.
CHUNKING = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}
_IMAGES = ("image.bytes", "reference_images.list.element.bytes")
_WORDS = ("task", "category", "source")
_TEXTS = ("id", "instruction", "metadata", "image.path", "reference_images.list.element.path")
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


class ShardWriter:
    """Writes one shard, under a temporary name until `finish`."""

    def __init__(self, path: Path, row_group_bytes: int = ROW_GROUP_BYTES):
        self.schema = features().arrow_schema
        self.row_group_bytes = row_group_bytes
        self.file = HashingFile(path)
        self.rows: list[dict] = []
        self.waiting = 0  # bytes in `rows`
        self.bytes = 0  # of all rows
        self.groups: list[int] = []
        self.categories: dict[str, Counter] = {}
        # The annotations of pyarrow know single values only; per column and with sizes is documented as well.
        options: dict[str, Any] = {
            "compression": {name: "none" for name in _IMAGES} | {name: "snappy" for name in (*_WORDS, *_TEXTS)},
            "use_dictionary": list(_WORDS),
            "use_content_defined_chunking": CHUNKING,
        }
        self.writer = pq.ParquetWriter(self.file, self.schema, write_page_index=True, **options)

    def add(self, row: dict) -> None:
        """Adds a row; writes a row group when enough rows are waiting."""
        size = row_bytes(row)
        self.rows.append(row)
        self.waiting += size
        self.bytes += size
        self.categories.setdefault(row["category"], Counter()).update(rows=1, bytes=size)
        if self.waiting >= self.row_group_bytes or len(self.rows) >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self) -> dict:
        """Complete and rename the file. Returns the facts for the manifest."""
        if self.rows:
            self._flush()
        self.writer.add_key_value_metadata({"content_defined_chunking": json.dumps(CHUNKING)})
        self.writer.close()
        self.file.finish()
        return {
            "rows": sum(self.groups),
            "bytes": self.file.size,
            "sha256": self.file.digest.hexdigest(),
            "row_groups": self.groups,
            "content_bytes": self.bytes,
            "categories": {name: dict(count) for name, count in sorted(self.categories.items())},
        }

    def give_up(self) -> None:
        """Remove the temporary file."""
        try:
            self.writer.close()
        except (OSError, pa.ArrowException):
            pass  # the footer cannot be written either
        self.file.give_up()

    def _flush(self) -> None:
        rows, self.rows, self.waiting = self.rows, [], 0
        self.groups.append(len(rows))
        self.writer.write_table(to_table(rows, self.schema), row_group_size=len(rows))


def row_bytes(row: dict) -> int:
    """Approximate size of a row in bytes."""
    images = sum(len(image["bytes"]) for image in (row["image"], *row["reference_images"]))
    return images + len(row["instruction"]) + len(row["metadata"] or "") + 100


def to_table(rows: list[dict], schema: pa.Schema) -> pa.Table:
    """Rows as a table; image bytes are copied once."""
    columns = []
    for name in schema.names:
        values = [row[name] for row in rows]
        if name == "image":
            columns.append(_images(values))
        elif name == "reference_images":
            offsets = [0]
            for images in values:
                offsets.append(offsets[-1] + len(images))
            flat = _images([image for images in values for image in images])
            columns.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat))
        else:
            columns.append(pa.array(values, pa.string()))
    return pa.Table.from_arrays([c.cast(schema.field(i).type) for i, c in enumerate(columns)], schema=schema)


def _images(images: list[dict]) -> pa.StructArray:
    data = pa.array([image["bytes"] for image in images], pa.binary())
    paths = pa.array([image["path"] for image in images], pa.string())
    return pa.StructArray.from_arrays([data, paths], fields=list(_IMAGE))


class HashingFile:
    """A file written under a temporary name until `finish`. `digest` is the hash of its content."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.stream = open(self.partial, "wb")
        self.digest, self.size = hashlib.sha256(), 0
        self.closed = False

    def write(self, data) -> int:
        files.write(self.stream, data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Called by pyarrow; the file stays open until it is finished or given up."""

    def finish(self) -> None:
        files.sync(self.stream)
        self.stream.close()
        files.rename(self.partial, self.path)

    def give_up(self) -> None:
        self.stream.close()
        self.partial.unlink(missing_ok=True)
