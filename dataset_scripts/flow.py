"""Helpers that overlap reading and checking of items, in order and with a bounded number of items in flight."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Future | None)
_END = object()


def read_ahead(items: Iterable[T], weight: Callable[[T], int], limit: int) -> Generator[T, None, None]:
    """The same items, read by a thread that is at most `limit` ahead in weight (one item may exceed it)."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Condition()
    load, stopped = 0, False

    def read() -> None:
        nonlocal load
        try:
            for item in items:
                with room:
                    while not stopped and load > limit:
                        room.wait()
                    if stopped:
                        return
                    load += weight(item)
                waiting.put((item, None))
            waiting.put((_END, None))
        except BaseException as error:  # handed to the reader of the queue
            waiting.put((_END, error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            with room:
                load -= weight(item)
                room.notify()
            yield item
    finally:
        with room:
            stopped = True
            room.notify()
        thread.join()


def ordered(
    submit: Callable[[T], F], items: Iterable[T], weight: Callable[[T], int], limit: int, count: int
) -> Iterator[tuple[T, F]]:
    """Items with their futures in the items' order, at most `count` items and `limit` weight ahead."""
    ahead: deque = deque()
    load = 0
    for item in items:
        ahead.append((item, submit(item)))
        load += weight(item)
        while ahead and (len(ahead) > count or load > limit):
            load -= weight(ahead[0][0])
            yield ahead.popleft()
    yield from ahead
