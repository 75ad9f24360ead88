"""How Imagine-Bench is scored: one place for the metric and for the benchmark."""

GROUP_OF = {
    "COLOR": "attribute_shift",
    "SHAPE": "attribute_shift",
    "SIZE": "attribute_shift",
    "MATERIAL": "hybridization",
    "COMBINATION": "hybridization",
    "TIME": "spatiotemporal",
    "ENVIRONMENT": "spatiotemporal",
    "Multi-Object": "multi_object",
}
WEIGHTS = {"attribute_shift": 3, "hybridization": 2, "spatiotemporal": 2, "multi_object": 2}


def sample_score(fantasy_fulfillment: float, identity_preservation: float, aesthetic_quality: float) -> float:
    """0.8 x the weaker of fulfilment and identity + 0.2 x aesthetics, each from 0 to 10."""
    return 0.8 * min(fantasy_fulfillment, identity_preservation) + 0.2 * aesthetic_quality


def aggregates(counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Weights of the groups' means in each overall number, from the scored prompts per group."""
    groups = [group for group, count in counts.items() if count]
    weight, total = sum(WEIGHTS[group] for group in groups), sum(counts[group] for group in groups)
    return {
        "score": {group: WEIGHTS[group] / weight for group in groups},
        "plain_mean": {group: counts[group] / total for group in groups},
    }
