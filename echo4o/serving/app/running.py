"""Following the tasks of a click: what is finished, how far the rest is, and what went wrong."""

import queue
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

from PIL import Image

from echo4o.serving.engine import Engine
from echo4o.serving.tasks import GeneratedImage, ImageTask, Progress
from echo4o.serving.waiting import api_error
from echo4o.serving.watching import Cancelled

_SHORTEST_PAUSE = 0.15  # seconds between two updates of the page


@dataclass
class RunState:
    """The state of a run of several images.

    Args:
        total: images asked for.
        finished: finished images, in the order in which they were finished.
        preview: the newest preview.
        progress: of the batch that runs now; None while waiting.
        before: tasks before the first of this run in the queue.
        cancelled: number of images that were cancelled.
        error: the message of the first failure.
    """

    total: int
    finished: list[GeneratedImage] = field(default_factory=list)
    preview: Image.Image | None = None
    progress: Progress | None = None
    before: int | None = None
    cancelled: int = 0
    error: str | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.finished) + self.cancelled == self.total

    @property
    def line(self) -> str:
        """One line for the page."""
        if self.error is not None:
            return f"**Failed**: {self.error}"
        if self.done:
            kept = f"Cancelled; {len(self.finished)} of {self.total} images kept" if self.cancelled else "Done"
            seeds = ", ".join(str(each.seed) for each in self.finished)
            return f"{kept}. Seed: {seeds}" if seeds else kept
        if self.progress is None:
            return f"Waiting; {self.before} before you" if self.before else "Waiting"
        step = self.progress
        count = f"{len(self.finished)} of {self.total} images done. " if self.total > 1 else ""
        left = f", about {step.seconds_left:.0f} s left" if step.step > 1 else ""
        return f"{count}Update {step.step} of {step.total}{left}"


def follow(engine: Engine, tasks: list[ImageTask]) -> Iterator[RunState]:
    """Yield the state of tasks that were submitted until all have ended. Leaving the loop cancels the rest."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    for task in tasks:
        task.on_event = events.put
        task.future.add_done_callback(events.put)
    state, shown = RunState(len(tasks), before=engine.position(tasks[0])), 0.0
    yield state
    try:
        while not state.done:
            event = events.get()
            if isinstance(event, Progress):
                state.progress = event
                state.preview = event.preview or state.preview
            else:
                _take_result(event, state)
            if state.done or event is state.preview or time.monotonic() - shown > _SHORTEST_PAUSE:
                shown = time.monotonic()
                yield state
    finally:
        for task in tasks:
            task.cancel()


def _take_result(future, state: RunState) -> None:
    state.progress = state.preview = None
    try:
        state.finished.append(future.result())
    except (Cancelled, CancelledError):
        state.cancelled += 1
    except Exception as error:
        state.error = api_error(error).message
