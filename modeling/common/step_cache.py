"""Which passes diffusers' step caches (TaylorSeer, FirstBlockCache) may shorten: updates of a picture, nothing else.

A cache guesses from the updates just before, over the same rows. So every call and every change of the guidance branches
starts afresh, and what reads a prompt or says a word always runs in full.
"""

from contextlib import contextmanager, nullcontext


def update_context(transformer):
    """Context of an update."""
    return transformer.cache_context("update") if transformer.is_cache_enabled else nullcontext()


@contextmanager
def whole_pass(transformer):
    """Context of a pass that runs in full: what the cache knew before is forgotten, and so is this pass."""
    forget_updates(transformer)
    with transformer.cache_context("whole") if transformer.is_cache_enabled else nullcontext():
        yield
    forget_updates(transformer)


def forget_updates(transformer) -> None:
    """Drop what a cache holds: it is of other rows, of rows as they were before a gap, or of a call that was stopped."""
    if transformer.is_cache_enabled:
        transformer._reset_stateful_cache()
