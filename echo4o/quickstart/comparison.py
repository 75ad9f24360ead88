"""Puts the quickstart's scores beside those that `echo4o.quickstart.control` recorded."""

from __future__ import annotations

from echo4o.evaluation.benchmarks.shapes4o.accuracy import Accuracy
from echo4o.evaluation.benchmarks.shapes4o.grammar import PARTS, TAGS

# Recorded experiments that every report shows, and their names there.
_RECORDED = {
    "base": "base",
    "base + loose": "base, {steps} steps of loose captions",
    "random + clean": "random weights, {steps} clean steps",
    "base + clean": "base, {steps} clean steps",
}


def pooled(runs: dict[str, dict], tag: str = "overall") -> Accuracy:
    """Returns the score of an experiment over the images of all its seeds."""
    scores = [run["scores"][tag] for run in runs.values()]
    return Accuracy(sum(score["right"] for score in scores), sum(score["of"] for score in scores))


def compared_scores(before: dict, after: dict, steps: int, control: dict) -> list[dict]:
    """Returns the scores of all tags together, each with a name and with the words on where it was measured.

    Args:
        before, after: scores of this run, as `score_table` returns them.
        steps: steps of this run.
        control: the record of `echo4o.quickstart.control`; empty if there is none.
    """
    rows = [
        {"name": "base", "measured": "here", **before},
        {"name": f"base, {steps} clean steps", "measured": "here", **after},
    ]
    for key, name in _RECORDED.items():
        if runs := control.get(key):
            score, seeds = pooled(runs), len(runs)
            low, high = score.interval
            rows.append(
                {
                    "name": name.format(steps=next(iter(runs.values()))["steps"]),
                    "measured": f"recorded, {seeds} seed{'s' if seeds > 1 else ''}",
                    "right": score.right,
                    "of": score.of,
                    "mean": round(score.mean, 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                }
            )
    return rows


def comparison_table(control: dict) -> str:
    """Returns the recorded experiments on all rows as a table in Markdown: one line each, over the images of all seeds."""
    lines = ["| start | then | correct | of each seed |", "|---|---|---|---|"]
    for key in _RECORDED:
        runs, (start, *rows) = control[key], key.split(" + ")
        steps = next(iter(runs.values()))["steps"]
        each = ", ".join(str(run["scores"]["overall"]["right"]) for run in runs.values())
        of = next(iter(runs.values()))["scores"]["overall"]["of"]
        then = f"{steps} {rows[0]} steps" if rows else "nothing"
        lines.append(f"| {start} | {then} | {_share(pooled(runs))} | {each} of {of} |")
    return "\n".join(lines)


def parts_table(control: dict) -> str:
    """Returns the recorded experiments without one part of the rows as a table in Markdown: one line for each tag.

    All columns have the same seeds.
    """
    columns = [f"base + clean without {part}" for part in PARTS]
    seeds = set.intersection(*(set(control[column]) for column in columns))
    lines = [f"| tag | all rows | {' | '.join(f'without `{part}`' for part in PARTS)} |", "|---" * 5 + "|"]
    for tag in (*TAGS, "overall"):
        scores = [
            pooled({seed: run for seed, run in control[column].items() if seed in seeds}, tag)
            for column in ("base + clean", *columns)
        ]
        cells = [_share(score) if tag == "overall" else f"{score.right} of {score.of}" for score in scores]
        lines.append(f"| {tag} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(score: Accuracy) -> str:
    low, high = score.interval
    return f"{score.right}/{score.of} = {score.mean:.2f} [{low:.2f}, {high:.2f}]"
