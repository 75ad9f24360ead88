"""How DPG-Bench is scored: one place for the metric and for the benchmark."""

SCALE = 100.0


def after_dependencies(parents, yes):
    """The answers after the dependency rule: in order, no if any parent is no at that moment.

    Args:
        parents: by question, in the order of the question table, the questions it depends on; 0 is none.
        yes: by question, whether it was answered with yes.

    Raises:
        ValueError: a parent that decides is not a question of the prompt.
    """
    values = {question: bool(yes[question]) for question in parents}
    for question, needed in parents.items():
        for parent in needed:
            if parent == 0:
                continue
            if parent not in values:
                raise ValueError(f"question {question} depends on question {parent}, which the prompt does not have")
            if not values[parent]:
                values[question] = False
                break
    return values


def sample_score(parents, yes) -> float:
    """The share of an image's questions that hold, 0 to 1."""
    values = after_dependencies(parents, yes)
    return sum(values.values()) / len(values)


def prompt_score(image_scores) -> float:
    """The mean of a prompt's images, added in their order as in the original."""
    return sum(image_scores) / len(image_scores)


def aggregates(counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """There is one group: every prompt weighs the same."""
    return {"score": {group: 1.0 for group, count in counts.items() if count}}
