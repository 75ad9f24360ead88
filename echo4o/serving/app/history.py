"""Images of a visitor, with their settings: they are still there after the page was reloaded."""

import contextlib
import hashlib
import json
import re
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo4o.common.files import write_bytes, write_json
from echo4o.serving.image_output import OutputFormat
from echo4o.serving.tasks import GeneratedImage

MOST_IMAGES = 100  # of a visitor
MOST_VISITORS = 200
MOST_BYTES = 2 * 2**30  # of all visitors
_SECRET = "browser-secret"  # file in the folder
_VISITOR, _STEM = re.compile(r"[0-9a-f]{32}"), re.compile(r"\d{16}-[0-9a-f]{16}-seed-\d{1,19}")


@dataclass(frozen=True)
class Entry:
    """An image of the history.

    Args:
        file: the PNG file, which carries its settings.
        prompt: as it was written.
        seed, settings: of the image.
        references: number of reference images, which are not kept.
        bytes: size of the file.
    """

    file: Path
    prompt: str
    seed: int
    settings: dict[str, Any]
    references: int = 0
    bytes: int = 0

    @property
    def caption(self) -> str:
        return f"{self.prompt[:60]} (seed {self.seed})"

    @property
    def facts(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "seed": self.seed, "references": self.references, "settings": self.settings}

    def to_json(self) -> str:
        shown = {"prompt": self.prompt, "seed": self.seed, "references": self.references, **self.settings}
        return json.dumps(shown, indent=2, ensure_ascii=False)


class History:
    """Keeps the newest images of each visitor: PNG files, each with a JSON file of its settings.

    A visitor is known by a random token that only the visitor's browser has; the visitor's folder is named after its
    hash. No name of a file comes from a request.

    Args:
        folder: where the images are kept; what is in it from an earlier server is there again. None: a temporary
            folder, which goes with the server.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None):
        self._lock = threading.Lock()
        self._visitors: OrderedDict[str, list[Entry]] = OrderedDict()  # by hash of the token
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="echo4o-app-", ignore_cleanup_errors=True)
            folder = Path(self._temporary.name)
        self.folder = folder.resolve()
        self.secret = self._open()

    def _open(self) -> str:
        """Create the folder or read what is in it; returns the secret of the browsers' storage."""
        file = self.folder / _SECRET
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not file.is_file():
                write_bytes(file, secrets.token_hex(8).encode())
                file.chmod(0o600)
            secret = file.read_text("ascii").strip()
            found = [each for each in self.folder.iterdir() if _VISITOR.fullmatch(each.name) and each.is_dir()]
            read = {each.name: _read_visitor(each) for each in found}
        except (OSError, ValueError) as error:
            raise ValueError(f"--history {self.folder}: cannot be used ({error})") from error
        newest = sorted(read, key=lambda name: read[name][0].file.name if read[name] else "")
        self._visitors.update((name, read[name]) for name in newest)
        self._keep_within_limits()
        return secret

    def visitor(self, token: str | None) -> str:
        """The token of a visitor: the given one if it is known, else a new one. The oldest visitor may be forgotten."""
        with self._lock:
            if not isinstance(token, str) or _name(token) not in self._visitors:
                token = secrets.token_urlsafe(24)
                self._visitors[_name(token)] = []
            self._visitors.move_to_end(_name(token))
            self._keep_within_limits()
            return token

    def add(self, token: str, generated: GeneratedImage, prompt: str, references: int) -> Entry:
        """Store an image. The oldest images are removed when there are too many."""
        folder = self.folder / _name(token)
        folder.mkdir(exist_ok=True, mode=0o700)
        stem = f"{time.time_ns() // 1000:016d}-{secrets.token_hex(8)}-seed-{generated.seed}"
        data = OutputFormat().encode(generated)
        entry = Entry(folder / f"{stem}.png", prompt, generated.seed, generated.settings, references, len(data))
        write_bytes(entry.file, data)
        write_json(entry.file.with_suffix(".json"), entry.facts)
        with self._lock:
            self._visitors.setdefault(_name(token), []).insert(0, entry)
            self._keep_within_limits()
        return entry

    def entries(self, token: str | None) -> list[Entry]:
        """The images of a visitor whose files are there, the newest first."""
        with self._lock:
            return [entry for entry in self._visitors.get(_name(token), []) if entry.file.is_file()]

    def clear(self, token: str) -> None:
        """Remove all images of a visitor."""
        with self._lock:
            _remove(self._visitors.get(_name(token), []))
            self._visitors[_name(token)] = []

    def _keep_within_limits(self) -> None:
        """Remove the oldest visitors and images that are too many. The newest image of all stays."""
        while len(self._visitors) > MOST_VISITORS:
            name, entries = self._visitors.popitem(last=False)
            _remove(entries)
            with contextlib.suppress(OSError):  # files of others are in it, or it does not exist
                (self.folder / name).rmdir()
        for entries in self._visitors.values():
            _remove(entries[MOST_IMAGES:])
            del entries[MOST_IMAGES:]
        excess = sum(entry.bytes for entries in self._visitors.values() for entry in entries) - MOST_BYTES
        if excess <= 0:
            return
        stored = [(entry, own) for own in self._visitors.values() for entry in own]
        oldest = sorted(stored, key=lambda pair: pair[0].file.name)
        for entry, own in oldest[:-1]:
            if excess <= 0:
                break
            _remove([entry])
            own.remove(entry)
            excess -= entry.bytes


def _name(token: object) -> str:
    """Name of a visitor's folder: a hash, so that a listing of the folder gives nobody a token."""
    text = token if isinstance(token, str) else ""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _read_visitor(folder: Path) -> list[Entry]:
    """The images in a visitor's folder, the newest first. Files that are damaged or of others are left out."""
    entries = []
    for file in sorted(folder.glob("*.png"), reverse=True):
        if not _STEM.fullmatch(file.stem) or file.is_symlink():
            continue
        try:
            facts = json.loads(file.with_suffix(".json").read_text("utf-8"))
            prompt, seed, settings = str(facts["prompt"]), int(facts["seed"]), dict(facts["settings"])
            entries.append(Entry(file, prompt, seed, settings, int(facts["references"]), file.stat().st_size))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return entries


def _remove(entries: list[Entry]) -> None:
    for entry in entries:
        entry.file.unlink(missing_ok=True)
        entry.file.with_suffix(".json").unlink(missing_ok=True)
