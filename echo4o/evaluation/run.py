"""Combines the steps, for the command line and for images in Python."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.common import strict_json
from echo4o.common.files import write_bytes, write_text
from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt
from echo4o.evaluation.benchmarks.prompt_files import PromptSet, from_row, more_of, to_row
from echo4o.evaluation.folder import IMAGES, PROMPTS
from echo4o.evaluation.images import find_images, require_all
from echo4o.evaluation.judge_prompts import JudgePrompt, load_judge_prompts
from echo4o.evaluation.judges import Judge, make_judge
from echo4o.evaluation.judging import JudgingOptions, JudgingOutcome, JudgingSetup, judge_images
from echo4o.evaluation.score import score_folder
from echo4o.evaluation.score_report import write_report


def keep_prompts(benchmark: Benchmark, prompts: PromptSet, out: Path) -> None:
    """Writes the prompts into the folder, from which later steps read them.

    Raises:
        ValueError: the folder holds an evaluation of other prompts.
    """
    header = {
        "benchmark": benchmark.name,
        "sha256": prompts.sha256,
        "official": prompts.official,
        "part": prompts.part,
    }
    header |= prompts.more
    known = next(iter(JsonLines(out / PROMPTS)), None)
    if known == header:
        return
    if known is not None:
        changed = ", ".join(name for name in header if known.get(name) != header[name])
        raise ValueError(f"{out} holds an evaluation of other prompts ({changed} differs): use another --out")
    lines = [header, *(to_row(prompt) for prompt in prompts.prompts)]
    text = "".join(f"{strict_json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    write_text(out / PROMPTS, text)


def kept_prompts(out: Path) -> tuple[Benchmark, PromptSet]:
    """Returns the benchmark and the prompts that an earlier step wrote into a folder."""
    rows = list(JsonLines(out / PROMPTS))
    if not rows:
        raise ValueError(f"{out}: there is no evaluation in this folder")
    header = rows[0]
    prompts = tuple(from_row(row) for row in rows[1:])
    return get_benchmark(header["benchmark"]), PromptSet(
        prompts, header["sha256"], header["official"], header["part"], more_of(header)
    )


def require_fitting(benchmark: Benchmark, judge: Judge) -> None:
    """Raise ValueError if a judge cannot judge a benchmark."""
    if benchmark.only_judge and judge.name != benchmark.only_judge:
        raise ValueError(f"{benchmark.title} can only be judged by {benchmark.only_judge}, not by {judge.name}")
    if judge.benchmarks is not None and benchmark.name not in judge.benchmarks:
        raise ValueError(
            f"the judge {judge.name} can only judge {', '.join(judge.benchmarks)}, not {benchmark.name}: pass --judge"
        )


def judge_folder(
    benchmark: Benchmark,
    prompts: Sequence[BenchmarkPrompt],
    judge: Judge,
    out: Path,
    images: Path | None = None,
    per_prompt: int = 1,
    repeats: int = 1,
    judge_prompts: Mapping[str, JudgePrompt] | None = None,
    allow_missing: bool = False,
    options: JudgingOptions | None = None,
) -> JudgingOutcome:
    """Judges the images of a folder, by default `out/images`."""
    require_fitting(benchmark, judge)
    folder = images or out / IMAGES
    found = find_images(folder, prompts, per_prompt, benchmark)
    if not allow_missing:
        require_all(found, folder, per_prompt)
    setup = JudgingSetup(
        benchmark, judge.identity(), dict(judge_prompts or load_judge_prompts(benchmark)), per_prompt, repeats
    )
    return judge_images(setup, prompts, found, judge, out, options)


def evaluate_images(
    benchmark: str,
    images_by_id: Mapping[str, Any],
    judge: str | Judge,
    out: str | Path,
    rows: Sequence[dict] | None = None,
    prompts: str | Path | None = None,
    min_coverage: float = 1.0,
    options: JudgingOptions | None = None,
) -> dict[str, Any]:
    """Judges and scores images; returns the contents of `out/result.json`.

    Args:
        benchmark: a name from [`BENCHMARKS`].
        images_by_id: PIL images, or paths, by prompt id.
        judge: as on the command line, or a [`Judge`].
        out: the folder of the evaluation.
        rows: the prompts, as rows of a prompt file.
        prompts: the prompt file. Without `rows` and `prompts`, the official prompts are downloaded.
    """

    from echo4o.evaluation.benchmarks.prompt_files import load_prompts

    definition, out = get_benchmark(benchmark), Path(out)
    if rows is not None:
        prompts = out / "rows.jsonl"
        text = "".join(f"{strict_json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_text(prompts, text)
    prompt_set = load_prompts(definition, Path(prompts) if prompts else None)
    keep_prompts(definition, prompt_set, out)
    _keep_images(images_by_id, out / IMAGES, {prompt.id for prompt in prompt_set.prompts})
    judge = make_judge(judge) if isinstance(judge, str) else judge
    judge_folder(definition, prompt_set.prompts, judge, out, options=options, allow_missing=min_coverage < 1)
    result = score_folder(out, min_coverage)
    write_report(out)
    return result


def _keep_images(images: Mapping[str, Any], folder: Path, ids: set[str]) -> None:
    import io

    unknown = sorted(set(map(str, images)) - ids)
    if unknown:
        raise ValueError(f"there is no prompt with the id {unknown[0]!r}, but an image of it")
    for name, image in images.items():
        if isinstance(image, (str, Path)):
            target, data = folder / f"{name}{Path(image).suffix.lower()}", Path(image).read_bytes()
        else:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            target, data = folder / f"{name}.png", buffer.getvalue()
        if not target.is_file() or _hash(target.read_bytes()) != _hash(data):
            write_bytes(target, data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
