"""Refuses calls that would disturb each other's state because they share a pipeline, a scheduler or a model.

A scheduler counts the updates of one call; two threads that share it get wrong images. Pipelines made with `from_pipe`
and a scheduler of their own share the weights and may run in threads side by side.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_users: dict[int, int] = {}  # id of an object in use -> number of calls that share it; -1: one call has it alone


@contextmanager
def in_use(alone: Sequence[Any] = (), shared: Sequence[Any] = ()) -> Iterator[None]:
    """Use the objects until the block ends: those of `alone` by no other call, those of `shared` with others.

    Raises RuntimeError if another call uses them in a way that does not fit.
    """
    wanted = {id(x): 1 for x in shared if x is not None} | {id(x): -1 for x in alone if x is not None}
    with _lock:
        for key, way in wanted.items():
            if _users.get(key, 0) and (way < 0 or _users[key] < 0):
                name = next(type(x).__name__ for x in (*alone, *shared) if id(x) == key)
                raise RuntimeError(
                    f"This {name} is in use by another call, whose result would be wrong. Give each thread a pipeline "
                    "of its own that shares the weights: type(pipe).from_pipe(pipe, "
                    "scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))."
                )
        for key, way in wanted.items():
            _users[key] = -1 if way < 0 else _users.get(key, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for key, way in wanted.items():
                _users[key] = 0 if way < 0 else _users[key] - 1
                if not _users[key]:
                    del _users[key]
