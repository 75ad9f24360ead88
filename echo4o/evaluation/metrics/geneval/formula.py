"""How GenEval is scored: one place for the metric and for the benchmark."""

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def sample_score(correct: float) -> float:
    """An image is right (1) or not (0)."""
    return float(correct)


def aggregates(counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Weights of the tags' means in each overall number, from the scored prompts per tag."""
    tags = [tag for tag, count in counts.items() if count]
    total = sum(counts[tag] for tag in tags)
    return {
        "score": {tag: 1 / len(tags) for tag in tags},
        "overall_accuracy": {tag: counts[tag] / total for tag in tags},
    }
