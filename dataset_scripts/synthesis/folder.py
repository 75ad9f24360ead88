"""The folder of a synthesis. It is consistent after a crash at any time.

dataset/        the accepted rows in the published layout, which `echo4o dataset build` and `validate` read;
                about.yaml names the models that generated them, for the card
rejected.jsonl  the rejected rows with their reasons; rejected/ holds their last images
steps.jsonl     the intermediate results of all rows, with 8 x 8 thumbnails of the images
run.json        the resolved recipe, and hashes of its vocabularies and references
answers/        all paid answers (written by the calls); spending.jsonl: their costs
preview.png     the contact sheet, if one was requested

A row is accepted when its line is in its shard; its images are on the disk before. An incomplete last line is removed.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import yaml

from echo4o.common import files
from echo4o.common.json_lines import JsonLines, JsonLinesWriter
from echo4o.common.locks import FolderLock
from echo4o.dataset_scripts.synthesis.gates import tiny_thumbnail
from echo4o.model_cards.facts import ABOUT, About

RUN, STEPS, REJECTED, SPENDING, ANSWERS, PREVIEW = (
    "run.json", "steps.jsonl", "rejected.jsonl", "spending.jsonl", "answers", "preview.png"
)  # fmt: skip
DATASET = "dataset"
FOLDERS = {
    "surreal_fantasy": "Surreal-Fantasy-Image",
    "multi_reference": "Multi-Reference-Image",
    "instruction_following": "Instruction-Following-Image",
}
ROWS_PER_SHARD = 1000


class SynthesisFolder:
    """The folder, opened by one process at a time. `accepted` and `rejected` hold the rows of earlier runs as well."""

    def __init__(self, path: Path, rows_per_shard: int = ROWS_PER_SHARD):
        self.path, self.rows_per_shard = Path(path), rows_per_shard
        self.accepted: dict[str, dict] = {}
        self.rejected: dict[str, dict] = {}
        self._steps: set[tuple] = set()
        self._thumbnails: dict[str, str] = {}  # row -> 8 x 8 pixels of its last image, hexadecimal
        self._lines: dict[Path, JsonLinesWriter] = {}
        self._lock = FolderLock(self.path)

    def __enter__(self) -> "SynthesisFolder":
        with ExitStack() as on_error:
            on_error.enter_context(self._lock)
            self.path.mkdir(exist_ok=True)
            for file in sorted((self.path / DATASET).glob("*/rows-*.jsonl")):
                self.accepted |= {row["row"]: row for row in _read(file)}
            self.rejected = {row["row"]: row for row in _read(self.path / REJECTED)}
            for step in _read(self.path / STEPS):
                self._remember(step)
            on_error.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        with ExitStack() as every:  # on a full disk, closing raises, too
            every.callback(self._lock.release)
            for lines in self._lines.values():
                every.callback(lines.close)
            self._lines.clear()

    def begin(self, run: dict, about: About) -> None:
        """Writes run.json and about.yaml.

        A folder without decided rows can be begun again with a corrected recipe.

        Raises:
            FileExistsError: the folder has rows from another recipe, vocabulary or source of references.
        """
        path = self.path / RUN
        if self.accepted or self.rejected:
            before = _read_run(path)
            if changed := _differences(before["decides"], run["decides"]):
                raise FileExistsError(
                    f"{self.path} was begun with another recipe ({', '.join(changed[:6])}): use that recipe, or a new folder"
                )
            drawn_from = before["drawn_from"] | run["drawn_from"]  # a part may have had no rows until now
            if changed := [name for name, digest in before["drawn_from"].items() if drawn_from[name] != digest]:
                raise FileExistsError(
                    f"{self.path} was begun with another vocabulary or source of references ({', '.join(changed)}): use "
                    "that one, or a new folder"
                )
            run = run | {"drawn_from": drawn_from}
        elif self._steps and path.is_file() and _differences(_read_run(path)["decides"], run["decides"]):
            (self.path / STEPS).unlink()
            self._steps.clear()
        files.write_json(path, run)
        (self.path / DATASET).mkdir(exist_ok=True)
        files.write_text(self.path / DATASET / ABOUT, yaml.safe_dump(about.model_dump(), sort_keys=False))

    def is_decided(self, row: str) -> bool:
        """Whether the row is accepted or rejected."""
        return row in self.accepted or row in self.rejected

    def keep_step(self, step: dict) -> None:
        """Records an intermediate result, unless an interrupted run recorded it already."""
        if _step_key(step) not in self._steps:
            self._remember(step)
            self._append(self.path / STEPS, step)

    def _remember(self, step: dict) -> None:
        self._steps.add(_step_key(step))
        if "looks" in step:
            self._thumbnails[step["row"]] = step["looks"]

    def accept(self, part: str, number: int, row: dict, images: dict[str, bytes]) -> None:
        """Writes the images (name -> file, the target image first), then the row."""
        shard = number // self.rows_per_shard
        root, names = self.path / DATASET / FOLDERS[part], []
        for name, data in images.items():
            names.append(f"images/{shard:05d}/{name}")
            files.write_bytes(root / names[-1], data)
        places = {"output_image": names[0]} | ({"input_images": names[1:]} if names[1:] else {})
        line = row | places
        self._append(root / f"rows-{shard:05d}.jsonl", line, sync=True)
        self.accepted[row["row"]] = line

    def reject(self, row: dict, image: bytes | None) -> None:
        """Writes the last image of a rejected row, then the row."""
        if image:
            files.write_bytes(self.path / "rejected" / f"{row['row']}.{suffix_of(image)}", image)
        self._append(self.path / REJECTED, row, sync=True)
        self.rejected[row["row"]] = row

    def thumbnail_of(self, row: str) -> bytes:
        """Returns the 8 x 8 thumbnail of an accepted row."""
        kept = self._thumbnails.get(row)
        return bytes.fromhex(kept) if kept else tiny_thumbnail(self.image_of(row).read_bytes())

    def image_of(self, row: str) -> Path:
        """Returns the file of an accepted row's image."""
        line = self.accepted[row]
        return self.path / DATASET / FOLDERS[row.rpartition("-")[0]] / line["output_image"]

    def _append(self, path: Path, value: dict, sync: bool = False) -> None:
        if path not in self._lines:
            self._lines[path] = JsonLinesWriter(path)
        self._lines[path].append(value)
        if sync:
            self._lines[path].sync()


def suffix_of(data: bytes) -> str:
    """Returns the suffix for the name of an image file."""
    return "jpeg" if data.startswith(b"\xff\xd8") else "webp" if data.startswith(b"RIFF") else "png"


def _step_key(step: dict) -> tuple:
    return step["row"], step["step"], step["attempt"]


def _read(path: Path) -> Iterator[dict]:
    """The records of a file, if there is one. Raises ValueError if one of them does not name its row."""
    for number, value in enumerate(JsonLines(path), start=1):
        if not isinstance(value, dict) or "row" not in value:
            raise ValueError(f"{path}, line {number} is not a record of a synthesis; delete the line")
        yield value


def _read_run(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
        return {key: dict(value[key]) for key in ("decides", "drawn_from")}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f"{path} does not state the recipe of the rows in {path.parent}: choose a new folder"
        ) from None


def _differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    """The dotted names under which two mappings differ."""
    names = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(f"{prefix}{key}")
    return names
