"""Contexts for diffusers' step caches, which skip layers (TaylorSeer, FirstBlockCache, MagCache) or attention
(PyramidAttentionBroadcast) in some denoising updates.

A step cache extrapolates from the preceding updates over the same rows. It is therefore reset at the start of every
call and whenever the guidance branches change, and it is off while prompts are encoded and text is generated.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def check_step_cache(transformer: Any, steps: int) -> None:
    """Raise ValueError if a MagCache was set up for another number of updates: its ratios belong to the updates."""
    if not transformer.is_cache_enabled:
        return
    config = transformer._cache_config
    if type(config).__name__ == "MagCacheConfig" and config.num_inference_steps != steps:
        raise ValueError(
            f"MagCacheConfig(num_inference_steps={config.num_inference_steps}) does not fit a call with {steps} updates: "
            "its ratios belong to the single updates. Call disable_cache and enable_cache with the same number."
        )


@contextmanager
def cached_update(transformer: Any, group: int = 0, step: int | None = None) -> Iterator[None]:
    """Context of a denoising update, in which the step cache may skip layers.

    Args:
        group: number of the group of rows that is computed; each has a cache of its own.
        step: number of the update, for MagCache. None: it counts itself.

    Raises ValueError for a second group under PyramidAttentionBroadcast, which keeps the results of one group only.
    """
    if not transformer.is_cache_enabled:
        yield
        return
    if group > 0 and type(transformer._cache_config).__name__ == "PyramidAttentionBroadcastConfig":
        raise ValueError(
            "These images need more than one forward pass per update, and PyramidAttentionBroadcast keeps the results "
            "of one: generate fewer images at once, or call disable_cache."
        )
    with transformer.cache_context(f"update {group}"):
        state = None if step is None else _mag_cache_state(transformer)
        ratios: dict[int, list] = {}
        if state is not None:  # a reset in the middle of a call began its count again
            ratios = transformer.__dict__.setdefault("_mag_ratios", {})
            state.step_index, state.calibration_ratios = step, ratios.get(group, [])[:step]
        yield
        if state is not None:
            ratios[group] = list(state.calibration_ratios)


def _mag_cache_state(transformer: Any) -> Any:
    """The state of diffusers' MagCache (0.42) in the current context; None without one."""
    block = transformer.layers[0]
    registry = getattr(getattr(block, "_orig_mod", block), "_diffusers_hook", None)
    hook = registry.get_hook("mag_cache_leader_block_hook") if registry is not None else None
    return None if hook is None else hook.state_manager.get_state()


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
