"""Which settings a resumed run may change."""

from __future__ import annotations

from echo4o.training.recipe import RecipeError, TrainingRecipe

# Settings that a resumed run may change: they do not affect what a step computes. Paths (model, data) may move; the
# weights and rows behind them must be the same.
CHANGEABLE_ON_RESUME = {
    "output_dir",
    "resume",
    "steps",
    "max_seconds",
    "checkpoints",
    "images",
    "trackers",
    "processes",
    "cache_mb",
}
CHANGEABLE_ON_RESUME |= {"save_dtype", "model", "data", "validation", "on_bad_row", "max_bad", "hub"}


def check_same_run(before: TrainingRecipe, now: TrainingRecipe) -> None:
    """Raise RecipeError if a resumed run has other settings than the interrupted one, apart from `CHANGEABLE_ON_RESUME` ones."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    changed = [
        f"{key} ({old[key]!r} before, {new[key]!r} now)"
        for key in new
        if key not in CHANGEABLE_ON_RESUME and old[key] != new[key]
    ]
    shares = [recipe.validation.share if recipe.validation else None for recipe in (before, now)]
    if shares[0] != shares[1]:  # it decides which rows train
        changed.append(f"validation.share ({shares[0]} before, {shares[1]} now)")
    if len(before.data) != len(now.data):
        changed.append("data (another number of datasets)")
    if changed:
        raise RecipeError(f"The interrupted run had other settings: {'; '.join(changed)}.")
