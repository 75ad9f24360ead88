"""One thread that owns the model: tasks wait in a queue, and those that fit together run in one call."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from echo4o.serving.metrics import Metrics
from echo4o.serving.served_model import ServedModel
from echo4o.serving.tasks import ChatTask, Task
from echo4o.serving.watching import Cancelled

log = logging.getLogger("echo4o.serving")


class QueueFull(Exception):
    """Too many tasks are waiting. `retry_after`: seconds until there may be room."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineClosed(Exception):
    """The server is shutting down."""


class Engine:
    """Runs tasks on a model, oldest first, together with later tasks that have the same settings.

    Prompts, sizes, references and seeds may differ within a batch; sampler settings and adapters are the same.

    Args:
        model: the loaded model; only the engine's thread calls it.
        batch_wait: seconds that the first task of an idle engine waits for others.
    """

    def __init__(self, model: ServedModel, batch_wait: float = 0.005):
        self.model, self.batch_wait = model, batch_wait
        self.metrics = Metrics()
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_task = 1.0  # moving average
        self._thread = threading.Thread(target=self._run, name="echo4o-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of tasks that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of tasks that run now."""
        return len(self._running)

    def position(self, task: Task) -> int | None:
        """Number of tasks before this one in the queue; None if it does not wait."""
        with self._changed:
            return self._waiting.index(task) if task in self._waiting else None

    def submit(self, tasks: Sequence[Task]) -> None:
        """Put the tasks of one request into the queue, all or none.

        Raises:
            QueueFull: there is no room for all of them; EngineClosed: the server is shutting down.
        """
        with self._changed:
            if self._closed:
                raise EngineClosed("the server is shutting down")
            self._drop_cancelled()
            if len(self._waiting) + len(tasks) > self.model.limits.queue:
                self.metrics.count("rejected")
                raise QueueFull(self.retry_after())
            self._waiting.extend(tasks)
            self._changed.notify()

    def retry_after(self) -> int:
        """Seconds until the tasks that wait now have started, about."""
        return max(1, min(600, round(len(self._waiting) * self._seconds_per_task)))

    def close(self, timeout: float = 30.0) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for task in [*self._waiting, *self._running]:
                task.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout)

    def _drop_cancelled(self) -> None:
        for task in [task for task in self._waiting if task.stop.is_set()]:
            self._waiting.remove(task)
            self.metrics.count("cancelled")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
            time.sleep(self.batch_wait)
            with self._changed:
                if self._closed:
                    return
                batch = self._running = self._next_batch()
            if batch:
                started = time.monotonic()
                self._run_batch(batch)
                seconds = (time.monotonic() - started) / len(batch)
                self._seconds_per_task += 0.3 * (seconds - self._seconds_per_task)
            with self._changed:
                self._running = []

    def _next_batch(self) -> list[Task]:
        """Take the oldest task and later ones with the same key out of the queue."""
        self._drop_cancelled()
        if not self._waiting:
            return []
        key = self._waiting[0].key
        batch = [task for task in self._waiting if task.key == key][: self.model.limits.batch]
        for task in batch:
            self._waiting.remove(task)
        return [task for task in batch if task.future.set_running_or_notify_cancel()]

    def _run_batch(self, batch: list[Task]) -> None:
        """Run tasks together. If the call fails, run them in smaller batches, so that only the faulty ones fail."""
        is_chat = isinstance(batch[0], ChatTask)
        run = cast(Callable[[list[Task]], list], self.model.chat if is_chat else self.model.generate)
        started = time.monotonic()
        try:
            results = run(batch)
        except Cancelled:
            self._give_up(batch)
            return
        except Exception as error:
            too_large = type(error).__name__ == "OutOfMemoryError"
            if len(batch) > 1 and (too_large or isinstance(error, ValueError | TypeError)):
                half = len(batch) // 2 if too_large else 1
                for first in range(0, len(batch), half):
                    self._run_batch(batch[first : first + half])
                return
            if not isinstance(error, ValueError):
                log.exception("a request failed")
            self.metrics.count("failed", len(batch))
            for task in batch:
                task.future.set_exception(error)
            return
        self.metrics.batch(len(batch), time.monotonic() - started, chat=is_chat)
        for task, result in zip(batch, results, strict=True):
            task.future.set_result(result)

    def _give_up(self, batch: list[Task]) -> None:
        self.metrics.count("cancelled", len(batch))
        if hasattr(self.model.pipe, "maybe_free_model_hooks"):
            self.model.pipe.maybe_free_model_hooks()
        for task in batch:
            task.future.set_exception(Cancelled())
