"""The steps put together: for the command line, and for pictures that are at hand in Python."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.common import strict_json
from echo4o.common.files import write_bytes, write_text
from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt
from echo4o.evaluation.folder import IMAGES, PROMPTS
from echo4o.evaluation.images import find_images, require_all
from echo4o.evaluation.judge_prompts import JudgePrompt, load_judge_prompts
from echo4o.evaluation.judges import Judge, make_judge
from echo4o.evaluation.judging import JudgingOptions, JudgingOutcome, JudgingSetup, judge_images
from echo4o.evaluation.prompt_files import PromptSet, from_row, more_of, to_row
from echo4o.evaluation.score import score_folder
from echo4o.evaluation.score_report import write_report


def keep_prompts(benchmark: Benchmark, prompts: PromptSet, out: Path) -> None:
    """Write the prompts into the folder, so that each later step needs nothing else; refuse another set's folder."""

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
    """The prompts that an earlier step wrote into a folder."""
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
    """Judge the pictures of a folder (`out/images` if none is named)."""
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
    """Judge and score pictures that are at hand; returns what `out/result.json` holds.

    Args:
        benchmark: a name from [`BENCHMARKS`].
        images_by_id: PIL pictures, or paths, by prompt id.
        judge: as on the command line, or a [`Judge`].
        rows: the prompts as rows of a prompt file, or `prompts`: the file; neither: the official ones.
    """

    from echo4o.evaluation.prompt_files import load_prompts

    chosen, out = get_benchmark(benchmark), Path(out)
    if rows is not None:
        prompts = out / "rows.jsonl"
        text = "".join(f"{strict_json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_text(prompts, text)
    of_file = load_prompts(chosen, prompts and Path(prompts))
    keep_prompts(chosen, of_file, out)
    _keep_images(images_by_id, out / IMAGES, {prompt.id for prompt in of_file.prompts})
    made = make_judge(judge) if isinstance(judge, str) else judge
    judge_folder(chosen, of_file.prompts, made, out, options=options, allow_missing=min_coverage < 1)
    result = score_folder(out, min_coverage)
    write_report(out)
    return result


def _keep_images(images: Mapping[str, Any], folder: Path, ids: set[str]) -> None:
    import io

    unknown = sorted(set(map(str, images)) - ids)
    if unknown:
        raise ValueError(f"there is no prompt with the id {unknown[0]!r}, but a picture of it")
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
