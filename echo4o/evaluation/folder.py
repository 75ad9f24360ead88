"""The folder of an evaluation: what lies where, and how it survives being killed at any moment.

prompts.jsonl     the prompts as they were read
generation.json   how the pictures were drawn; absent for pictures made elsewhere
images/           1.png, 2.png, ... (1_1.png, 1_2.png, ... with several pictures per prompt)
judge.json        who judged, with what settings and questions, and which pictures
records.jsonl     one judgement per line, appended as they come in; the last one about a thing counts
spending.json     tokens and costs; not part of the result, which is the same for the same inputs
result.json       the scores
report.html       the scores to look at
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPTS, GENERATION, JUDGE = "prompts.jsonl", "generation.json", "judge.json"
RECORDS, SPENDING, RESULT, REPORT = "records.jsonl", "spending.jsonl", "result.json", "report.html"
IMAGES = "images"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either there in whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """A JSON file; ValueError if it is none, None if it is not there."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: this is no JSON ({error}); delete it to start over") from None


class Records:
    """Append-only JSON lines: each is handed to the system before the next one is made.

    A line that a crash left half-written is cut off when the file is opened for appending, and ignored when reading.
    """

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[dict]:
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line)
            except ValueError:
                raise ValueError(f"{self.path}, line {number}: this is no record; delete the line") from None
            yield record

    @contextmanager
    def appending(self):
        """Yields a function that appends a record; nobody else can append meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            _lock(file, self.path)
            _cut_torn_line(file)

            def append(record: dict) -> None:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")

            yield append


def _cut_torn_line(file) -> None:
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        file.truncate(whole)


def _lock(file, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{path}: another process is judging into this folder") from None
