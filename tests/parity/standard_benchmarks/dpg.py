"""DPG-Bench: image scores and totals exact; where the original errs, the documented value of echo4o."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from echo4o.evaluation.benchmarks.dpg import questions as tables
from echo4o.evaluation.benchmarks.dpg.scoring import (
    DPGQuestion,
    broad_category,
    category_of,
    category_scores,
    image_score,
    is_yes,
)
from echo4o.evaluation.metrics.dpg.formula import prompt_score

from ..golden import GoldenFile, Record
from ..report import Check
from . import dpg_original
from .golden_set import GoldenSet

_ALMOST = 1e-14  # of a share: the original adds in the order of its sets
_SAME = 1e-9  # percent; shares of small whole numbers differ by more


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    file.json.note("source", "ran_with")
    parts = {"prompt_cases": check_prompt, "table_cases": check_table, "script_cases": check_script}
    for part, check_one in parts.items():
        for number, case in enumerate(file.json[part]):
            at = check.of(part).of(case["id"] if "id" in case else number)
            with at.trying():
                check_one(case, at)
    with check.trying("several_processes"):
        check_processes(file.json["several_processes"], check.of("several_processes"))


def questions_of(records: Sequence[Record]) -> list[DPGQuestion]:
    return [
        DPGQuestion(r["id"], category_of(r["tuple"]), r["question"], tuple(int(p) for p in r["parents"]))
        for r in records
    ]


def answers_of(image: Record) -> dict[int, bool]:
    return {int(number): is_yes(answer) for number, answer in image.items()}


def lacks_a_parent(questions: Sequence[DPGQuestion]) -> list[int]:
    known = {0, *(question.id for question in questions)}
    return [parent for question in questions for parent in question.parents if parent not in known]


# --- prompts ---


def check_prompt(case: Record, check: Check) -> None:
    questions, expected = questions_of(case["questions"]), case["expected"]
    images = [answers_of(image) for image in case["answers"]]
    if "grid_size" in case:
        images = _of_small_grid(case, questions, images, check)
    images = images[: case["pic_num"]]
    if lacks_a_parent(questions):
        check("a table with a missing parent is refused", _refuses(questions), True)
    if "error" in expected:
        check("error", _error(questions, images), expected["error"])
        return
    scores = [image_score(questions, image) for image in images]
    check("picture_scores", scores, expected["picture_scores"])
    check("score", prompt_score(scores), expected["score"])
    raw = {str(question.id): float(images[-1][question.id]) for question in questions}
    check("category_scores", raw, expected["category_scores"].plain())


def _of_small_grid(case: Record, questions, images: list[dict[int, bool]], check: Check) -> list[dict[int, bool]]:
    """The original's images of a grid file that is too small: those beyond it are black and answered no."""
    from PIL import Image

    from echo4o.evaluation.benchmarks.dpg.grid import cut_grid

    size, side = case["grid_size"], case["resolution"]
    width, height = size if isinstance(size, list) else (size, size)
    try:
        cut_grid(Image.new("RGB", (width, height)), side)
        check.fail("grid", "a grid file of another size was not refused")
    except ValueError as error:
        check("a grid of another size is refused", f"{2 * side}" in str(error), True)
    no = {question.id: False for question in questions}
    black = dpg_original.black_images((width, height), side)
    images = [*images, *[no] * (len(black) - len(images))]
    return [no if is_black else image for is_black, image in zip(black, images)]


def _error(questions: Sequence[DPGQuestion], images: Sequence[dict[int, bool]]) -> str:
    """The original's words for the error that ours raises."""
    missing = lacks_a_parent(questions)
    try:
        for image in images:
            image_score(questions, image)
    except ValueError as error:
        named = [parent for parent in missing if f"on question {parent}," in str(error)]
        return f"KeyError: {named[0]}" if named else str(error)
    return "no error"


def _refuses(questions: Sequence[DPGQuestion]) -> bool:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(tables.COLUMNS)
    for question in questions:
        parents = ",".join(map(str, question.parents))
        writer.writerow(["p", question.id, parents, question.category, question.text])
    try:
        tables.parse_question_table(text.getvalue())
    except ValueError as error:
        return "does not have" in str(error)
    return False


# --- tables ---


def check_table(case: Record, check: Check) -> None:
    expected, text = case["expected"].plain(), case["csv"]
    try:
        original: Any = dpg_original.read_table(text)
    except Exception as error:
        original = {"error": f"{type(error).__name__}: {error}"}
    check("as the original reads it", original, expected)
    check("as documented", _ours(text), _documented(text))


def _ours(text: str) -> Any:
    try:
        table = tables.parse_question_table(text)
    except ValueError:
        return "an error"
    return {
        item: [[q.id, q.category, list(q.parents), q.text] for q in questions] for item, questions in table.items()
    }


def _documented(text: str) -> Any:
    """Every row counts, rows of a prompt need not stand together; flawed tables are an error."""
    table: dict[str, dict[int, list]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        if not row["dependency"].strip():
            return "an error"
        number, parents = int(float(row["proposition_id"])), [int(float(p)) for p in row["dependency"].split(",")]
        rows = table.setdefault(row["item_id"], {})
        if number in rows:
            return "an error"
        rows[number] = [number, row["tuple"].split("(")[0].strip(), parents, row["question_natural_language"]]
    if any(p and p not in rows for rows in table.values() for row in rows.values() for p in row[2]):
        return "an error"
    return {item: list(rows.values()) for item, rows in table.items()}


# --- the whole script ---


def check_script(case: Record, check: Check) -> None:
    pic_num, expected = case["pic_num"], case["expected"]
    answers = {item: [answers_of(image) for image in images] for item, images in case["answers"].items()}
    prompts, scores, failed = [], [], []
    for item, records in case["questions"].items():
        questions = questions_of(records)
        if item not in answers:  # no image: the original leaves the prompt out silently, ours lowers the coverage
            continue
        images = answers[item][:pic_num]
        try:
            scores.append(prompt_score([image_score(questions, image) for image in images]))
            prompts.append((questions, images))
        except ValueError:
            check(f"{item}: a table with a missing parent is refused", _refuses(questions), True)
            failed.append(f"{item}.png")
    broad, detailed = dpg_original.last_image_categories(prompts)
    check("score", 100 * fmean(scores), expected["score"], _ALMOST * 100)
    check("failed", failed, list(expected["failed"]))
    _check_categories(broad, expected["l1"], check.of("l1"))
    _check_categories(detailed, expected["l2"], check.of("l2"))
    everything = [(questions, image) for questions, images in prompts for image in images]
    _check_documented_categories(everything, check.of("documented categories"))


def _check_categories(ours: dict[str, float], expected: Record, check: Check) -> None:
    check("names", sorted(ours), sorted(expected))
    for name, value in expected.items():
        check(name, ours.get(name), value, _ALMOST * 100)


def _check_documented_categories(images, check: Check) -> None:
    """Ours: over all images, not the last ones; the counts and the raw answers are recounted here."""
    broad, detailed = category_scores(images)
    for scores, name_of in ((broad, lambda q: q.broad_category), (detailed, lambda q: q.category)):
        for name, score in scores.items():
            raw = [image[q.id] for questions, image in images for q in questions if name_of(q) == name]
            check(name, [score.questions, score.raw], [len(raw), sum(raw) / len(raw)], _ALMOST)
            check(f"{name} with the rule", score.score <= score.raw, True)


# --- several processes ---


def check_processes(case: Record, check: Check) -> None:
    """With one process, our categories; with several, the same total and categories that are provably exchanged."""
    names = case["categories"]
    sizes = [number + 1 for number in range(len(names))]
    yes = [number % 2 == 0 for number in range(len(names))]
    questions = [
        DPGQuestion(10_000 * number + n, name, "?", (0,))
        for number, (name, size) in enumerate(zip(names, sizes))
        for n in range(1, size + 1)
    ]
    answers = {question.id: yes[names.index(question.category)] for question in questions}
    score = 100 * image_score(questions, answers)
    broad, detailed = category_scores([(questions, answers)] * 4)
    right = [{name: 100 * of.score for name, of in part.items()} for part in (broad, detailed)]
    for name, run in case.items():
        if name in ("note", "categories"):
            continue
        at = check.of(name)
        at("score", score, run["score"], _ALMOST * 100)
        l1, l2 = run["l1"], run["l2"]
        if name.startswith("two_processes") and "fixed" not in name:
            at("names", sorted([*l1, *l2]), sorted([*right[0], *right[1]]))
            totals = {name: (size * is_yes, size) for name, size, is_yes in zip(names, sizes, yes)}
            at("exchanged between processes", _is_exchanged(totals, l1.plain(), l2.plain()), True)
        else:
            _check_categories(right[0], l1, at.of("l1"))
            _check_categories(right[1], l2, at.of("l2"))


def _is_exchanged(totals: dict[str, tuple[int, int]], broad: dict[str, float], detailed: dict[str, float]) -> bool:
    """Whether each value joins a category of one process with one of the other, each of them used once.

    Args:
        totals: by detailed category, the questions answered yes and all questions of one prompt.
        broad, detailed: the percentages of two processes; the broad ones pool the exchanged lists.
    """
    names = sorted(totals, key=broad_category)

    def percent(pairs: Sequence[tuple[str, str]]) -> float:
        joined = [totals[name] for pair in pairs for name in pair]
        return 100 * sum(right for right, _ in joined) / sum(total for _, total in joined)

    def extend(pairs: list[tuple[str, str]]) -> bool:
        done = len(pairs)
        if done and (done == len(names) or broad_category(names[done]) != broad_category(names[done - 1])):
            group = broad_category(names[done - 1])
            of_group = [pair for pair in pairs if broad_category(pair[0]) == group]
            if abs(percent(of_group) - broad[group]) > _SAME:
                return False
        if done == len(names):
            return True
        used = {other for _, other in pairs}
        fits = [
            (names[done], other)
            for other in names
            if other not in used and abs(percent([(names[done], other)]) - detailed[names[done]]) <= _SAME
        ]
        return any(extend([*pairs, pair]) for pair in fits)

    return extend([])
