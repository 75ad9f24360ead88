"""Limits of a run: how many calls are open, how many start per minute, and when the run stops."""

import asyncio
import signal
import threading
from dataclasses import asdict, dataclass
from time import monotonic


@dataclass(frozen=True)
class CallPolicy:
    """Concurrency and retries of the calls.

    Args:
        concurrency: most calls that are open at once.
        tries: how often one call is sent before its failure is accepted.
        answers: how many answers are requested before an unreadable one is accepted as an error.
        first_wait, longest_wait: seconds of the exponential backoff; each wait is drawn from its upper half.
        longest_request: seconds; if the server asks for a longer wait, the call fails instead of being repeated.
        give_up_after: calls in a row that fail in transport before the run stops.
    """

    concurrency: int = 16
    tries: int = 6
    answers: int = 3
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_request: float = 300.0
    give_up_after: int = 8

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 0 or (value < 1 and isinstance(value, int)):
                raise ValueError(f"{name} is {value}; it must be at least 1")


class Stopped(Exception):
    """The run is stopping; no new call is made."""


class StopSignal:
    """Stops a run. Set once, with the reason; all waits end with [`Stopped`]."""

    def __init__(self):
        self._event, self.reason = asyncio.Event(), None

    def set(self, reason: BaseException) -> None:
        """Stop the run; the first reason is kept."""
        if self.reason is None:
            self.reason = reason
        self._event.set()

    def check(self) -> None:
        """Raise [`Stopped`] if the run is stopping."""
        if self._event.is_set():
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        """Wait; raises [`Stopped`] as soon as the run is stopping."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped


class InterruptHandler:
    """Within this context, Ctrl-C and SIGTERM stop the run after the open calls; a second one ends it at once."""

    def __init__(self, stop: StopSignal):
        self.stop, self.signals = stop, []

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self._handle)
            except (NotImplementedError, RuntimeError):
                continue
            self.signals.append(number)

    def _handle(self) -> None:
        self.stop.set(KeyboardInterrupt())
        self._remove_handlers()

    def __exit__(self, *_):
        self._remove_handlers()

    def _remove_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        while self.signals:
            loop.remove_signal_handler(self.signals.pop())


class ConcurrencyLimit:
    """How many calls may be open. A 429 halves the limit and pauses all calls; each round of successes adds one."""

    def __init__(self, most: int, stop: StopSignal):
        self.most = self.limit = most
        self.open, self.peak = 0, 0
        self._stop, self._resume_at, self._slowed_at, self._successes = stop, 0.0, 0.0, 0

    async def enter(self) -> None:
        """Wait until another call may be opened."""
        while True:
            self._stop.check()
            pause = self._resume_at - monotonic()
            if pause <= 0 and self.open < self.limit:
                break
            await self._stop.sleep(min(max(pause, 0.005), 0.05))
        self.open += 1
        self.peak = max(self.peak, self.open)

    def leave(self) -> None:
        """Close a call."""
        self.open -= 1

    def succeeded(self) -> None:
        """Count an answered call."""
        self._successes += 1
        if self._successes >= self.limit:
            self._successes, self.limit = 0, min(self.most, self.limit + 1)

    def slow_down(self, began: float, wait: float) -> None:
        """After a 429 of a call that began at `began`; calls that were open at the same time halve the limit once."""
        self._resume_at = max(self._resume_at, monotonic() + wait)
        if began >= self._slowed_at:
            self._slowed_at, self._successes = monotonic(), 0
            self.limit = max(1, self.limit // 2)


class RateLimit:
    """At most so many calls per minute, evenly spaced."""

    def __init__(self, per_minute: int | None, stop: StopSignal):
        self._interval, self._stop, self._next = 60.0 / per_minute if per_minute else 0.0, stop, 0.0

    async def wait(self) -> None:
        """Wait for the next turn."""
        now = monotonic()
        turn = max(now, self._next)
        self._next = turn + self._interval
        if turn > now:
            await self._stop.sleep(turn - now)
