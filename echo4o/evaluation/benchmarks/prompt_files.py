"""Reads the prompts of a benchmark from a file, or downloads them once from their source and verifies them."""

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from echo4o.common import strict_json
from echo4o.common.files import write_bytes
from echo4o.evaluation.benchmarks.base import Benchmark, BenchmarkPrompt, PromptSource

# An id names files: no separators, no leading dot.
DPG_NAMES = ("dpg", "dpg_one_call")
_LINE_DIGITS = 8  # of the SHA-256 of a line, in known_lines.json
_ID = re.compile(r"[^./\\\0][^/\\\0]*")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run.

    Args:
        prompts: the prompts to evaluate.
        sha256: of the file they come from.
        official: whether it is the official file of the benchmark; None if no checksum is known.
        part: the selected part of the file in words; None for all of it.
        more: further facts of the file, such as its name if the benchmark has several.
    """

    prompts: tuple[BenchmarkPrompt, ...]
    sha256: str
    official: bool | None
    part: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


def cache_folder() -> Path:
    """Returns the folder for downloads and paid answers: ECHO4O_CACHE, or echo4o in the cache folder of the user."""
    if os.environ.get("ECHO4O_CACHE"):
        return Path(os.environ["ECHO4O_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo4o"


def load_prompts(
    benchmark: Benchmark,
    file: Path | None = None,
    revision: str | None = None,
    groups: Sequence[str] = (),
    limit: int | None = None,
    questions: Path | None = None,
) -> PromptSet:
    """Loads the prompts of a file, or of the source of the benchmark; with `groups` or `limit`, only some of them."""
    if benchmark.name in DPG_NAMES:
        from echo4o.evaluation.benchmarks.dpg.prompts import load_dpg

        return _part(load_dpg(benchmark, file, questions), groups, limit, file)
    if questions is not None:
        raise ValueError(f"--questions is for {DPG_NAMES[0]} only, not for {benchmark.name}")
    if file is None:
        file = fetch_official(benchmark, revision)
    elif str(file) in benchmark.prompt_files and not file.exists():
        file = fetch(benchmark.prompt_files[str(file)], f"{benchmark.name}-{file}", cache_folder() / "prompts")
    prompts = read_prompts(benchmark, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file_names = {source.sha256: name for name, source in benchmark.prompt_files.items()}
    official = digest == benchmark.source.sha256 if benchmark.source else None
    if file_names:
        official = digest in file_names
        require_unmixed(benchmark, file)
    more = {"prompt_file": file_names.get(digest)} if file_names else {}
    return _part(PromptSet(tuple(prompts), digest, official, None, more), groups, limit, file)


def _part(prompts: PromptSet, groups: Sequence[str], limit: int | None, file: Path | None) -> PromptSet:
    """The prompts of some groups, or the first ones."""
    kept, part = prompts.prompts, []
    if groups:
        known = list(dict.fromkeys(name for prompt in kept for name in (prompt.group, prompt.type)))
        for group in groups:
            if group not in known:
                raise ValueError(
                    f"there is no group or type {group!r} in {file or 'the prompts'}; it has {', '.join(known)}"
                )
        kept = tuple(prompt for prompt in kept if prompt.group in groups or prompt.type in groups)
        part.append(f"only {', '.join(groups)}")
    if limit is not None and limit < len(kept):
        kept = kept[:limit]
        part.append(f"only the first {limit}")
    return replace(prompts, prompts=kept, part=", ".join(part) or None)


def require_unmixed(benchmark: Benchmark, file: Path) -> None:
    """Raise ValueError for an official prompt file that was changed: most of the official lines are there, and others.

    Parts of an official file, and files of other prompts, are fine.
    """
    hashes = [
        hashlib.sha256(line).hexdigest()[:_LINE_DIGITS] for line in file.read_bytes().splitlines() if line.strip()
    ]
    lists = json.loads((Path(__file__).parent / "known_lines.json").read_text("utf-8"))
    for name in benchmark.prompt_files:
        text = lists[f"{benchmark.name}/{name}"]
        known = {text[start : start + _LINE_DIGITS] for start in range(0, len(text), _LINE_DIGITS)}
        changed = [number for number, line in enumerate(hashes, start=1) if line not in known]
        if changed and len(hashes) - len(changed) > benchmark.prompt_files[name].count / 2:
            listed = ", ".join(map(str, changed[:8])) + (" ..." if len(changed) > 8 else "")
            raise ValueError(
                f"{file}: line {listed} differs from {benchmark.title}'s {name} prompts "
                f"(SHA-256 {benchmark.prompt_files[name].sha256}), the others do not: the file was changed. Use the "
                "official file, a part of it, or other prompts"
            )


def read_prompts(benchmark: Benchmark, file: Path) -> list[BenchmarkPrompt]:
    """Read a prompt file, JSON lines or one JSON list; ValueError names the bad line."""
    text = file.read_text("utf-8-sig")
    is_list = text.lstrip().startswith("[")
    rows = _read_list(text, file) if is_list else list(enumerate(text.split("\n"), start=1))
    prompts, seen = [], {}
    for number, row in rows:
        where = f"{file}, {'entry' if is_list else 'line'} {number}"
        if isinstance(row, str):
            if not row.strip():
                continue
            try:
                row = strict_json.loads(row)
            except ValueError as error:
                raise ValueError(f"{where}: this is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is needed")
        try:
            prompt = benchmark.read_row(row, number, file.parent)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not _ID.fullmatch(prompt.id):
            raise ValueError(f"{where}: the id {prompt.id!r} cannot be the name of an image file")
        if prompt.id in seen:
            raise ValueError(f"{where}: the id {prompt.id!r} is also in line {seen[prompt.id]}")
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file}: there is no prompt in it")
    return prompts


def _read_list(text: str, file: Path) -> list[tuple[int, object]]:
    try:
        return list(enumerate(strict_json.loads(text), start=1))
    except ValueError as error:
        raise ValueError(f"{file}: this is not JSON ({error})") from None


def more_of(header: dict[str, Any]) -> dict[str, Any]:
    """The further facts in the first line of a folder's prompts."""
    return {name: value for name, value in header.items() if name not in ("benchmark", "sha256", "official", "part")}


def to_row(prompt: BenchmarkPrompt) -> dict:
    """A prompt as JSON, for the folder of the evaluation."""
    return asdict(prompt) | {"references": [str(path) for path in prompt.references]}


def from_row(row: dict[str, Any]) -> BenchmarkPrompt:
    """Returns the prompt of a row that `to_row` made."""
    references = tuple(Path(path) for path in row["references"])
    return BenchmarkPrompt(
        **{name: value for name, value in row.items() if name != "references"}, references=references
    )


def fetch_official(benchmark: Benchmark, revision: str | None = None) -> Path:
    """The official prompt file of a benchmark: downloaded once at its pinned revision."""
    if benchmark.name == "omnicontext":
        from echo4o.evaluation.benchmarks.omnicontext import download

        return download(revision, cache_folder() / "prompts")
    if benchmark.source is None:
        raise ValueError(f"{benchmark.name}: give --prompts FILE; its prompts cannot be downloaded")
    return fetch(benchmark.source, benchmark.name, cache_folder() / "prompts")


def fetch(source: PromptSource, name: str, cache: Path, suffix: str = ".jsonl", option: str = "--prompts") -> Path:
    """Downloads a file and verifies its hash; returns the kept copy if there is one with this hash."""
    target = cache / f"{name}-{source.revision[:12]}{suffix}"
    if target.is_file() and source.hash(target.read_bytes()) == source.sha256:
        return target
    try:
        with urllib.request.urlopen(source.address, timeout=60) as answer:
            data = answer.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{source.address}: {reason}; give the official file with {option} FILE") from None
    digest = source.hash(data)
    if digest != source.sha256:
        raise ValueError(
            f"{source.address} has the {source.hash_name} {digest}, expected is {source.sha256}; if you trust another "
            f"file, give it with {option} FILE"
        )
    write_bytes(target, data, shared=True)
    return target
