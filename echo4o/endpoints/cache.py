"""Answers that were paid for, kept by the content of the request."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echo4o.common import strict_json
from echo4o.common.files import write_text
from echo4o.endpoints.endpoint import ModelAnswer


def request_key(content: Any) -> str:
    """The key of a request: a hash of everything that its answer depends on, given as values of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class AnswerCache:
    """Kept answers, one file per key."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> tuple[ModelAnswer, str] | None:
        """The answer and the name of the run that paid for it; None where there is none that can be read."""
        try:
            stored = json.loads(self._path(key).read_text("utf-8"))
            answer, run = ModelAnswer(**stored["answer"]), stored["run"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return (answer, run) if isinstance(answer.text, str) else None

    def put(self, key: str, answer: ModelAnswer, run: str) -> None:
        """Keep an answer; raises OSError if it cannot be written. ASCII escapes keep text that is not valid Unicode."""
        write_text(self._path(key), strict_json.dumps({"answer": asdict(answer), "run": run}), shared=True)
