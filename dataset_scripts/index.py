"""Index of the rows of one part: their text on disk, the names of their images in memory."""

import json
import tempfile
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from echo4o.dataset_scripts.archives import SUFFIXES, UNREAD_SUFFIXES
from echo4o.dataset_scripts.findings import Finding, RejectionReason, Remark
from echo4o.dataset_scripts.images import CheckedImage
from echo4o.dataset_scripts.json_rows import OPEN_ARRAY, ParsedRow, read_rows
from echo4o.dataset_scripts.schema import FieldError, RowMap, SchemaError, label_of, paths_of, recognise, text_of
from echo4o.dataset_scripts.source import IMAGE_SUFFIXES, CompleteStream, PublishedSource, SourcePart

_ROWS_TO_JUDGE = 1000  # readable rows of unknown shape after which a folder is rejected


class WantedImage:
    """An image that rows refer to."""

    __slots__ = ("path", "rows", "left", "taken", "joined", "image", "archive", "member", "spooled", "problem")

    def __init__(self, path: str):
        self.path = path
        self.rows: list[int] = []
        self.left = 0  # rows that may still need it
        self.taken = False  # its image is being checked
        self.joined = False  # its image was read and checked
        self.image: CheckedImage | None = None
        self.archive: str | None = None
        self.member: str | None = None
        self.spooled: tuple[int, int] | None = None  # position and size in the temporary file
        self.problem: tuple[RejectionReason, str, str | None, str | None] | None = (
            None  # reason, detail, archive, member
        )


@dataclass(frozen=True)
class RowFields:
    """The columns of a row, and the rest of it."""

    instruction: str
    image: str
    references: list[str]
    category: str
    rest: dict


class PartIndex:
    """The rows of a part. `scan` fills it and yields the rows that are rejected at once."""

    def __init__(
        self, source: PublishedSource, part: SourcePart, row_map: RowMap | None, spool_dir: str | None = None
    ):
        self.source, self.part = source, part
        self.row_map = row_map
        self.shapes: dict[frozenset, RowMap | None] = {}
        self.wanted: dict[str, list[WantedImage]] = {}
        self.slots: list[tuple[WantedImage, ...] | None] = []  # by row; None: rejected at once
        self._text = tempfile.TemporaryFile(dir=spool_dir, prefix=".rows-")
        self._ends, self._lines, self._files = array("Q", [0]), array("Q"), array("H")

    def close(self) -> None:
        self._text.close()

    def __len__(self) -> int:
        return len(self.slots)

    def check_shape(self) -> None:
        """Raise SchemaError if no row has a shape that can be mapped."""
        seen, keys = 0, None
        for file in self.part.rows if self.row_map is None else []:
            with self.source.open(file.path) as stream:
                for given in read_rows(stream):
                    if given.row is None:
                        continue
                    if self.shape_of(given.row):
                        return
                    seen, keys = seen + 1, keys or sorted(given.row)
                    if seen >= _ROWS_TO_JUDGE:
                        break
        if keys is not None:
            raise SchemaError(
                f"{self.part.folder}: the rows have the keys {', '.join(keys)}, which is not a known shape; map them "
                "with --map image=KEY instruction=KEY reference_images=KEY, or in a mapping file "
                "(echo4o dataset inspect --write)"
            )

    def shape_of(self, row: dict) -> RowMap | None:
        if self.row_map:
            return self.row_map
        keys = frozenset(row)
        if keys not in self.shapes:
            if len(self.shapes) > 10_000:  # rows with random keys must not fill the memory
                self.shapes.clear()
            self.shapes[keys] = recognise(keys)
        return self.shapes[keys]

    def scan(self) -> Iterator[tuple[int | None, Finding]]:
        """Read all rows. Yields (row number, finding) for rejected rows, (None, remark) for the rest."""
        for file in self.part.others:
            if file.path.lower().endswith(UNREAD_SUFFIXES):
                detail = f"archives are read as {', '.join(SUFFIXES)}; pack its images again"
                yield None, Finding(Remark.UNREAD_ARCHIVE, detail, self.part.configuration or "", archive=file.path)
        for file_number, file in enumerate(self.part.rows):
            with self.source.open(file.path) as stream:
                for given in read_rows(CompleteStream(stream, file)):
                    origin: dict[str, Any] = {
                        "configuration": self.part.configuration,
                        "file": file.path,
                        "line": given.line,
                    }
                    if given.error == OPEN_ARRAY:
                        yield None, Finding(Remark.OPEN_ARRAY, given.error, **origin)
                        continue
                    number = len(self.slots)
                    fault = self._add(given, file_number)
                    if fault is not None:
                        self.slots.append(None)
                        yield number, Finding(*fault, **origin, row=given.row, raw=given.raw)

    def _add(self, given: ParsedRow, file_number: int) -> tuple[RejectionReason, str] | None:
        """Index a row. Returns the reason and detail if it is rejected."""
        self._store(given, file_number)
        if given.row is None:
            return RejectionReason.UNREADABLE_ROW, given.error or ""
        try:
            fields = self.fields_of(given.row)
        except FieldError as error:
            return RejectionReason.UNREADABLE_ROW, str(error)
        if not fields.instruction.strip():
            return RejectionReason.EMPTY_INSTRUCTION, "there is no text"
        if not fields.image:
            return RejectionReason.MISSING_IMAGE, "the row names none"
        if not all(fields.references):
            return RejectionReason.MISSING_REFERENCE, "the row names an empty path"
        if self.part.configuration == "multi_reference" and not fields.references:
            return RejectionReason.MISSING_REFERENCE, "the row names none"
        number = len(self.slots)
        slots = tuple(self._slot(path) for path in (fields.image, *fields.references))
        for slot in dict.fromkeys(slots):
            slot.rows.append(number)
            slot.left += 1
        self.slots.append(slots)
        return None

    def fields_of(self, row: dict) -> RowFields:
        """The columns of a row. Raises FieldError if the row does not fit its shape."""
        shape = self.shape_of(row)
        if shape is None:
            raise FieldError(f"the keys {', '.join(sorted(row))[:200]} are not a known shape")
        images = paths_of(row, shape.image)
        if len(images) > 1:
            raise FieldError(f"{shape.image} holds {len(images)} paths instead of one")
        used = shape.keys()
        return RowFields(
            instruction=text_of(row, shape.instruction) or "",
            image=images[0] if images else "",
            references=paths_of(row, shape.reference_images),
            category=label_of(row, shape.category),
            rest={key: value for key, value in row.items() if key not in used},
        )

    def row(self, number: int) -> tuple[dict, str, int]:
        """A row as it was given, its file and its line."""
        start, end = self._ends[number], self._ends[number + 1]
        self._text.seek(start)
        row = json.loads(self._text.read(end - start))
        return row, self.part.rows[self._files[number]].path, self._lines[number]

    def _store(self, given: ParsedRow, file_number: int) -> None:
        # ASCII escapes keep lone surrogates. Rows that are rejected at once are not read again.
        text = b"" if given.row is None else json.dumps(given.row).encode()
        self._text.seek(self._ends[-1])
        self._text.write(text)
        self._ends.append(self._ends[-1] + len(text))
        self._lines.append(given.line)
        self._files.append(file_number)

    def images_of(self, number: int) -> tuple[WantedImage, ...]:
        """The images of a row that was not rejected at once: the target image, then the references."""
        return self.slots[number] or ()

    def _slot(self, path: str) -> WantedImage:
        candidates = self.wanted.setdefault(stem(path), [])
        for slot in candidates:
            if slot.path == path:
                return slot
        candidates.append(WantedImage(path))
        return candidates[-1]

    def match(self, archive: str, name: str) -> WantedImage | str | None:
        """The image that a member provides; None if no row wants it, or a text if it is ambiguous."""
        candidates = self.wanted.get(stem(name))
        if not candidates:
            return None
        if len(candidates) == 1:
            return candidates[0]
        # Rows use one name in several folders (input/1.jpg, output/1.jpg): compare the folders of the paths.
        exact = [s for s in candidates if base(s.path) == base(name)] or candidates
        folders = set(f"{_without_suffix(archive)}/{_plain(name)}".split("/")[:-1])
        scores = [len(folders & set(_plain(slot.path).split("/")[:-1])) for slot in exact]
        best = [slot for slot, score in zip(exact, scores) if score == max(scores)]
        return best[0] if len(best) == 1 else f"it could be {' or '.join(s.path for s in best[:3])}"


def base(path: str) -> str:
    """The last component of a path with slashes or backslashes."""
    return unicodedata.normalize("NFC", PurePosixPath(_plain(path)).name)


def stem(path: str) -> str:
    """The last component without an image suffix."""
    name = base(path)
    cut, dot, suffix = name.rpartition(".")
    return cut if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def _plain(path: str) -> str:
    return path.replace("\\", "/").strip("/")


def _without_suffix(path: str) -> str:
    name = PurePosixPath(path).name
    return path[: len(path) - len(name)] + name.split(".")[0]
