"""The rows of a run: their sources, the order in which they are read, and a cache of prepared rows.

The order depends on the recipe, not on the number of processes. Its state is the number of rows taken from each source,
so a resumed run continues without reading earlier rows again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from PIL import Image

from echo4o.common.hub_names import is_repository_name
from echo4o.dataset_scripts.row_groups import GroupOrder, RowGroups, StreamedRows
from echo4o.training.backbones.base import PreparedRow, RowPreparation, TrainingSample
from echo4o.training.columns import FEATURES, FIELDS, MappedRows, RowMapping
from echo4o.training.recipe import DataSource, RecipeError
from echo4o.training.row_filters import kept_numbers

UNREADABLE = (ValueError, OSError, SyntaxError, Image.DecompressionBombError)  # PIL raises these for bad images
BARE_NAME = "echo-4o-image"  # `datasets` finds it without a namespace once echo4o is imported
MAP_STYLE = (datasets.Dataset, MappedRows)
RowSource = datasets.Dataset | MappedRows | RowGroups | datasets.IterableDataset
COLUMNS = ("id", "instruction", "reference_images", "image")
# rows; with images of 1 MB, about 256 MB for each pack of a process, because the next rows are read ahead
SHUFFLE_BUFFER = 128


class RowRef(NamedTuple):
    """One reading of one row: its source, the epoch and its number in the source."""

    source: int
    epoch: int
    row: int


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


class SampledOrder:
    """Endless order over all sources: a source is sampled by weight, and each source is shuffled in every epoch.

    Args:
        rows: number of rows of each source.
        weights: of each source.
        start, stride: yield every `stride`-th row from `start` on (the rows of one lane).
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], seed: int, start: int = 0, stride: int = 1):
        self.rows, self.seed, self.start, self.stride = list(rows), seed, start, stride
        self._bounds = [total / sum(weights) for total in accumulate(weights)]
        self.drawn = [0] * len(rows)  # rows taken from each source, over all lanes: the whole state

    def _source(self, draw: int) -> int:
        if len(self.rows) == 1:
            return 0
        chance = random.Random(self.seed * 1_000_003 + draw).random()
        return next(i for i, bound in enumerate(self._bounds) if chance < bound or i == len(self._bounds) - 1)

    def __iter__(self) -> SampledOrder:
        return self

    def __next__(self) -> RowRef:
        while True:
            draw = sum(self.drawn)
            source = self._source(draw)
            count, rows = self.drawn[source], self.rows[source]
            self.drawn[source] += 1
            if draw % self.stride == self.start:
                epoch, place = divmod(count, rows)
                return RowRef(source, epoch, _permutation(rows, self.seed + 7919 * source, epoch)[place])

    def state(self) -> dict:
        return {"drawn": list(self.drawn)}

    def load_state(self, state: dict) -> None:
        # Version 0.1 wrote the same numbers of a lane as its place.
        self.drawn = list(state["drawn"] if "drawn" in state else state["place"])


class MapStyleShare:
    """Every `stride`-th row of a permutation of all rows, from `start` on."""

    def __init__(self, rows: int, start: int, stride: int, seed: int):
        self.rows, self.start, self.stride, self.seed = rows, start, stride, seed

    def __len__(self) -> int:
        return len(range(self.start, self.rows, self.stride))

    def number(self, epoch: int, position: int) -> int:
        """The number of the row at a position of an epoch."""
        return _permutation(self.rows, self.seed, epoch)[self.start + position * self.stride]


class StreamedOrder:
    """Endless order of one lane, for runs with at least one streamed source.

    A source is sampled by weight for every row. Each source is divided among the lanes, so that a lane reads few row
    groups at a time.

    Args:
        shares: the lane's share of each source.
        weights: of each source.
        lane: number of the lane.
    """

    def __init__(self, shares: Sequence[MapStyleShare | StreamedRows], weights: Sequence[float], seed: int, lane: int):
        if not all(map(len, shares)):
            raise RecipeError("A streamed dataset has no rows for one of the packs of a step.")
        self.shares, self.seed, self.lane = list(shares), seed, lane
        self._bounds = [total / sum(weights) for total in accumulate(weights)]
        self.drawn = [0] * len(shares)  # rows taken from each source
        facts = [list(weights), seed, lane, *(_describe(share) for share in shares)]
        self.signature = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __iter__(self) -> StreamedOrder:
        return self

    def __next__(self) -> RowRef:
        chance = random.Random(f"{self.seed} {self.lane} {sum(self.drawn)}").random()
        source = next((i for i, bound in enumerate(self._bounds) if chance < bound), len(self._bounds) - 1)
        epoch, position = divmod(self.drawn[source], len(self.shares[source]))
        self.drawn[source] += 1
        return RowRef(source, epoch, self.shares[source].number(epoch, position))

    def state(self) -> dict:
        return {"drawn": list(self.drawn), "order": self.signature}

    def load_state(self, state: dict) -> None:
        if state["order"] != self.signature:
            raise RecipeError(
                "The run that is resumed streamed other rows, or in another order: seed, packing.packs_per_step and the "
                "datasets with their weights and shuffle_buffer must be the same."
            )
        self.drawn = list(state["drawn"])


def _describe(share: MapStyleShare | StreamedRows) -> list:
    """The values that determine the order of a share."""
    if isinstance(share, MapStyleShare):
        return ["map", share.rows, share.start, share.stride, share.seed]
    order = share.order
    return ["stream", order.counts, order.share, order.seed, order.shuffle, order.window]


class StoredOrder:
    """Endless order of one lane over a single dataset in its stored order: every `stride`-th row.

    Used for datasets without row groups and for runs begun with version 0.1. A row's number is its position among the
    lane's own rows; resuming reads all rows before that position again.
    """

    def __init__(self, dataset: datasets.IterableDataset, start: int = 0, stride: int = 1):
        from datasets.distributed import split_dataset_by_node

        self.dataset = split_dataset_by_node(dataset, rank=start, world_size=stride)
        self.taken = 0
        self.epoch = 0
        self._rows: Iterator[dict] | None = None
        self._before: str | None = None  # id of the previous row

    def next(self) -> tuple[RowRef, dict]:
        """The next row and its reference."""
        for _ in range(2):
            if self._rows is None:
                self._rows = islice(iter(self.dataset), self.taken, None)
            try:
                row = next(self._rows, None)
            except UNREADABLE as error:
                position = f"after row {self._before}" if self._before else "at the start"
                raise ValueError(f"The streamed row {position} cannot be read: {error}") from error
            if row is not None:
                self.taken, self._before = self.taken + 1, row["id"]
                return RowRef(0, self.epoch, self.taken - 1), row
            if self.taken == 0:
                break
            self._rows, self.taken, self.epoch = None, 0, self.epoch + 1
        raise RecipeError("A streamed dataset has no rows for one of the packs of a step.")

    def again(self, refs: Sequence[RowRef]) -> dict[RowRef, dict]:
        """Rows that were read before, by reference."""
        wanted = {ref.row: ref for ref in refs}
        rows = enumerate(islice(iter(self.dataset), max(wanted, default=-1) + 1))
        return {wanted[index]: row for index, row in rows if index in wanted}

    def state(self) -> dict:
        return {"place": [self.epoch, self.taken]}

    def load_state(self, state: dict) -> None:
        self.epoch, self.taken = state["place"]


class PreparedRows:
    """All sources of a run, and a bounded cache of their prepared rows.

    Args:
        sources: datasets (`datasets.Dataset`), row groups to stream, or one iterable dataset in its stored order.
        cache_bytes: upper limit of memory for prepared rows; the least recently used are dropped first.
        shuffle_buffers: of each source, rows to shuffle together if it is streamed.
        on_bad: called with the message of a row that cannot be read; the next readable one of its source takes its
            place, which is the same row on every process. None: raise ValueError.
    """

    def __init__(
        self,
        sources: Sequence,
        weights: Sequence[float],
        backbone: RowPreparation,
        seed: int,
        cache_bytes: int,
        shuffle_buffers: Sequence[int] = (),
        on_bad: Callable[[str], None] | None = None,
    ):
        self.sources, self.weights, self.backbone, self.seed = list(sources), list(weights), backbone, seed
        self.shuffle_buffers = list(shuffle_buffers) or [SHUFFLE_BUFFER] * len(self.sources)
        self.on_bad = on_bad
        self._bad: set[tuple[int, int]] = set()
        self._cache: OrderedDict[tuple[int, int], PreparedRow] = OrderedDict()
        self._room = cache_bytes

    def order(self, start: int = 0, stride: int = 1) -> SampledOrder | StreamedOrder:
        """The order of one of `stride` lanes."""
        if not any(isinstance(source, RowGroups) for source in self.sources):
            return SampledOrder([len(source) for source in self.sources], self.weights, self.seed, start, stride)
        shares = [self._share(number, start, stride) for number in range(len(self.sources))]
        return StreamedOrder(shares, self.weights, self.seed, start)

    def _share(self, number: int, start: int, stride: int) -> MapStyleShare | StreamedRows:
        source, seed, buffer = self.sources[number], self.seed + 7919 * number, self.shuffle_buffers[number]
        if not isinstance(source, RowGroups):
            return MapStyleShare(len(source), start, stride, seed)
        window = max(1, -(-buffer * len(source.counts) // max(1, len(source))))
        share = (start, stride)
        order = GroupOrder(source.counts, share, seed=seed, shuffle=buffer > 0, window=window, split_rows=True)
        return StreamedRows(source, order)

    def lane(self, start: int, stride: int, state: dict | None = None) -> SampledOrder | StreamedOrder | StoredOrder:
        """The order of the rows of a packing lane.

        Args:
            state: a saved state that the order must be able to load.
        """
        first = self.sources[0]
        if isinstance(first, datasets.IterableDataset):
            return StoredOrder(first, start, stride)
        if isinstance(first, RowGroups) and state is not None and "place" in state:
            return StoredOrder(first.stored(), start, stride)  # begun by version 0.1
        return self.order(start, stride)

    def samples(self, refs: Sequence[RowRef], known: dict[RowRef, dict] | None = None) -> list[TrainingSample]:
        """The samples for `refs`, in their order.

        Args:
            known: rows already read from a stream.
        """
        if known is not None:
            prepared = self._prepare([known[ref] for ref in refs])
            return [self._sample(row, ref) for ref, row in zip(refs, prepared)]
        held = {key: self._cache[key] for key in {(r.source, r.row) for r in refs} if key in self._cache}
        for source, dataset in enumerate(self.sources):
            new = sorted({r.row for r in refs if r.source == source and (source, r.row) not in held})
            if new:
                prepared = self._read_prepared(source, dataset, new)
                held |= {(source, row): result for row, result in zip(new, prepared)}
        for key, prepared_row in held.items():
            self._remember(key, prepared_row)
        return [self._sample(held[ref.source, ref.row], ref) for ref in refs]

    def _read_prepared(self, source: int, dataset, numbers: list[int]) -> Sequence[PreparedRow]:
        try:
            return self._prepare(_read(dataset, numbers))
        except UNREADABLE:
            if self.on_bad is None:
                raise
            return [self._readable(source, dataset, number) for number in numbers]

    def _readable(self, source: int, dataset, number: int) -> PreparedRow:
        """The row of this number, or the first readable one after it."""
        for candidate in [*range(number, len(dataset)), *range(number)]:
            if (source, candidate) in self._bad:
                continue
            try:
                return self._prepare(_read(dataset, [candidate]))[0]
            except UNREADABLE as error:
                problem = str(error)
            self._bad.add((source, candidate))
            assert self.on_bad is not None
            self.on_bad(problem)
        raise ValueError(f"None of the {len(dataset)} rows can be read.")

    def _prepare(self, rows: list[dict]) -> Sequence[PreparedRow]:
        for row in rows:
            if not str(row["instruction"] or "").strip():
                raise ValueError(f"Row {row['id']}: its instruction is empty.")
        try:
            return self.backbone.prepare(rows)
        except UNREADABLE:
            for row in rows:  # one by one, so that the message names the row
                try:
                    self.backbone.prepare([row])
                except UNREADABLE as error:
                    raise ValueError(f"Row {row['id']}: {error}") from error
            raise

    def _sample(self, row: PreparedRow, ref: RowRef) -> TrainingSample:
        return self.backbone.sample(row, ref.epoch)

    def _remember(self, key: tuple[int, int], row: PreparedRow) -> None:
        if key in self._cache:
            self._cache.move_to_end(key)
            return
        self._cache[key] = row
        self._room -= row.nbytes
        while self._room < 0:
            self._room += self._cache.popitem(last=False)[1].nbytes


def _read(dataset, numbers: Sequence[int]) -> list[dict]:
    """Rows with decoded images. Raises ValueError naming the row that does not decode."""
    try:
        return list(dataset.select(numbers))
    except UNREADABLE:
        for number in numbers:
            try:
                dataset[number]
            except UNREADABLE as error:
                raise ValueError(f"Row {_id_of(dataset, number)}cannot be read: {error}") from error
        raise


def _id_of(dataset, number: int) -> str:
    try:
        return f"{dataset.select_columns('id')[number]['id']} (number {number}) "
    except UNREADABLE:  # ids are hashes of rows
        return f"number {number} "


def mixing_weights(sections: Sequence[DataSource], sources: Sequence, mixing: str) -> list[float]:
    """The probability of each source, up to a factor. `mixing`: "draws", or "epochs" (weights count epochs)."""
    return [data.weight * (len(source) if mixing == "epochs" else 1) for data, source in zip(sections, sources)]


def open_sources(sections: Sequence[DataSource], packing: bool = False, targets: bool = True) -> list[RowSource]:
    """Open the datasets of a recipe's `data`. Raises RecipeError naming the one that cannot be opened.

    Args:
        packing: whether the recipe packs samples.
        targets: whether rows need a target image; without, only prompts and references are read.
    """
    sources = [_open(data, targets) for data in sections]
    for data, source in zip(sections, sources):
        if isinstance(source, datasets.IterableDataset) and (len(sources) > 1 or not packing):
            raise RecipeError(
                f"data.path={data.path}: several datasets, or one without packing, are streamed by row number, which needs "
                "Parquet files or a dataset saved by `save_to_disk`. Set streaming: false."
            )
    return sources


def _open(data: DataSource, targets: bool) -> RowSource:
    folder = Path(data.path)
    if not folder.exists() and not is_repository_name(data.path) and data.path != BARE_NAME and "://" not in data.path:
        raise RecipeError(f"data.path={data.path}: there is no such folder (a Hub repository is called owner/name).")
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            dataset = _saved(data)
        else:
            dataset = _streamed(data) if data.streaming else _loaded(data)
    except RecipeError:
        raise
    except Exception as error:  # the readers of `datasets` raise exceptions of any type
        text = (str(error).strip().splitlines() or [repr(error)])[0].strip("\"'")
        what = text if folder.exists() else f"there is no such folder, and on the Hub: {text}"
        raise RecipeError(f"data.path={data.path} cannot be opened: {what}") from error
    if not isinstance(dataset, datasets.IterableDataset) and not len(dataset):
        raise RecipeError(f"data.path={data.path} has no rows.")
    if not targets:
        return _prompts(data, dataset)
    if data.columns is not None:
        return _mapped(data, dataset)
    given = dataset.column_names  # None if a stream does not know them
    missing = [name for name in COLUMNS if given is not None and name not in given]
    if given is not None and missing:
        raise RecipeError(
            f"data.path={data.path} has no column {', '.join(missing)}; training reads {', '.join(COLUMNS)} "
            f"(and answer, for questions), and there are: {', '.join(given)}. Name others in data.columns; "
            f"`echo4o dataset inspect {data.path}` proposes them."
        )
    if isinstance(dataset, datasets.Dataset):
        kept = kept_numbers(dataset, data, RowMapping(data, dataset.column_names))
        return dataset if kept is None else dataset.select(kept)
    return dataset


def _prompts(data: DataSource, dataset: RowSource) -> MappedRows:
    """The prompts and references of a dataset, in the columns that training reads."""
    if not isinstance(dataset, datasets.Dataset):
        raise RecipeError(f"data.path={data.path}: prompts are read by row number: set streaming: false.")
    mapping = RowMapping(data, dataset.column_names, targets=False)
    kept = kept_numbers(dataset, data, mapping)
    rows = MappedRows(dataset, mapping)
    return (rows if kept is None else rows.select(kept)).select_columns([name for name in FIELDS if name != "image"])


def _mapped(data: DataSource, dataset: RowSource) -> MappedRows | RowGroups:
    """The dataset with the columns that training reads."""
    if isinstance(dataset, datasets.IterableDataset):
        raise RecipeError(
            f"data.path={data.path}: columns of a streamed dataset need Parquet files, or one saved by `save_to_disk`. "
            "Set streaming: false."
        )
    mapping = RowMapping(data, dataset.column_names)
    if isinstance(dataset, RowGroups):
        return dataset.mapped(mapping, FEATURES)
    assert isinstance(dataset, datasets.Dataset)
    kept = kept_numbers(dataset, data, mapping)
    rows = MappedRows(dataset, mapping)
    return rows if kept is None else rows.select(kept)


def _loaded(data: DataSource) -> datasets.Dataset:
    dataset = datasets.load_dataset(data.path, data.name, split=data.split)
    assert isinstance(dataset, datasets.Dataset)
    return dataset


def _saved(data: DataSource) -> datasets.Dataset | RowGroups:
    """A dataset written by `save_to_disk`: a single split, or one of several."""
    dataset = datasets.load_from_disk(data.path)
    if data.name is not None:
        raise RecipeError(f"data.name={data.name} has no effect: {data.path} was saved from a single configuration.")
    if isinstance(dataset, datasets.DatasetDict):
        if data.split not in dataset:
            raise RecipeError(f"data.split={data.split}: {data.path} has {', '.join(map(str, dataset))}.")
        dataset = dataset[data.split]
    elif data.split != str(dataset.split or "train"):
        raise RecipeError(f"data.split={data.split} has no effect: {data.path} was saved as a single split.")
    return RowGroups.of_dataset(dataset) if data.streaming else dataset


def _streamed(data: DataSource) -> RowGroups | datasets.IterableDataset:
    """The row groups of Parquet files; rows of any other format in their stored order."""
    builder = datasets.load_dataset_builder(data.path, data.name)
    files = list((builder.config.data_files or {}).get(data.split, ()))
    if files and all(str(file).endswith(".parquet") for file in files):
        return RowGroups.of_parquet(files, features=builder.info.features)
    dataset = builder.as_streaming_dataset(split=data.split)
    assert isinstance(dataset, datasets.IterableDataset)
    return dataset
