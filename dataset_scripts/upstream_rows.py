"""Reads the rows of the published layout: JSON lines, a JSON array, or objects joined on one line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo4o.dataset_scripts.report import Finding, Reason, Report

# The names under which readers of the release have met a row's references.
REFERENCE_KEYS = ("input_images", "input_image", "reference_images")
IMAGE_LIST = "image_list"  # references and, last, the answer
INSTRUCTION_LIST = "instruction_list"


@dataclass(frozen=True)
class UpstreamRow:
    """A row as it was given, its pictures by their paths: references in their order, the answer last."""

    file: str
    line: int
    instruction: str
    category: str | None
    pictures: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)


def read_rows(path: Path, name: str, report: Report) -> Iterator[UpstreamRow]:
    """The usable rows of a file; the others become findings of ``report``, which counts them all as given.

    Args:
        path: A file of JSON lines or of one JSON array.
        name: How findings and rows name the file.
        report: Counts and findings are added to it.
    """
    for line, given in _values(path):
        report.given += 1
        row = given if isinstance(given, Unreadable) else _row(given, name, line)
        if isinstance(row, UpstreamRow):
            yield row
        else:
            report.add(Finding(row.reason, name, line, detail=row.detail))


@dataclass(frozen=True)
class Unreadable:
    """In place of a row that cannot be used."""

    detail: str
    reason: Reason = Reason.UNREADABLE_ROW


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Every JSON value of a file with its line (in an array: its number); what is no JSON as Unreadable."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        start = file.read(1024).lstrip("\ufeff \t\r\n")
        file.seek(0)
        if start.startswith("["):
            try:
                yield from enumerate(json.loads(file.read().lstrip("\ufeff")), start=1)
            except (ValueError, RecursionError) as error:
                yield 1, Unreadable(f"the file is a JSON array that does not end well: {error}")
            return
        for number, line in enumerate(file, start=1):
            yield from ((number, value) for value in _joined(line.strip("\ufeff \t\r\n")))


def _joined(line: str) -> Iterator[Any]:
    """The JSON values of a line, also where objects are joined as ``}{``."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(line):
        try:
            value, at = decoder.raw_decode(line, at)
        except (ValueError, RecursionError) as error:
            yield Unreadable(f"no JSON from column {at + 1}: {error}")
            return
        yield value
        at += len(line[at:]) - len(line[at:].lstrip(" \t,"))


def _row(given: Any, file: str, line: int) -> UpstreamRow | Unreadable:
    if not isinstance(given, dict):
        return Unreadable(f"a {type(given).__name__}; a row is a JSON object")
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return Unreadable(f"not UTF-8: {error.reason}")
    pictures = _pictures(given)
    if isinstance(pictures, Unreadable):
        return pictures
    instruction = given.get("instruction")
    if instruction is None and isinstance(given.get(INSTRUCTION_LIST), list):
        instruction = next(iter(given[INSTRUCTION_LIST]), None)
    if not isinstance(instruction, str):
        return Unreadable(f"instruction is {instruction!r}; a string is needed")
    if not instruction.strip():
        return Unreadable("the instruction is empty", Reason.EMPTY_INSTRUCTION)
    category = given.get("type")
    used = {"instruction", "type", "output_image", IMAGE_LIST, INSTRUCTION_LIST, *REFERENCE_KEYS}
    extra = {key: value for key, value in given.items() if key not in used}
    return UpstreamRow(file, line, instruction, None if category is None else str(category), pictures, extra)


def _pictures(given: dict[str, Any]) -> tuple[str, ...] | Unreadable:
    """The paths of the references, then of the answer."""
    if "output_image" in given:
        named = [key for key in REFERENCE_KEYS if given.get(key)]
        if len(named) > 1:
            return Unreadable(f"references under several names: {', '.join(named)}")
        references = given[named[0]] if named else []
        paths = [*(references if isinstance(references, list) else [references]), given["output_image"]]
    elif isinstance(given.get(IMAGE_LIST), list) and given[IMAGE_LIST]:
        paths = given[IMAGE_LIST]
    else:
        return Unreadable(f"no output_image and no {IMAGE_LIST}; the keys are {', '.join(map(str, given)) or 'none'}")
    wrong = [path for path in paths if not isinstance(path, str) or not path.strip("/. ")]
    return Unreadable(f"{wrong[0]!r} is no path of a picture") if wrong else tuple(paths)
