"""Images of a visitor, with their settings: they are still there after the page was reloaded."""

import json
import secrets
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo4o.serving.images_api import encode
from echo4o.serving.tasks import GeneratedImage

MOST_IMAGES = 100  # of a visitor
MOST_VISITORS = 200


@dataclass(frozen=True)
class Entry:
    """An image of the history.

    Args:
        file: the PNG file, which carries its settings.
        prompt: as it was written.
        seed, settings: of the image.
        references: number of reference images, which are not kept.
    """

    file: Path
    prompt: str
    seed: int
    settings: dict[str, Any]
    references: int = 0

    @property
    def caption(self) -> str:
        return f"{self.prompt[:60]} (seed {self.seed})"

    def to_json(self) -> str:
        shown = {"prompt": self.prompt, "seed": self.seed, "references": self.references, **self.settings}
        return json.dumps(shown, indent=2, ensure_ascii=False)


class History:
    """Keeps the newest images of each visitor in a temporary folder, which goes with the server.

    A visitor is known by a random token that only the visitor's browser has.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="echo4o-app-", ignore_cleanup_errors=True)
        self._lock = threading.Lock()
        self._visitors: OrderedDict[str, list[Entry]] = OrderedDict()

    def visitor(self, token: str | None) -> str:
        """The token of a visitor: the given one if it is known, else a new one. The oldest visitor may be forgotten."""
        with self._lock:
            if not isinstance(token, str) or token not in self._visitors:
                token = secrets.token_urlsafe(24)
                self._visitors[token] = []
            self._visitors.move_to_end(token)
            while len(self._visitors) > MOST_VISITORS:
                _, entries = self._visitors.popitem(last=False)
                self._remove(entries)
            return token

    def add(self, token: str, generated: GeneratedImage, prompt: str, references: int) -> Entry:
        """Store an image. Its visitor's oldest images are removed when there are too many."""
        file = Path(self._folder.name, f"{secrets.token_hex(8)}-seed-{generated.seed}.png")
        file.write_bytes(encode(generated))
        entry = Entry(file, prompt, generated.seed, generated.settings, references)
        with self._lock:
            entries = self._visitors.setdefault(token, [])
            entries.insert(0, entry)
            self._remove(entries[MOST_IMAGES:])
            del entries[MOST_IMAGES:]
        return entry

    def entries(self, token: str | None) -> list[Entry]:
        """The images of a visitor, the newest first."""
        with self._lock:
            return list(self._visitors.get(token or "", []))

    def clear(self, token: str) -> None:
        """Remove all images of a visitor."""
        with self._lock:
            self._remove(self._visitors.get(token, []))
            self._visitors[token] = []

    @staticmethod
    def _remove(entries: list[Entry]) -> None:
        for entry in entries:
            entry.file.unlink(missing_ok=True)
