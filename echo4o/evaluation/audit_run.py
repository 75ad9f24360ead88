"""Judges a random share of the prompts with a second judge, in `audit/`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from echo4o.common.files import write_json
from echo4o.evaluation.audit_estimate import sample_prompts
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt
from echo4o.evaluation.benchmarks.prompt_files import PromptSet
from echo4o.evaluation.folder import AUDIT, COSTS, IMAGES, PROMPTS
from echo4o.evaluation.judge_prompts import JudgePrompt
from echo4o.evaluation.judges import Judge
from echo4o.evaluation.judging import JudgingOptions, JudgingOutcome
from echo4o.evaluation.run import judge_folder, keep_prompts


def sampled_prompts(prompts: Sequence[BenchmarkPrompt], share: float, seed: int) -> tuple[BenchmarkPrompt, ...]:
    """A random share of the prompts of each group, the same for the same seed."""
    if not 0 < share <= 1:
        raise ValueError(f"--audit-share is {share}; it must be above 0 and at most 1")
    groups: dict[str, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt.id)
    chosen = set(sample_prompts(groups, share, seed))
    return tuple(prompt for prompt in prompts if prompt.id in chosen)


def audit_folder(
    benchmark: Benchmark,
    prompts: PromptSet,
    judge: Judge,
    out: Path,
    share: float,
    seed: int,
    per_prompt: int,
    images: Path | None = None,
    judge_prompts: Mapping[str, JudgePrompt] | None = None,
    allow_missing: bool = False,
    options: JudgingOptions | None = None,
) -> JudgingOutcome:
    """Judge a random share of the prompts with a second judge, in `out/audit`. A larger share keeps what was judged."""
    chosen = sampled_prompts(prompts.prompts, share, seed)
    folder = out / AUDIT
    (folder / PROMPTS).unlink(missing_ok=True)  # of a smaller share
    keep_prompts(
        benchmark, replace(prompts, prompts=chosen, part=f"audit: {share:g} of each group, seed {seed}"), folder
    )
    outcome = judge_folder(
        benchmark,
        chosen,
        judge,
        folder,
        images=images or out / IMAGES,
        per_prompt=per_prompt,
        judge_prompts=judge_prompts,
        allow_missing=allow_missing,
        options=options,
    )
    _write_costs(folder, outcome, len(chosen) / len(prompts.prompts))
    return outcome


def _write_costs(folder: Path, outcome: JudgingOutcome, share: float) -> None:
    """What the audit cost, and what the second judge would have cost for everything."""
    spent, calls = outcome.ledger.spent, outcome.ledger.calls
    costs = {"calls": calls, "calls_saved": round(calls / share) - calls, "usd": spent, "usd_saved": None}
    if spent is not None:
        costs["usd_saved"] = spent / share - spent
    write_json(folder / COSTS, costs)
