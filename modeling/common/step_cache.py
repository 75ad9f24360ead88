"""Contexts for diffusers' step caches (TaylorSeer, FirstBlockCache), which skip layers in some denoising updates.

A step cache extrapolates from the preceding updates over the same rows. It is therefore reset at the start of every
call and whenever the guidance branches change, and it is off while prompts are encoded and text is generated.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def cached_update(transformer: Any, group: int = 0) -> AbstractContextManager:
    """Context of a denoising update, in which the step cache may skip layers.

    Args:
        group: number of the group of rows that is computed; each has a cache of its own.
    """
    return transformer.cache_context(f"update {group}") if transformer.is_cache_enabled else nullcontext()


@contextmanager
def uncached_pass(transformer: Any) -> Iterator[None]:
    """Context of a forward pass that runs in full. The step cache is reset before and after it."""
    reset_step_cache(transformer)
    with transformer.cache_context("whole") if transformer.is_cache_enabled else nullcontext():
        yield
    reset_step_cache(transformer)


def reset_step_cache(transformer: Any) -> None:
    """Clear the step cache: it is stale after the rows changed, an update was skipped, or a call was interrupted."""
    if transformer.is_cache_enabled:
        transformer._reset_stateful_cache()
