"""Prompts and questions of DPG-Bench: read from files, or the question table fetched once at a pinned revision."""

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echo4o.common import strict_json
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt, PromptSource, git_blob_id
from echo4o.evaluation.benchmarks.dpg.questions import read_question_table
from echo4o.evaluation.benchmarks.dpg.scoring import DPGQuestion
from echo4o.evaluation.benchmarks.prompt_files import PromptSet, cache_folder, fetch

GROUP = "dpg"
PROMPTS = 1065
# The question table of ELLA. The id is that of git, because the file itself could not be had when this was written.
QUESTIONS = PromptSource(
    url="https://raw.githubusercontent.com/TencentQQGYLab/ELLA/{revision}/dpg_bench/dpg_bench.csv",
    revision="3c228f1dc6c4d3cad0a47493816151a419f14db3",
    sha256="98457fc9901943f51ff9a30367250fc292533bed",
    count=PROMPTS,
    is_blob=True,
)
# Of the 1065 official prompts, as `prompts_hash` computes it: the same for the folder of texts and for any list of them.
OFFICIAL_PROMPTS = "f1ec0c121bf59d4168831024c9d18f643e7173f334c7f6658c2e5f343ac99886"
_KEYS = {"id": ("item_id", "id"), "text": ("prompt", "text")}


def load_dpg(benchmark: Benchmark, file: Path | None, questions: Path | None) -> PromptSet:
    """The prompts with their questions.

    Args:
        file: JSON lines with `item_id` and `prompt`, or a folder with `<item_id>.txt`; None: the texts in the table.
        questions: the question table; None: the official one.
    """
    table = questions or fetch(QUESTIONS, "dpg_bench", cache_folder() / "prompts", ".csv", "--questions")
    if not table.is_file():
        raise ValueError(f"--questions {table}: there is no such file")
    by_item = read_question_table(table)
    texts = _texts_of_table(table) if file is None else read_texts(file)
    without = [item for item in texts if item not in by_item]
    if without:
        raise ValueError(f"{table}: it has no question about the prompt {without[0]!r} ({len(without)} such prompts)")
    blob = git_blob_id(table.read_bytes())
    digest = prompts_hash(texts)
    official_questions = blob == QUESTIONS.sha256
    official = official_questions and (file is None or digest == OFFICIAL_PROMPTS)
    prompts = tuple(_prompt(item, text, by_item[item]) for item, text in texts.items())
    both = hashlib.sha256(f"{digest} {blob}".encode()).hexdigest()
    more = {"questions_blob": blob, "official_questions": official_questions}
    return PromptSet(prompts, both, official, None, more)


def _prompt(item: str, text: str, questions: tuple[DPGQuestion, ...]) -> BenchmarkPrompt:
    if "/" in item or "\\" in item or item.startswith("."):
        raise ValueError(f"the id {item!r} cannot name an image file")
    facts = [asdict(question) | {"parents": list(question.parents)} for question in questions]
    return BenchmarkPrompt(item, GROUP, text, GROUP, {"questions": facts})


def questions_of(prompt: BenchmarkPrompt) -> list[DPGQuestion]:
    """The questions of a prompt."""
    return [DPGQuestion(**(row | {"parents": tuple(row["parents"])})) for row in prompt.facts["questions"]]


def prompts_hash(texts: Mapping[str, str]) -> str:
    """The SHA-256 of a set of prompts, whatever file it comes from: of their ids and texts, sorted by id."""
    lines = "".join(f"{item}\t{text.strip()}\n" for item, text in sorted(texts.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_texts(file: Path) -> dict[str, str]:
    """Prompts by id, from JSON lines or from a folder of text files. Raises ValueError that names the place."""
    if file.is_dir():
        texts = {path.stem: path.read_text("utf-8-sig").strip() for path in sorted(file.glob("*.txt"))}
        if not texts:
            raise ValueError(f"{file}: there is no <item_id>.txt in this folder")
        return texts
    texts = {}
    for number, line in enumerate(file.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = strict_json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: this is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is needed")
        item, text = (_field(row, names, where) for names in _KEYS.values())
        if item in texts:
            raise ValueError(f"{where}: the id {item!r} appears twice")
        texts[item] = text
    if not texts:
        raise ValueError(f"{file}: there is no prompt in it")
    return texts


def _field(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if isinstance(row.get(name), (str, int)) and str(row[name]).strip():
            return str(row[name]).strip()
    raise ValueError(f'{where}: "{names[0]}" is missing or empty')


def _texts_of_table(table: Path) -> dict[str, str]:
    """The prompts in the column `text` of the question table."""
    reader = csv.DictReader(io.StringIO(table.read_text("utf-8-sig"), newline=""))
    if "text" not in (reader.fieldnames or ()):
        raise ValueError(f"{table}: it has no column 'text' with the prompts; pass them with --prompts")
    texts: dict[str, str] = {}
    for number, row in enumerate(reader, start=1):
        item, text = row["item_id"].strip(), (row["text"] or "").strip()
        if texts.setdefault(item, text) != text:
            raise ValueError(f"{table}, row {number}: {item} has another text than in the rows before")
    return texts
