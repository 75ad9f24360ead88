"""Which row comes when: sources of rows, the order they are read in, and the memory of prepared ones.

The order is a function of the recipe alone, never of the number of processes, and its whole state is how many rows
were drawn from each source.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import torch

from echo4o.training.recipe import Data, Recipe, RecipeError
from echo4o.training.samples import PreparedRow, SampleMaker, TrainingSample

UNREADABLE = (ValueError, OSError, SyntaxError)  # what PIL raises for damaged pictures
BARE_NAME = "echo-4o-image"  # `datasets` finds it without a namespace once echo4o is imported
COLUMNS = ("id", "instruction", "reference_images", "image")


class Ref(NamedTuple):
    """Names one reading of one row."""

    source: int
    epoch: int
    row: int


@lru_cache(maxsize=8)
def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


class Order:
    """The rows of all sources without end: each draw chooses a source by weight, each source shuffles every epoch.

    Args:
        rows: number of rows of each source.
        weights: of each source.
        start, stride: yield every `stride`-th draw from `start` on (the share of one lane).
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], seed: int, start: int = 0, stride: int = 1):
        self.rows, self.seed, self.start, self.stride = list(rows), seed, start, stride
        self._bounds = [total / sum(weights) for total in accumulate(weights)]
        self.drawn = [0] * len(rows)  # from each source, over all lanes: the whole state

    def _source(self, draw: int) -> int:
        if len(self.rows) == 1:
            return 0
        chance = random.Random(self.seed * 1_000_003 + draw).random()
        return next(i for i, bound in enumerate(self._bounds) if chance < bound or i == len(self._bounds) - 1)

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> Ref:
        while True:
            draw = sum(self.drawn)
            source = self._source(draw)
            count, rows = self.drawn[source], self.rows[source]
            self.drawn[source] += 1
            if draw % self.stride == self.start:
                epoch, place = divmod(count, rows)
                return Ref(source, epoch, _permutation(rows, self.seed + 7919 * source, epoch)[place])


class Stream:
    """A streaming source as one lane sees it: every `stride`-th row of the stored order, again and again.

    A row's number is its place among the lane's own rows; going on after an interruption reads up to that place again.
    """

    def __init__(self, dataset, start: int = 0, stride: int = 1):
        from datasets.distributed import split_dataset_by_node

        self.dataset = split_dataset_by_node(dataset, rank=start, world_size=stride)
        self.taken = 0
        self.epoch = 0
        self._rows: Iterator[dict] | None = None
        self._before: str | None = None  # id of the row that came last

    def next(self) -> tuple[Ref, dict]:
        """The next row and its name."""
        for _ in range(2):
            if self._rows is None:
                self._rows = islice(iter(self.dataset), self.taken, None)
            try:
                row = next(self._rows, None)
            except UNREADABLE as error:
                place = f"after row {self._before}" if self._before else "in first place"
                raise ValueError(f"The streamed row {place} cannot be read: {error}") from error
            if row is not None:
                self.taken, self._before = self.taken + 1, row["id"]
                return Ref(0, self.epoch, self.taken - 1), row
            if self.taken == 0:
                break
            self._rows, self.taken, self.epoch = None, 0, self.epoch + 1
        raise RecipeError("A streamed dataset has no rows for one of the packs of a step.")

    def again(self, refs: Sequence[Ref]) -> dict[Ref, dict]:
        """Rows that were read before, by name."""
        wanted = {ref.row: ref for ref in refs}
        rows = enumerate(islice(iter(self.dataset), max(wanted, default=-1) + 1))
        return {wanted[index]: row for index, row in rows if index in wanted}


class Rows:
    """All sources of a run, and a bounded memory of their prepared rows.

    Args:
        sources: datasets with `len` and `select`, or one streaming dataset.
        cache_bytes: most memory for prepared rows; the least recently used go first.
    """

    def __init__(self, sources: Sequence, weights: Sequence[float], maker: SampleMaker, seed: int, cache_bytes: int):
        self.sources, self.weights, self.maker, self.seed = list(sources), list(weights), maker, seed
        self.streaming = not hasattr(self.sources[0], "select")
        self._cache: OrderedDict[tuple[int, int], PreparedRow] = OrderedDict()
        self._room = cache_bytes

    def order(self, start: int = 0, stride: int = 1) -> Order:
        return Order([len(source) for source in self.sources], self.weights, self.seed, start, stride)

    def samples(self, refs: Sequence[Ref], known: dict[Ref, dict] | None = None) -> list[TrainingSample]:
        """The samples of these readings, in order. `known`: rows that were read from a stream."""
        if known is not None:
            prepared = self._prepare([known[ref] for ref in refs])
            return [self._sample(row, ref) for ref, row in zip(refs, prepared)]
        held = {key: self._cache[key] for key in {(r.source, r.row) for r in refs} if key in self._cache}
        for source, dataset in enumerate(self.sources):
            new = sorted({r.row for r in refs if r.source == source and (source, r.row) not in held})
            if new:
                prepared = self._prepare(_read(dataset, new))
                held |= {(source, row): made for row, made in zip(new, prepared)}
        for key, made in held.items():
            self._remember(key, made)
        return [self._sample(held[ref.source, ref.row], ref) for ref in refs]

    def _prepare(self, rows: list[dict]) -> list[PreparedRow]:
        try:
            return self.maker.prepare(rows)
        except (ValueError, OSError):
            for row in rows:  # again, one by one: the message must name the row
                try:
                    self.maker.prepare([row])
                except (ValueError, OSError) as error:
                    raise ValueError(f"Row {row['id']}: {error}") from error
            raise

    def _sample(self, row: PreparedRow, ref: Ref) -> TrainingSample:
        return self.maker.sample(row, ref.epoch)

    def _remember(self, key: tuple[int, int], made: PreparedRow) -> None:
        if key in self._cache:
            self._cache.move_to_end(key)
            return
        self._cache[key] = made
        self._room -= made.nbytes
        while self._room < 0:
            self._room += self._cache.popitem(last=False)[1].nbytes


def _read(dataset, numbers: Sequence[int]) -> list[dict]:
    """Rows with their pictures decoded. Raises ValueError naming the row that does not decode."""
    try:
        return list(dataset.select(numbers))
    except UNREADABLE:
        for number in numbers:
            try:
                dataset[number]
            except UNREADABLE as error:
                id = dataset.select_columns("id")[number]["id"]
                raise ValueError(f"Row {id} (number {number}) cannot be read: {error}") from error
        raise


def open_sources(recipe: Recipe) -> list:
    """The recipe's datasets; a RecipeError names the one that cannot be opened."""
    return [_open(data) for data in recipe.data]


def _open(data: Data):
    from datasets import load_dataset

    folder = Path(data.path)
    if not folder.exists() and data.path.count("/") != 1 and data.path != BARE_NAME and "://" not in data.path:
        raise RecipeError(f"data.path={data.path}: there is no such folder (a Hub repository is called owner/name).")
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            dataset = _saved(data)
        else:
            dataset = load_dataset(data.path, data.name, split=data.split, streaming=data.streaming)
    except RecipeError:
        raise
    except Exception as error:  # datasets raises anything, from any of its readers
        text = (str(error).strip().splitlines() or [repr(error)])[0].strip("\"'")
        what = text if folder.exists() else f"there is no such folder, and on the Hub: {text}"
        raise RecipeError(f"data.path={data.path} cannot be opened: {what}") from error
    if not data.streaming and not len(dataset):
        raise RecipeError(f"data.path={data.path} has no rows.")
    given = dataset.column_names  # a stream may not know
    missing = [name for name in COLUMNS if given is not None and name not in given]
    if missing:
        raise RecipeError(
            f"data.path={data.path} has no column {', '.join(missing)}; training reads {', '.join(COLUMNS)} "
            f"(and answer, for questions), and there are: {', '.join(given)}."
        )
    return dataset


def _saved(data: Data):
    """What `save_to_disk` wrote: one dataset, or one by split."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(data.path)
    if data.name is not None:
        raise RecipeError(f"data.name={data.name} has no effect: {data.path} was saved from a single configuration.")
    if isinstance(dataset, DatasetDict):
        if data.split not in dataset:
            raise RecipeError(f"data.split={data.split}: {data.path} has {', '.join(dataset)}.")
        dataset = dataset[data.split]
    elif data.split != str(dataset.split or "train"):
        raise RecipeError(f"data.split={data.split} has no effect: {data.path} was saved as a single split.")
    return dataset.to_iterable_dataset() if data.streaming else dataset
