"""The next step is read, decoded and packed in a thread while this one is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from echo4o.training.backbones.base import TrainingBatch
from echo4o.training.packing import FixedBatches, PackedBatches


class Prefetch:
    """One step ahead of `batches`, never more, and never in the way of resuming: state and facts are those of the last
    step that was handed out. What goes wrong in the thread is raised where its step is asked for.

    A thread suffices: decoding, resizing, convolutions and random numbers all release Python's lock.
    """

    def __init__(self, batches: FixedBatches | PackedBatches):
        self.batches = batches
        self._thread = ThreadPoolExecutor(1, "next-step")
        self._next: Future | None = None
        self._state, self._facts = batches.state(), batches.facts()

    def next_step(self) -> list[TrainingBatch]:
        """This process's batches of the next step."""
        ready = self._next or self._thread.submit(self._prepare)
        self._next = None
        made, self._state, self._facts = ready.result()
        self._next = self._thread.submit(self._prepare)
        return made

    def _prepare(self) -> tuple[list[TrainingBatch], dict, dict[str, float]]:
        return self.batches.next_step(), self.batches.state(), self.batches.facts()

    def state(self) -> dict:
        return self._state

    def load_state(self, state: dict) -> None:
        """Before the first step."""
        assert self._next is None
        # In the thread as well, so that a picture is encoded by as many cores as in a run without an interruption.
        self._thread.submit(self.batches.load_state, state).result()
        self._state = state

    def facts(self) -> dict[str, float]:
        return self._facts

    def close(self) -> None:
        """Wait for what is being prepared and forget it."""
        self._thread.shutdown(cancel_futures=True)
