"""Step 3: computes scores from records. Only judged images count; the coverage is reported with every score."""

import hashlib
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from echo4o.common.files import read_json, write_json
from echo4o.common.image_metadata import image_sha256
from echo4o.common.json_lines import JsonLines
from echo4o.evaluation import statistics
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt, Measure
from echo4o.evaluation.benchmarks.prompt_files import from_row, more_of
from echo4o.evaluation.folder import GENERATION, JUDGE, PROMPTS, RECORDS, RESULT
from echo4o.evaluation.images import image_name
from echo4o.evaluation.released_prompts import RELEASED

STATUSES = ("scored", "judge_error", "missing_image", "not_judged")
_LIBRARIES = ("torch", "diffusers", "transformers", "openai", "numpy", "pillow")
_FROM_GENERATION = (
    "model", "model_revision", "adapter", "adapter_revision", "dtype", "seed", "steps", "guidance", "image_guidance", "height", "width",
    "think",
)  # fmt: skip


@dataclass(frozen=True)
class JudgedImage:
    """One judgement of an image in all aspects: its status, and its score if it has one."""

    prompt: BenchmarkPrompt
    number: int  # of the image among those of its prompt, from 1
    repeat: int
    status: str
    score: float | None
    records: tuple[dict, ...]


@dataclass(frozen=True)
class Evaluation:
    """The contents of a judged folder."""

    benchmark: Benchmark
    prompts: list[BenchmarkPrompt]
    header: dict[str, Any]  # of the prompts' file
    judge: dict[str, Any]
    generation: dict[str, Any]
    samples: list[JudgedImage]
    out: Path

    def values(self, of_prompt: Callable[[Sequence[float]], float] = fmean) -> dict[str, dict[str, float]]:
        """By group, each prompt's mean score over its scored samples, or another function of them."""
        by_prompt = defaultdict(list)
        for sample in self.samples:
            if sample.score is not None:
                by_prompt[sample.prompt.id].append(sample.score)
        values = {group: {} for group in dict.fromkeys(prompt.group for prompt in self.prompts)}
        for prompt in self.prompts:
            if prompt.id in by_prompt:
                values[prompt.group][prompt.id] = of_prompt(by_prompt[prompt.id])
        return values


def read_evaluation(out: Path) -> Evaluation:
    """Reads a judged folder. Raises ValueError if nothing was judged, or images changed since."""
    rows = list(JsonLines(out / PROMPTS))
    judge = read_json(out / JUDGE)
    if not rows or judge is None:
        raise ValueError(f"{out}: nothing was judged here yet; run echo4o evaluate judge first")
    header, prompts = rows[0], [from_row(row) for row in rows[1:]]
    benchmark = get_benchmark(header["benchmark"])
    _require_unchanged(judge)
    samples = list(_samples(benchmark, prompts, judge, JsonLines(out / RECORDS)))
    return Evaluation(benchmark, prompts, header, judge, read_json(out / GENERATION) or {}, samples, out)


def _require_unchanged(judge: dict) -> None:
    changed = []
    for name, digest in judge["pictures"].items():
        path = judge["files"].get(name)
        if path and Path(path).is_file() and image_sha256(Path(path).read_bytes()) != digest:
            changed.append(name)
    if changed:
        raise ValueError(
            f"{len(changed)} images have changed since they were judged ({', '.join(changed[:8])}): judge them again"
        )


def _samples(benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], judge: dict, records: JsonLines):
    latest = {}
    for record in records:
        if record["judge"] == judge["fingerprint"]:
            latest[record["id"], record["picture"], record["repeat"], record["aspect"], record["image_sha256"]] = (
                record
            )
    per_prompt = judge["pictures_per_prompt"]
    for prompt in prompts:
        for number in range(1, per_prompt + 1):
            digest = judge["pictures"].get(image_name(prompt.id, number, per_prompt))
            for repeat in range(1, judge["repeats"] + 1):
                keys = [(prompt.id, number, repeat, aspect.name, digest) for aspect in benchmark.aspects_of(prompt)]
                found = tuple(latest[key] for key in keys if key in latest)
                yield _sample(benchmark, prompt, number, repeat, digest, found)


def _sample(benchmark: Benchmark, prompt: BenchmarkPrompt, number: int, repeat: int, digest, found) -> JudgedImage:
    statuses = {record["status"] for record in found}
    score = None
    if digest is None:
        status = "missing_image"
    elif "judge_error" in statuses:
        status = "judge_error"
    elif len(found) < len(benchmark.aspects_of(prompt)):
        status = "not_judged"
    else:
        status = "scored"
        score = benchmark.image_score(prompt, found)
    return JudgedImage(prompt, number, repeat, status, score, found)


def score_folder(out: Path, min_coverage: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Scores a judged folder and writes `result.json`; the same inputs give the same bytes."""
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"--min-coverage is {min_coverage}; it must be from 0 to 1")
    result = score(read_evaluation(out), min_coverage, seed)
    write_json(out / RESULT, result)
    return result


def score(evaluation: Evaluation, min_coverage: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """The result of a judged folder; see `docs/evaluation.md` for its fields."""
    benchmark, samples = evaluation.benchmark, evaluation.samples
    values = {group: list(by_prompt.values()) for group, by_prompt in evaluation.values().items()}
    totals = statistics.overall(values, benchmark.aggregates)
    intervals, group_intervals = statistics.bootstrap(values, benchmark.aggregates, seed, benchmark.scale == 1.0)
    for name, (value, interval) in _prompt_numbers(evaluation, seed).items():
        totals[name], intervals[name] = value, interval
    scored = sum(sample.score is not None for sample in samples)
    coverage = scored / len(samples)
    withheld = _why_withheld(evaluation, values, coverage, min_coverage)
    means = statistics.group_means(values)
    counts = {group: _count(samples, "group", group) for group in values}
    result = {
        "benchmark": benchmark.name,
        "score": None if withheld else totals["score"],
        "withheld": withheld,
        "coverage": coverage,
        "min_coverage": min_coverage,
        "groups": {group: {"score": means.get(group)} | counts[group] for group in values},
        "also": {} if withheld else {name: value for name, value in totals.items() if name != "score"},
        "statuses": {status: sum(sample.status == status for sample in samples) for status in STATUSES},
        "intervals": {
            "level": statistics.LEVEL,
            "method": "percentile bootstrap over prompts within groups; Jeffreys' posterior where a group is all right or all wrong",
            "resamples": statistics.RESAMPLES,
            "seed": seed,
            "score": None if withheld else intervals["score"],
            "also": {} if withheld else {name: of for name, of in intervals.items() if name != "score"},
            "groups": group_intervals,
        },
        "fields": _field_means(samples) if benchmark.reports_fields else {},
        "types": _types(evaluation),
        "repeats": _repeats(evaluation, benchmark),
    }
    measure = measure_of(evaluation)
    if measure is not None:
        result["measure"] = asdict(measure)
    if any(digest.startswith(f"{RELEASED}:") for digest in evaluation.judge["prompt_hashes"].values()):
        result["judge_words"] = "those of the released script"
    from echo4o.evaluation.audit import audit_result

    audit = audit_result(evaluation, withheld, seed)
    if audit is not None:
        result["audit"] = audit
    details = benchmark.details([(sample.prompt, sample.records) for sample in samples if sample.score is not None])
    return result | details | _origin(evaluation)


def measure_of(evaluation: Evaluation) -> Measure | None:
    """What the score of a judged folder measures; None where its benchmark has one measure only."""
    return evaluation.benchmark.measure(evaluation.header, evaluation.judge["judge"])


def _prompt_numbers(evaluation: Evaluation, seed: int) -> dict[str, tuple[float, list[float]]]:
    """Numbers of another kind per prompt than the mean of its images: the mean over prompts, and its interval."""
    numbers = {}
    for name, of_prompt in evaluation.benchmark.prompt_numbers.items():
        values = {group: list(by_prompt.values()) for group, by_prompt in evaluation.values(of_prompt).items()}
        intervals, _ = statistics.bootstrap(values, _by_prompts, seed, evaluation.benchmark.scale == 1.0)
        if intervals:
            numbers[name] = statistics.overall(values, _by_prompts)["score"], intervals["score"]
    return numbers


def _by_prompts(counts: dict[str, int]) -> dict[str, dict[str, float]]:
    return {"score": {group: count / sum(counts.values()) for group, count in counts.items() if count}}


def _why_withheld(evaluation: Evaluation, values: dict, coverage: float, min_coverage: float) -> str | None:
    if not any(values.values()):
        return "nothing was scored"
    if coverage < min_coverage:
        return f"coverage is {coverage:.4f}, below --min-coverage {min_coverage:g}"
    empty = [group for group, of in values.items() if not of]
    if empty:
        return f"nothing was scored in {', '.join(empty)}"
    if evaluation.header.get("part"):
        return f"a part of the prompts was evaluated: {evaluation.header['part']}"
    return None


def _count(samples: Sequence[JudgedImage], field: str, name: str) -> dict[str, int]:
    chosen = [sample for sample in samples if getattr(sample.prompt, field) == name]
    return {"scored": sum(sample.score is not None for sample in chosen), "total": len(chosen)}


def _field_means(samples: Sequence[JudgedImage]) -> dict[str, float]:
    """The mean of each field of the verdicts, over the scored samples."""
    fields = defaultdict(list)
    for sample in samples:
        if sample.score is not None:
            for record in sample.records:
                for name, value in record["scores"].items():
                    fields[name].append(value)
    return {name: fmean(of) for name, of in fields.items()}


def _types(evaluation: Evaluation) -> dict[str, dict]:
    """Scores by type, where the benchmark has types within groups."""
    types = list(dict.fromkeys(prompt.type for prompt in evaluation.prompts))
    if all(prompt.type in ("", prompt.group) for prompt in evaluation.prompts):
        return {}
    values = {prompt_id: value for group in evaluation.values().values() for prompt_id, value in group.items()}
    found = {}
    for kind in types:
        scores = [values[prompt.id] for prompt in evaluation.prompts if prompt.type == kind and prompt.id in values]
        found[kind] = {"score": fmean(scores) if scores else None} | _count(evaluation.samples, "type", kind)
    return found


def _repeats(evaluation: Evaluation, benchmark: Benchmark) -> dict[str, Any] | None:
    """Returns the variance of the judge over repeated judgements; None without repeats."""
    repeats = evaluation.judge["repeats"]
    if repeats < 2:
        return None
    by_image = defaultdict(dict)
    for sample in evaluation.samples:
        if sample.score is not None:
            by_image[sample.prompt.id, sample.number][sample.repeat] = (sample.prompt.group, sample.score)
    complete = [judgements for judgements in by_image.values() if len(judgements) == repeats]
    if not complete:
        return {"repeats": repeats, "pictures": 0}
    headlines = []
    for repeat in range(1, repeats + 1):
        values = defaultdict(list)
        for judgements in complete:
            group, value = judgements[repeat]
            values[group].append(value)
        headlines.append(statistics.overall(values, benchmark.aggregates)["score"])
    scores = [[score for _, score in judgements.values()] for judgements in complete]
    return {
        "repeats": repeats,
        "pictures": len(complete),
        "score_of_each": headlines,
        "score_std": pstdev(headlines),
        "mean_std_of_a_picture": fmean(pstdev(values) for values in scores),
        "pictures_judged_differently": sum(len(set(values)) > 1 for values in scores) / len(scores),
    }


def _origin(evaluation: Evaluation) -> dict[str, Any]:
    """Returns everything that a score depends on besides the images; nothing that changes between runs."""
    judge, generation, header = evaluation.judge, evaluation.generation, evaluation.header
    hashes = "".join(f"{name} {digest}\n" for name, digest in sorted(judge["pictures"].items()))
    return {
        **{name: generation.get(name) for name in _FROM_GENERATION},
        "pictures_per_prompt": judge["pictures_per_prompt"],
        "pictures_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "judge": judge["judge"],
        "prompt_hashes": {"prompts": header["sha256"], **judge["prompt_hashes"]},
        "prompts": {"count": len(evaluation.prompts), "official": header["official"], "part": header["part"]}
        | more_of(header),
        "versions": {"echo4o": _echo4o(), "python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
    }


def _echo4o() -> str:
    from echo4o import __version__

    return __version__
