"""Reads, decodes and packs the next step in a thread while the current step is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from echo4o.training.backbones.base import TrainingBatch
from echo4o.training.packing import FixedBatches, PackedBatches


class Prefetch:
    """Prepares one step of `batches` ahead.

    State and facts are those of the last step that was returned, so a resumed run loses no rows. Exceptions of the
    thread are raised by `next_step`. A thread is enough: decoding, resizing and convolutions release the GIL.
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
        batches, self._state, self._facts = ready.result()
        self._next = self._thread.submit(self._prepare)
        return batches

    def _prepare(self) -> tuple[list[TrainingBatch], dict, dict[str, float]]:
        return self.batches.next_step(), self.batches.state(), self.batches.facts()

    def state(self) -> dict:
        return self._state

    def load_state(self, state: dict) -> None:
        """Continue from a saved state. Call it before the first step."""
        assert self._next is None
        # In the thread, so that images are encoded with the same number of cores as in an uninterrupted run.
        self._thread.submit(self.batches.load_state, state).result()
        self._state = state

    def facts(self) -> dict[str, float]:
        return self._facts

    def close(self) -> None:
        """Wait for the step in preparation and discard it."""
        self._thread.shutdown(cancel_futures=True)
