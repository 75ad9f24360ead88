"""Batches of each process and step: a fixed number of samples, or packs filled up to a number of tokens.

Packing works in lanes. A step has as many lanes as packs; lane i reads every n-th row, keeps a small buffer of samples
and fills one pack per step. A lane depends on its number alone, so the packs of a step are the same whether one process
fills all lanes or each process fills its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from echo4o.training.backbones.base import TrainingBatch, TrainingSample
from echo4o.training.data import PreparedRows, RowRef, StoredOrder
from echo4o.training.recipe import PackingSettings, RecipeError

Collate = Callable[[Sequence[TrainingSample]], TrainingBatch]


class FixedBatches:
    """`batch_size` samples per step, distributed round-robin over the processes and split into micro-batches.

    Args:
        micro_batch_size: samples per forward pass and process; None: one forward pass per step.
        collate: makes a batch of samples.
    """

    def __init__(
        self,
        rows: PreparedRows,
        batch_size: int,
        micro_batch_size: int | None,
        collate: Collate,
        rank: int = 0,
        processes: int = 1,
    ):
        micro = micro_batch_size or -(-batch_size // processes)
        if batch_size % (micro * processes):
            raise RecipeError(
                f"batch_size={batch_size} is not divisible into {processes} processes with micro-batches of {micro}."
            )
        self.rows, self.collate, self.order = rows, collate, rows.order()
        self.batch_size, self.micro, self.rank, self.processes = batch_size, micro, rank, processes

    def next_step(self) -> list[TrainingBatch]:
        """This process's micro-batches of the next step."""
        taken = [next(self.order) for _ in range(self.batch_size)][self.rank :: self.processes]
        samples = self.rows.samples(taken)
        parts = [samples[start : start + self.micro] for start in range(0, len(samples), self.micro)]
        return [self.collate(part) for part in parts]

    def state(self) -> dict:
        """The position in the order of rows; equal on all processes."""
        return self.order.state()

    def load_state(self, state: dict) -> None:
        self.order.load_state(state)

    def facts(self) -> dict[str, float]:
        return {}


class Lane:
    """Fills one pack per step from a buffer, best fit: the oldest sample first, then always the largest that fits."""

    def __init__(self, rows: PreparedRows, settings: PackingSettings, start: int, stride: int, on_too_long: Callable):
        self.rows, self.settings, self.on_too_long = rows, settings, on_too_long
        self.start, self.stride, self.order = start, stride, rows.lane(start, stride)
        self.buffer: list[tuple[RowRef, TrainingSample]] = []
        self.too_long = 0  # consecutive samples that were too long

    def next_pack(self) -> list[TrainingSample]:
        self._fill()
        room, chosen = self.settings.tokens, []
        while (index := best_fit([len(sample) for _, sample in self.buffer], room, first=not chosen)) is not None:
            chosen.append(self.buffer.pop(index)[1])
            room -= len(chosen[-1])
        return chosen

    def _fill(self) -> None:
        while missing := self.settings.buffer - len(self.buffer):
            if isinstance(self.order, StoredOrder):
                taken = dict(self.order.next() for _ in range(missing))
                new = list(zip(taken, self.rows.samples(list(taken), taken)))
            else:
                refs = [next(self.order) for _ in range(missing)]
                new = list(zip(refs, self.rows.samples(refs)))
            for ref, sample in new:
                if sample.full_length > self.settings.tokens:
                    self.too_long += 1
                    self.on_too_long(sample)
                else:
                    self.too_long = 0
                    self.buffer.append((ref, sample))
            if self.too_long >= 1000:
                raise RecipeError(f"1000 consecutive samples exceed packing.tokens={self.settings.tokens}: raise it.")

    def state(self) -> dict:
        return self.order.state() | {"buffer": [list(ref) for ref, _ in self.buffer]}

    def load_state(self, state: dict) -> None:
        refs = [RowRef(*values) for values in state["buffer"]]
        self.order = self.rows.lane(self.start, self.stride, state)
        self.order.load_state(state)
        known = self.order.again(refs) if isinstance(self.order, StoredOrder) else None
        self.buffer = list(zip(refs, self.rows.samples(refs, known)))


def best_fit(lengths: Sequence[int], room: int, first: bool) -> int | None:
    """Index of the sample to add to a pack with `room` tokens left; None if nothing fits.

    The first sample of a pack is the oldest one, so that no sample waits forever.
    """
    if first:
        return 0 if lengths and lengths[0] <= room else None
    fitting = [(length, -index) for index, length in enumerate(lengths) if length <= room]
    return -max(fitting)[1] if fitting else None


class PackedBatches:
    """This process's lanes. Calls `report(id, tokens)` for every sample that is longer than a pack."""

    def __init__(
        self,
        rows: PreparedRows,
        packing: PackingSettings,
        collate: Collate,
        rank: int = 0,
        processes: int = 1,
        report: Callable[[str, int], None] = lambda id, tokens: None,
    ):
        self.settings, self.collate, lanes = packing, collate, packing.packs_per_step
        if lanes % processes:
            raise RecipeError(f"packing.packs_per_step={lanes} is not divisible by {processes} processes.")
        self.too_long: Counter[str] = Counter()

        def on_too_long(sample: TrainingSample) -> None:
            self.too_long[sample.id] += 1
            report(sample.id, sample.full_length)

        self.lanes = {i: Lane(rows, packing, i, lanes, on_too_long) for i in range(rank, lanes, processes)}
        self.tokens = self.packs = 0

    def next_step(self) -> list[TrainingBatch]:
        """This process's packs of the next step."""
        packs = [lane.next_pack() for lane in self.lanes.values()]
        self.tokens += sum(len(sample) for pack in packs for sample in pack)
        self.packs += len(packs)
        return [self.collate(pack) for pack in packs]

    def state(self) -> dict:
        """The state of this process's lanes; those of all processes together are the state of the run."""
        return {"lanes": {str(number): lane.state() for number, lane in self.lanes.items()}}

    def load_state(self, state: dict) -> None:
        for number, lane in self.lanes.items():
            lane.load_state(state["lanes"][str(number)])

    def facts(self) -> dict[str, float]:
        """Mean fill of the packs since the start, and the number of samples that were too long."""
        filled = self.tokens / max(1, self.packs * self.settings.tokens)
        return {"packing_efficiency": filled, "too_long": float(self.too_long.total())}


def merge_states(states: Sequence[dict]) -> dict:
    """The data state of a run from the states of its processes."""
    if "lanes" not in states[0]:
        return states[0]
    return {"lanes": {number: lane for state in states for number, lane in state["lanes"].items()}}
