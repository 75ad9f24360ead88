"""How OmniContext is scored: one place for the metric and for the benchmark."""

from math import sqrt

SINGLE = ("single_character", "single_object")
TASKS = (
    *SINGLE,
    "multi_character",
    "multi_object",
    "multi_character_object",
    "scene_character",
    "scene_object",
    "scene_character_object",
)


def sample_score(prompt_following: float, subject_consistency: float) -> float:
    """The geometric mean of both, each from 0 to 10."""
    return sqrt(prompt_following * subject_consistency)


def aggregates(counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Weights of the tasks' means: over all eight, and over the six without the single ones."""
    tasks = [task for task, count in counts.items() if count]
    six = [task for task in tasks if task not in SINGLE]
    weights = {"score": {task: 1 / len(tasks) for task in tasks}}
    if six:
        weights["score_6_tasks"] = {task: 1 / len(six) for task in six}
    return weights
