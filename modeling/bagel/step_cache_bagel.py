"""Which passes diffusers' step caches (TaylorSeer, FirstBlockCache) may shorten: updates of a picture, nothing else.

A cache guesses from earlier updates over the same rows. So every set of guidance branches has a context of its own,
every call starts afresh, and what reads a prompt or says a word always runs in full.
"""

from contextlib import contextmanager, nullcontext


def update_context(transformer, branches: list):
    """Context of an update over the rows of `branches`, which the cache tells from other sets of rows by their value."""
    return transformer.cache_context(f"update {branches}") if transformer.is_cache_enabled else nullcontext()


@contextmanager
def whole_pass(transformer):
    """Context of a pass that runs in full: what the cache knew before is forgotten, and so is this pass."""
    forget_updates(transformer)
    with transformer.cache_context("whole") if transformer.is_cache_enabled else nullcontext():
        yield
    forget_updates(transformer)


def forget_updates(transformer) -> None:
    """Drop what a cache holds, as at the start of every call: the last one may have been stopped anywhere."""
    if transformer.is_cache_enabled:
        transformer._reset_stateful_cache()
