"""Writes report.html: the scores, published scores, and the images with the reasons of the judge."""

from pathlib import Path
from typing import Any

from echo4o.common.files import read_json, write_text
from echo4o.common.thumbnails import thumbnail_uri
from echo4o.evaluation.folder import AUDIT, COSTS, REPORT, RESULT
from echo4o.evaluation.images import image_name
from echo4o.evaluation.score import Evaluation, JudgedImage, measure_of, read_evaluation
from echo4o.modeling.common.image_files import open_image

_THUMBNAIL = 256
MAX_CARDS = 1000  # images in a report; with 4,260 it would be a file of about 100 MB
_WIDTH, _LABELS, _ROW = 760, 190, 34  # of the chart, in units of its view box


def write_report(out: Path) -> Path:
    """Writes the report of a scored folder: one HTML file that contains thumbnails of the images."""
    from jinja2 import Environment, PackageLoader

    result = read_json(out / RESULT)
    if result is None:
        raise ValueError(f"{out}: nothing was scored here yet; run echo4o evaluate score first")
    evaluation = read_evaluation(out)
    environment = Environment(loader=PackageLoader("echo4o.evaluation", "."), autoescape=True)
    published = load_published()
    page = environment.get_template("score_report.html.j2").render(
        result=result,
        title=evaluation.benchmark.title,
        scale=evaluation.benchmark.scale,
        chart=chart(evaluation, result, published_beside(evaluation, published)),
        published_as=evaluation.benchmark.published_as,
        sources=published["sources_of"].get(evaluation.benchmark.name, published["sources"]),
        cards=cards(evaluation),
        types=list(dict.fromkeys(prompt.type or prompt.group for prompt in evaluation.prompts)),
        outcomes=_outcomes(evaluation),
        costs=read_json(out / AUDIT / COSTS),
        hidden=max(0, len(evaluation.samples) - MAX_CARDS),
    )
    write_text(out / REPORT, page)
    return out / REPORT


def load_published() -> dict[str, Any]:
    """The published numbers by benchmark and model, and where they were read."""
    import yaml

    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text("utf-8"))


def published_beside(evaluation: Evaluation, published: dict[str, Any]) -> dict[str, dict]:
    """The published numbers of the same measure, by model; none where the measures differ."""
    measure = measure_of(evaluation)
    return published.get(evaluation.benchmark.name if measure is None else measure.published or "", {})


def chart(evaluation: Evaluation, result: dict, published: dict[str, dict]) -> dict[str, Any]:
    """Rows of the chart: our score with its interval, and the published ones, in units of the view box."""
    scale, headline = evaluation.benchmark.scale, evaluation.benchmark.published_as

    def x(value: float) -> float:
        return round(_LABELS + (_WIDTH - _LABELS - 60) * value / scale, 1)

    overall = result["score"] if headline == "score" else result["also"].get(headline)
    interval = result["intervals"]["score"] if headline == "score" else result["intervals"]["also"].get(headline)
    lines = [("overall" if headline == "score" else headline, overall, interval, "score")]
    for group, of in result["groups"].items():
        lines.append((group, of["score"], result["intervals"]["groups"].get(group), group))
    rows = []
    for index, (name, value, limits, key) in enumerate(lines):
        others = []
        for number, (model, numbers) in enumerate(published.items()):
            other = numbers["score"] if key == "score" else numbers.get("groups", {}).get(key)
            if other is not None:
                others.append({"model": model, "x": x(other), "value": other, "mark": number})
        rows.append(
            {
                "name": name.replace("_", " "),
                "y": 24 + index * _ROW,
                "value": value,
                "x": x(value) if value is not None else None,
                "interval": [x(limit) for limit in limits] if limits and value is not None else None,
                "others": others,
            }
        )
    ticks = [{"x": x(scale * part / 5), "label": f"{scale * part / 5:g}"} for part in range(6)]
    return {
        "rows": rows,
        "ticks": ticks,
        "zero": x(0),
        "width": _WIDTH,
        "height": 24 + len(rows) * _ROW + 24,
        "models": [{"name": model, "mark": number} for number, model in enumerate(published)],
    }


def _outcomes(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(_outcome(evaluation, sample) for sample in evaluation.samples))


def _outcome(evaluation: Evaluation, sample: JudgedImage) -> str:
    if sample.score is None or evaluation.benchmark.scale != 1.0:
        return sample.status
    return "correct" if sample.score == 1.0 else "incorrect"


def cards(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns one card per image and repeat: images without a score first, then the lowest scores."""
    samples = sorted(evaluation.samples, key=lambda sample: -1.0 if sample.score is None else sample.score)
    return [_card(evaluation, sample) for sample in samples[:MAX_CARDS]]


def _card(evaluation: Evaluation, sample: JudgedImage) -> dict[str, Any]:
    per_prompt = evaluation.judge["pictures_per_prompt"]
    name = image_name(sample.prompt.id, sample.number, per_prompt)
    file = evaluation.judge["files"].get(name)
    verdicts = []
    for record in sample.records:
        scores = ", ".join(f"{field.replace('_', ' ')} {value:g}" for field, value in (record["scores"] or {}).items())
        faults = [f"{fault['kind']}: {fault['message']}" for fault in record["faults"]]
        reason = evaluation.benchmark.explanation(sample.prompt, record)
        verdicts.append({"scores": scores, "reason": reason, "faults": faults})
    if not verdicts and name in evaluation.judge["missing"]:
        verdicts.append({"scores": "", "reason": evaluation.judge["missing"][name], "faults": []})
    return {
        "name": name if evaluation.judge["repeats"] == 1 else f"{name}, judgement {sample.repeat}",
        "type": sample.prompt.type or sample.prompt.group,
        "outcome": _outcome(evaluation, sample),
        "score": sample.score,
        "text": sample.prompt.text,
        "verdicts": verdicts,
        "thumbnail": _thumbnail(Path(file)) if file else None,
        "references": [_thumbnail(path) for path in sample.prompt.references],
        "link": _link(Path(file), evaluation.out) if file else None,
    }


def _link(file: Path, out: Path) -> str | None:
    """Returns a relative link to an image in the folder; None for an image elsewhere."""
    try:
        return file.relative_to(out.resolve()).as_posix()
    except ValueError:
        return None


def _thumbnail(path: Path) -> str | None:
    try:
        return thumbnail_uri(open_image(path), _THUMBNAIL)
    except ValueError:
        return None
