"""The result of an audit: what a dear judge, which judged a share of the prompts in `audit/`, would give on everything."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from echo4o.evaluation.agreement import agreement_of
from echo4o.evaluation.audit_estimate import MIN_GROUP, AuditEstimate, AuditGroup, estimate, tuned_weight
from echo4o.evaluation.folder import AUDIT, JUDGE
from echo4o.evaluation.score import Evaluation, read_evaluation

METHOD = (
    "difference estimator with a tuned weight (prediction-powered inference), stratified by group, prompts sampled without "
    "replacement, with finite-population correction; 95% interval by Student's t"
)


def audit_result(evaluation: Evaluation, withheld: str | None, seed: int) -> dict[str, Any] | None:
    """What the second judge would give on everything; None where there was no audit.

    Raises:
        ValueError: the audit judged other images.
    """
    folder = evaluation.out / AUDIT
    if not (folder / JUDGE).is_file():
        return None
    audited = read_evaluation(folder)
    first, second = evaluation.values(), audited.values()
    groups = {name: _group(of, second.get(name, {})) for name, of in first.items() if of}
    counts = {name: len(group.first) for name, group in groups.items()}
    scale, images = evaluation.benchmark.scale, evaluation.judge["pictures_per_prompt"]
    numbers = {}
    for name, weights in evaluation.benchmark.aggregates(counts).items():
        numbers[name] = _number(groups, weights, scale, images)
    result = {
        "judge": audited.judge["judge"],
        "part": audited.header["part"],
        "prompts": sum(len(group.audited) for group in groups.values()),
        "of": sum(counts.values()),
        "withheld": withheld,
        "score": None if withheld else numbers["score"],
        "also": {} if withheld else {name: of for name, of in numbers.items() if name != "score"},
        "groups": {name: _group_number(group, scale, images) for name, group in groups.items()},
        "agreement": agreement_of(evaluation, audited, seed),
        "method": METHOD,
    }
    return result


def _group(first: dict[str, float], second: dict[str, float]) -> AuditGroup:
    ids = list(first)
    places = [number for number, prompt in enumerate(ids) if prompt in second]
    return AuditGroup(
        np.array([first[prompt] for prompt in ids]),
        np.array(places, int),
        np.array([second[ids[place]] for place in places]),
    )


def _number(
    groups: Mapping[str, AuditGroup], weights: Mapping[str, float], scale: float, images: int
) -> dict[str, Any]:
    return {
        **_plain(estimate(groups, weights, scale, images)),
        "first_judge": sum(weight * float(groups[name].first.mean()) for name, weight in weights.items()),
        "weight": tuned_weight(groups, weights),
        "audit_alone": _plain(estimate(groups, weights, scale, images, 0.0)),
    }


def _group_number(group: AuditGroup, scale: float, images: int) -> dict[str, Any]:
    """A group's estimate; its interval only with enough audited prompts."""
    found = _plain(estimate({"": group}, {"": 1.0}, scale, images))
    if len(group.audited) < MIN_GROUP:
        found["interval"] = None
    return found | {"audited": len(group.audited), "prompts": len(group.first)}


def _plain(result: AuditEstimate) -> dict[str, Any]:
    values = asdict(result)
    return {
        "estimate": None if math.isnan(result.value) else result.value,
        "interval": list(values["interval"]) if values["interval"] else None,
    }
