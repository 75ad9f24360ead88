"""Reads rows by number from shards that are too large to load: a whole row group at a time, the last ones kept.

    groups = RowGroups.of_parquet(files)
    rows = StreamedRows(groups, GroupOrder(groups.counts, seed=1, window=4))
    for position in range(len(rows)):
        row = groups[rows.number(0, position)]

An order keeps to a few row groups at a time, so that each is read once per epoch. It is a function of its arguments: a
position is its whole state, and no row has to be stored or read again to resume.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, count
from typing import Any, TypeVar, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

T = TypeVar("T")
_TRIES = 5  # of one read; the waits between them are 1, 2, 4 and 8 seconds
_ROWS_PER_BLOCK = 100  # of a dataset in memory-mapped files, which has no row groups of its own


class GroupOrder:
    """The order in which one of several shares reads its rows, by number.

    Row groups are permuted once, divided among the shares, and permuted again in every epoch; rows are permuted within
    windows of a few groups.

    Args:
        counts: rows of every group, in the order of their numbers.
        share: index of the share and number of shares.
        shuffle: False keeps the stored order.
        window: row groups whose rows are permuted together.
        split_rows: with fewer groups than shares, every share reads all groups, in one window, and takes its part of
            the rows; otherwise some shares would have none.
    """

    def __init__(
        self,
        counts: Sequence[int],
        share: tuple[int, int] = (0, 1),
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 4,
        split_rows: bool = False,
    ):
        if window < 1:
            raise ValueError(f"window is {window}; it must be 1 or more")
        self.counts, self.share, self.seed, self.shuffle = list(counts), share, seed, shuffle
        self.starts = [0, *accumulate(counts)]
        self._by_rows = split_rows and len(self.counts) < share[1]
        self.window = max(1, len(self.counts)) if self._by_rows else window
        self._windows = lru_cache(maxsize=2)(self._find_windows)
        self._in_window = lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        """Rows of this share; the same in every epoch."""
        return self._windows(0)[1][-1]

    def windows(self, epoch: int) -> list[list[int]]:
        """The groups of each window, in reading order."""
        return self._windows(epoch)[0]

    def row(self, epoch: int, position: int) -> int:
        """The number of the row at a position of an epoch."""
        starts = self._windows(epoch)[1]
        number = bisect_right(starts, position) - 1
        return int(self._in_window(epoch, number)[position - starts[number]])

    def window_at(self, epoch: int, position: int) -> tuple[int, bool]:
        """The number of the window that a position is in, and whether it is in the second half of the window."""
        starts = self._windows(epoch)[1]
        number = bisect_right(starts, position) - 1
        return number, 2 * position >= starts[number] + starts[number + 1]

    def _find_windows(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The windows of an epoch, and the position at which each of them starts (and the last one ends)."""
        first, step = (0, 1) if self._by_rows else self.share
        dealt = list(range(len(self.counts)))
        if self.shuffle:  # neighbours in a shard are alike: assign them to different shares, once for all epochs
            dealt = np.random.default_rng([self.seed]).permutation(len(dealt)).tolist()
        mine = dealt[first::step]
        if self.shuffle:
            mine = [mine[i] for i in np.random.default_rng([self.seed, epoch, first]).permutation(len(mine))]
        windows = [mine[i : i + self.window] for i in range(0, len(mine), self.window)]
        sizes = [len(range(*self._part.indices(sum(self.counts[group] for group in groups)))) for groups in windows]
        return windows, [0, *accumulate(sizes)]

    @property
    def _part(self) -> slice:
        """The share's rows of a window."""
        return slice(self.share[0], None, self.share[1]) if self._by_rows else slice(None)

    def _permute(self, epoch: int, number: int) -> np.ndarray:
        """The row numbers of a window in their order."""
        groups = self.windows(epoch)[number]
        rows = np.concatenate([np.arange(self.starts[group], self.starts[group + 1]) for group in groups])
        if self.shuffle:
            first = 0 if self._by_rows else self.share[0]
            rows = np.random.default_rng([self.seed, epoch, first, number]).permutation(rows)
        return rows[self._part]


class RowGroups:
    """Rows of a dataset by number. Row groups are read on demand and ahead, with retries.

    Args:
        counts: rows of every group.
        read: the rows of a group, images not decoded. Called by several threads.
        features: the columns to yield and their decoding.
        stored: the same rows as an iterable dataset of `datasets`, in their stored order.
        held: row groups to keep in memory; the least recently used one goes first. [`StreamedRows`] adds its own.
    """

    def __init__(
        self,
        counts: Sequence[int],
        read: Callable[[int, list[str]], pa.Table],
        features: datasets.Features,
        stored: Callable[[], datasets.IterableDataset],
        held: int = 2,
    ):
        self.counts, self.features, self.stored, self.held = list(counts), features, stored, held
        self._read = read
        self._convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self._stored_names = list(features)
        self._starts = [0, *accumulate(counts)]
        self._tables: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, "row-groups")

    @classmethod
    def of_parquet(
        cls,
        files: Sequence[str],
        columns: Sequence[str] | None = None,
        features: datasets.Features | None = None,
    ) -> RowGroups:
        """The rows of Parquet files: local paths or hf:// addresses.

        Args:
            columns: read only these columns.
            features: how columns are decoded; None: as the files say.
        """
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(_footer, files))
        groups = [(file, group) for file, (counts, _) in zip(files, footers) for group in range(len(counts))]
        features = features or datasets.Features.from_arrow_schema(footers[0][1])
        chosen = datasets.Features({name: features[name] for name in columns or features})

        def read(number: int, names: list[str]) -> pa.Table:
            file, group = groups[number]
            return with_retries(lambda: _read_group(file, group, names), file)

        def stored() -> datasets.IterableDataset:
            files_of = {"train": list(files)}
            return datasets.load_dataset("parquet", data_files=files_of, features=features, streaming=True)["train"]

        return cls([count for counts, _ in footers for count in counts], read, chosen, stored)

    @classmethod
    def of_dataset(cls, dataset: datasets.Dataset) -> RowGroups:
        """The rows of a dataset in memory-mapped files."""
        table = dataset.with_format("arrow")
        blocks = range(0, len(dataset), _ROWS_PER_BLOCK)

        def read(number: int, names: list[str]) -> pa.Table:
            rows = cast(pa.Table, table[blocks[number] : blocks[number] + _ROWS_PER_BLOCK])
            return rows.select(names)

        counts = [min(_ROWS_PER_BLOCK, len(dataset) - start) for start in blocks]
        return cls(counts, read, dataset.features, dataset.to_iterable_dataset)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    @property
    def is_mapped(self) -> bool:
        """Whether these are the rows that [`mapped`] returns."""
        return self._convert is not None

    def mapped(self, convert: Callable[[dict[str, Any]], dict[str, Any]], features: datasets.Features) -> RowGroups:
        """The same rows after a function that maps each of them, images not decoded, to a row with other features."""
        groups = RowGroups(self.counts, self._read, features, self.stored)
        groups._convert, groups._stored_names = convert, self._stored_names
        return groups

    def cast_column(self, name: str, feature) -> RowGroups:
        """The same rows with a column decoded in another way, or not at all."""
        features = datasets.Features({**self.features, name: feature})
        if self._convert:
            return self.mapped(self._convert, features)
        return RowGroups(self.counts, self._read, features, lambda: self.stored().cast_column(name, feature))

    def select_columns(self, name: str) -> RowGroups:
        """The same rows with this column only."""
        features = datasets.Features({name: self.features[name]})
        if self._convert:
            return self.mapped(self._convert, features)
        return RowGroups(self.counts, self._read, features, lambda: self.stored().select_columns(name))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A row, images decoded. Raises OSError if it cannot be read, and what PIL raises if it does not decode."""
        return self.features.decode_example(self.raw(number))

    def select(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows, images decoded."""
        return (self[number] for number in numbers)

    def raw(self, number: int) -> dict[str, Any]:
        """A row, images as bytes."""
        group = bisect_right(self._starts, number) - 1
        row = self.table(group).slice(number - self._starts[group], 1).to_pylist()[0]
        if self._convert is None:
            return row
        converted = self._convert(row)
        return {name: converted[name] for name in self.features}

    def table(self, group: int) -> pa.Table:
        """The rows of a group."""
        self.prefetch([group])
        return self._tables[group].result()

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to read groups that will be needed soon."""
        for group in groups:
            failed = group in self._tables and self._tables[group].done() and self._tables[group].exception()
            if failed or group not in self._tables:
                self._tables[group] = self._threads.submit(self._read, group, self._stored_names)
            self._tables.move_to_end(group)
        while len(self._tables) > max(self.held, len(groups)):
            self._tables.popitem(last=False)[1].cancel()


class StreamedRows:
    """One share of the rows of row groups in its order; the groups of the next window are read ahead.

    Two windows of groups are kept in memory.
    """

    def __init__(self, groups: RowGroups, order: GroupOrder):
        self.groups, self.order = groups, order
        groups.held += 2 * order.window
        self._wanted: tuple[int, int, bool] | None = None

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.order)

    def number(self, epoch: int, position: int) -> int:
        """The number of the row at a position of an epoch; it is about to be read."""
        window, second_half = self.order.window_at(epoch, position)
        if self._wanted != (epoch, window, second_half):
            self._wanted = (epoch, window, second_half)
            windows = self.order.windows(epoch)
            wanted = list(windows[window])
            if second_half:  # not earlier: rows of the window before may still be waiting to be read
                wanted += windows[window + 1] if window + 1 < len(windows) else self.order.windows(epoch + 1)[0]
            self.groups.prefetch(wanted)
        return self.order.row(epoch, position)


def with_retries(function: Callable[[], T], name: str) -> T:
    """Call a function again when the Hub or the network fails for a moment. `name`: of what it reads."""
    for attempt in count():
        try:
            return function()
        except (FileNotFoundError, PermissionError, pa.ArrowInvalid):
            raise
        except Exception as error:
            if attempt == _TRIES - 1:
                raise OSError(f"{name} cannot be read: {error}") from error
            time.sleep(2**attempt)
    raise AssertionError  # the loop ends by itself


def open_file(file: str):
    """Open a local file or an hf:// address for reading at any place."""
    if "://" not in file:
        return open(file, "rb")
    from fsspec.core import url_to_fs

    system, path = url_to_fs(file)
    return system.open(path, "rb")


def _footer(file: str) -> tuple[list[int], pa.Schema]:
    """The number of rows of every row group of a Parquet file, and its columns."""

    def read() -> tuple[list[int], pa.Schema]:
        with open_file(file) as stream:
            parquet = pq.ParquetFile(stream)
            counts = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            return counts, parquet.schema_arrow

    return with_retries(read, file)


def _read_group(file: str, group: int, columns: list[str]) -> pa.Table:
    with open_file(file) as stream:
        return pq.ParquetFile(stream, pre_buffer=True).read_row_group(group, columns=columns)
