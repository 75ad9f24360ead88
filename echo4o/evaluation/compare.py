"""Compares two judged folders, paired by prompt, with intervals and a significance test."""

from pathlib import Path
from typing import Any

from echo4o.evaluation import statistics
from echo4o.evaluation.score import Evaluation, read_evaluation


def compare(a: Path, b: Path, seed: int = 0, any_judge: bool = False) -> dict[str, Any]:
    """Differences B - A over the prompts that are scored in both folders.

    Args:
        a, b: judged folders of the same prompts, judged by the same judge with the same questions.
        any_judge: compare in spite of different judges.

    Returns:
        dict with the difference of every overall number and of every group: `a`, `b`, `difference`, its 95%
        `interval`, and `p` of the sign-flip test (for groups corrected by Holm's method).
    """
    first, second = read_evaluation(Path(a)), read_evaluation(Path(b))
    _require_comparable(first, second, any_judge)
    pairs = _pairs(first, second)
    differences = {group: [y - x for x, y in values] for group, values in pairs.items() if values}
    if not differences:
        raise ValueError(f"{a} and {b} have no prompt that is scored in both")
    aggregates = first.benchmark.aggregates
    counts = {group: len(values) for group, values in differences.items()}
    intervals, group_intervals = statistics.bootstrap(differences, aggregates, seed)
    values_a = {group: [x for x, _ in values] for group, values in pairs.items()}
    values_b = {group: [y for _, y in values] for group, values in pairs.items()}
    total_a, total_b = statistics.overall(values_a, aggregates), statistics.overall(values_b, aggregates)
    overall = {
        name: _line(total_a[name], total_b[name], intervals[name])
        | {"p": statistics.sign_flip_test(differences, weights, seed)}
        for name, weights in aggregates(counts).items()
    }
    mean_a, mean_b = statistics.group_means(values_a), statistics.group_means(values_b)
    p_values = {group: statistics.sign_flip_test(differences, {group: 1.0}, seed) for group in differences}
    corrected = statistics.holm(p_values)
    groups = {
        group: _line(mean_a[group], mean_b[group], group_intervals[group])
        | {"p": p_values[group], "p_holm": corrected[group], "prompts": counts[group]}
        for group in differences
    }
    return {
        "benchmark": first.benchmark.name,
        "a": str(a),
        "b": str(b),
        "prompts": sum(counts.values()),
        "of": len(first.prompts),
        "score": overall.pop("score"),
        "also": overall,
        "groups": groups,
        "test": f"sign flips of paired differences, {statistics.RESAMPLES} draws; groups corrected by Holm's method",
        "seed": seed,
    }


def _line(a: float, b: float, interval: list[float]) -> dict[str, Any]:
    return {"a": a, "b": b, "difference": b - a, "interval": interval}


def _require_comparable(a: Evaluation, b: Evaluation, any_judge: bool) -> None:
    if a.benchmark.name != b.benchmark.name:
        raise ValueError(f"{a.out} is {a.benchmark.title} and {b.out} is {b.benchmark.title}: they cannot be compared")
    if a.header["sha256"] != b.header["sha256"]:
        raise ValueError(f"{a.out} and {b.out} come from different prompt files: their ids name different prompts")
    if a.judge["fingerprint"] != b.judge["fingerprint"] and not any_judge:
        judges = " and ".join(str(run.judge["judge"]["judge"]) for run in (a, b))
        raise ValueError(
            f"{a.out} and {b.out} were judged differently ({judges}, or other questions or settings): the difference "
            "would be that of the judges; --any-judge compares in spite of it"
        )


def _pairs(a: Evaluation, b: Evaluation) -> dict[str, list[tuple[float, float]]]:
    values_a, values_b = a.values(), b.values()
    return {
        group: [(value, values_b[group][name]) for name, value in by_prompt.items() if name in values_b[group]]
        for group, by_prompt in values_a.items()
        if group in values_b
    }
