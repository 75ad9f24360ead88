"""Measures how much two judges, or one judge at two dates, agree on the same images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from echo4o.common.files import write_text
from echo4o.common.thumbnails import thumbnail_uri
from echo4o.evaluation import statistics
from echo4o.evaluation.images import image_name
from echo4o.evaluation.score import Evaluation, JudgedImage, read_evaluation
from echo4o.modeling.common.image_files import open_image

PAGE = "agreement.html"
_THUMBNAIL = 256
_MAX_SHOWN = 500  # images on the page
_RESAMPLES = 2000


@dataclass(frozen=True)
class _Pair:
    """One image, judged in both runs."""

    a: JudgedImage
    b: JudgedImage

    @property
    def difference(self) -> float:
        return (self.b.score or 0.0) - (self.a.score or 0.0)


def agree(a: Path, b: Path, seed: int = 0) -> dict[str, Any]:
    """Agreement of the judgements in two folders over the images that both scored.

    Returns:
        dict with `score` and `groups` (`a`, `b`, `difference` with its 95% `interval`), and for each `field` of the
        verdicts the share of equal values, Cohen's kappa (quadratically weighted for scales; None where all values are
        equal) with its interval, and the mean difference; `differ` lists the images with different scores.

    Raises:
        ValueError: the folders have other prompts or other images.
    """
    first, second = read_evaluation(Path(a)), read_evaluation(Path(b))
    pairs = _pairs(first, second)
    values: tuple[dict, dict] = (defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list)))
    for pair in pairs:
        for by_group, sample in zip(values, (pair.a, pair.b)):
            by_group[sample.prompt.group][sample.prompt.id].append(sample.score)
    means_a, means_b = ({group: _means(by_prompt) for group, by_prompt in by_group.items()} for by_group in values)
    differences = {group: [y - x for x, y in zip(means_a[group], means_b[group])] for group in means_a}
    intervals, group_intervals = statistics.bootstrap(differences, first.benchmark.aggregates, seed)
    totals = [statistics.overall(means, first.benchmark.aggregates)["score"] for means in (means_a, means_b)]
    return {
        "benchmark": first.benchmark.name,
        "a": str(a),
        "b": str(b),
        "judges": [first.judge["judge"], second.judge["judge"]],
        "images": len(pairs),
        "of": len(first.samples),
        "score": _line(totals[0], totals[1], intervals["score"]),
        "groups": {
            group: _line(fmean(means_a[group]), fmean(means_b[group]), group_intervals[group]) for group in means_a
        },
        "fields": _fields(first, second, pairs, seed),
        "differ": [_difference(first, pair) for pair in _differing(pairs)],
        "seed": seed,
    }


def _line(a: float, b: float, interval: list[float]) -> dict[str, Any]:
    return {"a": float(a), "b": float(b), "difference": float(b - a), "interval": interval}


def _means(by_prompt: Mapping[str, Sequence[float]]) -> list[float]:
    return [fmean(scores) for scores in by_prompt.values()]


def _pairs(a: Evaluation, b: Evaluation) -> list[_Pair]:
    if a.header["sha256"] != b.header["sha256"] or a.benchmark.groups != b.benchmark.groups:
        raise ValueError(f"{a.out} and {b.out} come from different prompts: their judges saw different questions")
    hashes_a, hashes_b = a.judge["pictures"], b.judge["pictures"]  # file name -> SHA-256
    other = [name for name, digest in hashes_a.items() if hashes_b.get(name, digest) != digest]
    if other:
        raise ValueError(
            f"{a.out} and {b.out} have other images ({len(other)}, such as {other[0]}): only judgements of the same "
            "images can agree"
        )
    known = {(sample.prompt.id, sample.number, sample.repeat): sample for sample in b.samples}
    pairs = []
    for sample in a.samples:
        twin = known.get((sample.prompt.id, sample.number, sample.repeat))
        if twin is not None and sample.score is not None and twin.score is not None:
            pairs.append(_Pair(sample, twin))
    if not pairs:
        raise ValueError(f"{a.out} and {b.out} have no image that is scored in both")
    return pairs


def agreement_of(a: Evaluation, b: Evaluation, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Agreement of two judges by field, over the images that both scored. Raises ValueError for other images."""
    return _fields(a, b, _pairs(a, b), seed)


def _fields(a: Evaluation, b: Evaluation, pairs: Sequence[_Pair], seed: int) -> dict[str, dict[str, Any]]:
    """Agreement by field. The values of both judges for one item form a pair."""
    values: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        values_a = a.benchmark.judged_values(pair.a.prompt, pair.a.records)
        values_b = b.benchmark.judged_values(pair.b.prompt, pair.b.records)
        for (field, item), value in values_a.items():
            if (field, item) in values_b:
                values[field][pair.a.prompt.id].append((value, values_b[field, item]))
    return {field: agreement(list(by_prompt.values()), seed) for field, by_prompt in values.items()}


def agreement(by_prompt: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> dict[str, Any]:
    """Agreement of pairs of values, grouped by prompt: prompts are resampled for the interval of kappa."""
    pairs = np.array([pair for pairs in by_prompt for pair in pairs], float)
    scale = bool(np.isin(pairs, (0.0, 1.0)).all())
    sums = np.array([_sums(np.array(pairs, float)) for pairs in by_prompt])
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=_RESAMPLES)
    resampled = [kappa for kappa in map(_kappa, counts @ sums) if kappa is not None]
    kappa = _kappa(sums.sum(axis=0))
    interval = None
    if kappa is not None and resampled:
        low, high = np.quantile(resampled, [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2])
        interval = [min(float(low), kappa), max(float(high), kappa)]
    return {
        "values": len(pairs),
        "equal": float((pairs[:, 0] == pairs[:, 1]).mean()),
        "kappa": kappa,
        "kappa_interval": interval,
        "kappa_weights": "none" if scale else "quadratic",
        "mean_difference": float((pairs[:, 1] - pairs[:, 0]).mean()),
    }


def _sums(pairs: np.ndarray) -> np.ndarray:
    x, y = pairs.T
    return np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), ((x - y) ** 2).sum()])


def _kappa(sums: np.ndarray) -> float | None:
    """Cohen's kappa with quadratic weights, which for two values is the unweighted one; None if nothing varies.

    1 - (mean squared difference) / (the same for independent judges with these two distributions).
    """
    count, x, y, xx, yy, squared = sums
    expected = xx / count + yy / count - 2 * (x / count) * (y / count)
    return None if expected <= 1e-12 else float(1 - (squared / count) / expected)


def _differing(pairs: Sequence[_Pair]) -> list[_Pair]:
    return sorted((pair for pair in pairs if pair.difference), key=lambda pair: -abs(pair.difference))


def _difference(evaluation: Evaluation, pair: _Pair) -> dict[str, Any]:
    name = image_name(pair.a.prompt.id, pair.a.number, evaluation.judge["pictures_per_prompt"])
    return {"image": name, "repeat": pair.a.repeat, "group": pair.a.prompt.group, "a": pair.a.score, "b": pair.b.score}


def write_agreement(a: Path, b: Path, file: Path, seed: int = 0) -> dict[str, Any]:
    """Write the page about two folders and return the result of [`agree`]."""
    from jinja2 import Environment, PackageLoader

    found = agree(a, b, seed)
    first, second = read_evaluation(Path(a)), read_evaluation(Path(b))
    pairs = _differing(_pairs(first, second))
    environment = Environment(loader=PackageLoader("echo4o.evaluation", "."), autoescape=True)
    page = environment.get_template("agreement.html.j2").render(
        found=found,
        title=first.benchmark.title,
        cards=[_card(first, second, pair) for pair in pairs[:_MAX_SHOWN]],
        hidden=max(0, len(pairs) - _MAX_SHOWN),
    )
    write_text(file, page)
    return found


def _card(first: Evaluation, second: Evaluation, pair: _Pair) -> dict[str, Any]:
    listed = _difference(first, pair)
    file = first.judge["files"].get(listed["image"]) or second.judge["files"].get(listed["image"])
    explained = [
        "; ".join(run.benchmark.explanation(sample.prompt, record) for record in sample.records)
        for run, sample in ((first, pair.a), (second, pair.b))
    ]
    return listed | {"text": pair.a.prompt.text, "reasons": explained, "thumbnail": _thumbnail(file)}


def _thumbnail(file: str | None) -> str | None:
    try:
        return thumbnail_uri(open_image(Path(file)), _THUMBNAIL) if file else None
    except OSError:
        return None
