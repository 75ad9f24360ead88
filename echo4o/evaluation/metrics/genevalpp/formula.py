"""How GenEval++ is scored: one place for the metric and for the benchmark."""

TAGS = (
    "color_attr",
    "counting",
    "color_count_attr",
    "color_spatial_attr",
    "spatial_count_attr",
    "size_spatial_attr",
    "multi_object_count_attr",
)


def sample_score(correct: float) -> float:
    """A picture is right (1) or not (0)."""
    return float(correct)


def aggregates(counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Weights of the tags' means in each overall number, from the scored prompts per tag."""
    tags = [tag for tag, count in counts.items() if count]
    total = sum(counts[tag] for tag in tags)
    return {
        "score": {tag: 1 / len(tags) for tag in tags},
        "overall_accuracy": {tag: counts[tag] / total for tag in tags},
    }
