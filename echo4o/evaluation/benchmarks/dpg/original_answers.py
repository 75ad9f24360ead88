"""Reads the answers that DPG-Bench's original script writes (`*_detail.txt`), so that they can be scored correctly."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from echo4o.common.files import read_json, write_json
from echo4o.common.json_lines import JsonLines
from echo4o.common.locks import FolderLock
from echo4o.evaluation.benchmarks.base import BenchmarkPrompt
from echo4o.evaluation.benchmarks.dpg.benchmark import ORIGINAL_JUDGE, DPGBench
from echo4o.evaluation.benchmarks.dpg.prompts import questions_of
from echo4o.evaluation.benchmarks.dpg.scoring import is_yes
from echo4o.evaluation.folder import JUDGE, RECORDS
from echo4o.evaluation.images import image_name
from echo4o.evaluation.judging import Judgement, JudgingSetup

# A line: the image file, the crop (x0, y0, x1, y1) of the image in its grid, the question, the answer.
_LINE = re.compile(r"(?P<file>.+?), \((?P<crop>\d+, ?\d+, ?\d+, ?\d+)\), (?P<rest>.+)")


@dataclass(frozen=True)
class _OriginalAnswer:
    item: str
    number: int
    text: str  # of the question, a comma, and the answer
    line: int


def import_answers(
    benchmark: DPGBench, prompts: Sequence[BenchmarkPrompt], file: Path, out: Path, per_prompt: int
) -> None:
    """Write the records of the original's answers into `out`, as if its model had been asked here.

    A question without an answer makes its image a `judge_error`; an image without answers is missing.

    Raises:
        ValueError: a line cannot be read, names an unknown prompt or question, or contradicts an earlier one.
    """
    if benchmark.one_call:
        raise ValueError("--answers holds one answer per question: score it as dpg, not as dpg_one_call")
    if not file.is_file():
        raise ValueError(f"--answers {file}: there is no such file")
    answers = _answers(prompts, file)
    data = file.read_bytes()
    identity = {"judge": ORIGINAL_JUDGE, "answers": file.name, "answers_sha256": hashlib.sha256(data).hexdigest()}
    setup = JudgingSetup(benchmark, identity, {}, per_prompt)
    known = read_json(out / JUDGE) or {}
    if known and known["fingerprint"] != setup.fingerprint:
        raise ValueError(
            f"{out} holds judgements by {known['judge']['judge']}, or of other answers: use another --out"
        )
    images = {(item, number) for item, number, _ in answers}
    wanted = [(prompt, number) for prompt in prompts for number in range(1, per_prompt + 1)]
    names = {key: image_name(*key, per_prompt) for key in ((prompt.id, number) for prompt, number in wanted)}
    write_json(
        out / JUDGE,
        {
            "benchmark": benchmark.name,
            "judge": identity,
            "prompt_hashes": {},
            "fingerprint": setup.fingerprint,
            "pictures_per_prompt": per_prompt,
            "repeats": 1,
            "run": setup.fingerprint,
            "pictures": {names[key]: _image_hash(file, key) for key in names if key in images},
            "missing": {names[key]: f"no answers in {file.name}" for key in names if key not in images},
            "files": {},
        },
    )
    if next(iter(JsonLines(out / RECORDS)), None) is not None:
        (out / RECORDS).unlink()  # of an import that was interrupted
    with FolderLock(out), JsonLines(out / RECORDS).appending() as append:
        for prompt, number in wanted:
            for record in _records(benchmark, setup, prompt, number, answers, images, file):
                append(record)


def _records(benchmark, setup, prompt, number, answers, images, file) -> Iterator[dict[str, Any]]:
    key, name = (prompt.id, number), image_name(prompt.id, number, setup.per_prompt)
    for aspect, question in zip(benchmark.aspects_of(prompt), questions_of(prompt)):
        if key not in images:
            item = Judgement(prompt, number, 1, aspect, None, "", name)
            yield item.record(setup, "missing_image", reason=f"no answers in {file.name}")
            continue
        item = Judgement(prompt, number, 1, aspect, None, "", name, _image_hash(file, key))
        answer = answers.get((*key, question.id))
        if answer is None:
            yield item.record(setup, "judge_error", reason=f"{file.name} has no answer to: {question.text}")
        else:
            yield item.record(setup, "scored", scores={"answer": float(is_yes(answer))}, reason=answer)


def _image_hash(file: Path, key: tuple[str, int]) -> str:
    """Stands for the hash of an image that only the original script saw."""
    return hashlib.sha256(f"{file.name} {key[0]} {key[1]}".encode()).hexdigest()


def _answers(prompts: Sequence[BenchmarkPrompt], file: Path) -> dict[tuple[str, int, int], str]:
    """The answers by prompt, number of the image, and question."""
    questions = {prompt.id: {q.text: q.id for q in questions_of(prompt)} for prompt in prompts}
    answers: dict[tuple[str, int, int], str] = {}
    for entry in _lines(file):
        where = f"{file}, line {entry.line}"
        if entry.item not in questions:
            raise ValueError(f"{where}: there is no prompt {entry.item!r} among those that are evaluated")
        # A question may contain commas: it is found by its text, the longest one that fits.
        fitting = [text for text in questions[entry.item] if entry.text.startswith(f"{text}, ")]
        if not fitting:
            raise ValueError(
                f"{where}: {entry.text[:80]!r} is not a question about {entry.item} in the question table"
            )
        text = max(fitting, key=len)
        key = (entry.item, entry.number, questions[entry.item][text])
        answer = entry.text[len(text) + 2 :]
        if answers.setdefault(key, answer) != answer:
            raise ValueError(
                f"{where}: {entry.item}, image {entry.number} was answered with {answers[key]!r} before: the file holds "
                "several runs; keep one of them"
            )
    if not answers:
        raise ValueError(f"{file}: it does not contain an answer")
    return answers


def _lines(file: Path) -> Iterator[_OriginalAnswer]:
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{file}, line {number}: it is not of the form FILE, (X0, Y0, X1, Y1), QUESTION, ANSWER")
        x, y, _, _ = (int(part) for part in match["crop"].split(","))
        name = PurePosixPath(match["file"].replace("\\", "/")).name
        # As the original: everything from the first dot on is the suffix.
        yield _OriginalAnswer(name.split(".")[0], 1 + (x > 0) + 2 * (y > 0), match["rest"], number)
