"""Rows for training, divided among processes. A run that is interrupted within an epoch resumes with the next row.

    rows = training_rows("echo-4o-image", streaming=True, process_index=0, num_processes=8, seed=1)
    for row in rows:            # one epoch; images are PIL images
        ...
    state = rows.state_dict()   # a few numbers; in a new process: rows.load_state_dict(state)

The order is a function of (seed, epoch, processes) alone, so a state is an epoch and a position. Map-style access
permutes all rows. Streaming permutes the row groups of all shards, divides them among the processes and permutes the rows
within windows of a few groups, so the state holds no rows.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Protocol

import datasets
import numpy as np

from echo4o.dataset_scripts.flow import ordered, read_ahead
from echo4o.dataset_scripts.names import ALL, SPLIT
from echo4o.dataset_scripts.row_groups import GroupOrder, RowGroups, StreamedRows

WINDOW = 4  # row groups whose rows are shuffled together, about 30 MB each
_AT_ONCE = 32  # rows fetched together from a map-style dataset


class RowOrder(Protocol):
    """The rows of one process in the order of each epoch."""

    signature: str

    def __len__(self) -> int: ...

    def rows(self, epoch: int, position: int) -> Generator[dict, None, None]:
        """The rows from a position on, images not decoded."""
        ...


class TrainingRows:
    """Iterates over the rest of the current epoch; the next iteration is the next epoch.

    Attributes:
        epoch, position: the rows of `epoch` before `position` have been handed out.
    """

    def __init__(self, order: RowOrder, features: datasets.Features, workers: int = 2, decode: bool = True):
        self.order, self.features, self.workers, self.decode = order, features, workers, decode
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Rows of this process in one epoch; processes differ by a row, or by a row group when streaming."""
        return len(self.order)

    def __iter__(self) -> Iterator[dict]:
        with closing(self._rows()) as rows:
            for row in rows:
                self.position += 1
                yield row
        self.epoch, self.position = self.epoch + 1, 0

    def _rows(self) -> Generator[dict, None, None]:
        raw = self.order.rows(self.epoch, self.position)
        if not self.decode:
            yield from raw
            return
        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="decode") as pool:
            jobs = ordered(
                lambda row: pool.submit(self.features.decode_example, row), raw, lambda row: 0, 1, 4 * self.workers
            )
            try:
                for _, job in jobs:
                    yield job.result()
            finally:
                raw.close()
                pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict:
        """The state from which `load_state_dict` continues with the next row."""
        return {"epoch": self.epoch, "position": self.position, "signature": self.order.signature}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved state. Raises ValueError if data, seed or processes differ."""
        if state["signature"] != self.order.signature:
            raise ValueError(
                "the state belongs to other rows: data, configuration, seed, shuffle, window, process_index and "
                "num_processes must be those of the run that saved it"
            )
        self.epoch, self.position = state["epoch"], state["position"]


def training_rows(
    data: str | Path | datasets.Dataset,
    configuration: str = ALL,
    *,
    streaming: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    window: int = WINDOW,
    workers: int = 2,
    decode: bool = True,
    columns: Sequence[str] | None = None,
) -> TrainingRows:
    """The rows that one of `num_processes` processes trains on.

    Args:
        data: a built folder, a Hub repository, or (map-style) a dataset that is already loaded.
        streaming: read the shards directly, instead of through the cache of `datasets`.
        window: row groups that are shuffled together when streaming; they are held in memory.
        workers: number of threads that decode images.
        decode: yield PIL images; otherwise {"bytes", "path"}.
        columns: read only these columns.

    Raises:
        ValueError: the process index is out of range, or the configuration does not exist.
    """
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index is {process_index}; with num_processes={num_processes} it is 0 to below that")
    share = (process_index, num_processes)
    if streaming:
        if isinstance(data, datasets.Dataset):
            raise ValueError("streaming needs a folder or a repository; a loaded dataset is map-style")
        order = _StreamOrder(parquet_files(data, configuration), share, seed, shuffle, window, columns)
        return TrainingRows(order, order.features, workers, decode)
    table = data if isinstance(data, datasets.Dataset) else _load(data, configuration)
    table = table.select_columns(list(columns)) if columns else table
    return TrainingRows(_MapOrder(table, share, seed, shuffle), table.features, workers, decode)


def _load(data: str | Path, configuration: str) -> datasets.Dataset:
    return datasets.load_dataset(str(data), _config_name(data, configuration), split=SPLIT)


def parquet_files(data: str | Path, configuration: str = ALL) -> list[str]:
    """The shards of a configuration, local paths or hf:// addresses."""
    builder = datasets.load_dataset_builder(str(data), _config_name(data, configuration))
    data_files = builder.config.data_files or {}
    return list(data_files[SPLIT])


def _config_name(data: str | Path, configuration: str) -> str:
    names = datasets.get_dataset_config_names(str(data))
    if configuration in names:
        return configuration
    if configuration == ALL and len(names) == 1:
        return names[0]
    raise ValueError(f"{data} has no configuration {configuration!r}; it has {', '.join(names)}")


def _sign(*facts) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class _MapOrder:
    """All rows permuted; process r of n takes every n-th, from the r-th on."""

    def __init__(self, table: datasets.Dataset, share: tuple[int, int], seed: int, shuffle: bool):
        self.features = table.features
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self.table, self.share, self.seed, self.shuffle = table.with_format(None), share, seed, shuffle
        ends = [table[i]["id"] for i in (0, len(table) - 1)] if len(table) and "id" in table.column_names else []
        self.signature = _sign("map", len(table), ends, share, seed, shuffle)

    def __len__(self) -> int:
        return len(range(self.share[0], len(self.table), self.share[1]))

    def rows(self, epoch: int, position: int) -> Generator[dict, None, None]:
        every = np.arange(len(self.table))
        if self.shuffle:
            every = np.random.default_rng([self.seed, epoch]).permutation(every)
        mine = every[self.share[0] :: self.share[1]][position:]
        batches = (mine[i : i + _AT_ONCE].tolist() for i in range(0, len(mine), _AT_ONCE))
        with closing(read_ahead((self.table[b] for b in batches), lambda b: 1, 1)) as fetched:
            for batch in fetched:
                names = list(batch)
                yield from (dict(zip(names, values)) for values in zip(*batch.values()))


class _StreamOrder:
    """Row groups permuted and dealt out; rows permuted inside windows of a process's groups."""

    def __init__(self, files: list[str], share, seed: int, shuffle: bool, window: int, columns):
        self.groups = RowGroups.of_parquet(files, columns)
        order = GroupOrder(self.groups.counts, share, seed=seed, shuffle=shuffle, window=window)
        self.streamed = StreamedRows(self.groups, order)
        self.features = self.groups.features
        names = [Path(file).name for file in files]
        self.signature = _sign("stream", names, self.groups.counts, share, seed, shuffle, window)

    def __len__(self) -> int:
        return len(self.streamed)

    def rows(self, epoch: int, position: int) -> Generator[dict, None, None]:
        for place in range(position, len(self.streamed)):
            yield self.groups.raw(self.streamed.number(epoch, place))
