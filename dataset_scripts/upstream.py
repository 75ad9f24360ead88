"""Reads the published layout of Echo-4o-Image: folders of tar.gz archives beside JSON-lines files.

The rows' texts are held in memory, the pictures are not: archives are read once, in a stream, and a row leaves as soon
as its last picture has come by. Only rows with several pictures wait, with those that have come so far.
"""

import hashlib
import json
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from echo4o.dataset_scripts.features import MULTI_REFERENCE, PARTS, TEXT_TO_IMAGE
from echo4o.dataset_scripts.report import Finding, Reason, Report
from echo4o.dataset_scripts.upstream_rows import UpstreamRow, read_rows

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
ROWS_SUFFIXES = (".jsonl", ".json")
MAX_MEMBER_BYTES = 256 * 2**20  # a hundred times the largest picture of the release

# How a part's folder is recognised: all of these words in its name, in any case. "Surrel-Fantasy-Image" is upstream's
# spelling; the name of the multi-reference folder is not confirmed.
_FOLDER_WORDS = {
    "surreal_fantasy": ("fantasy",),
    "multi_reference": ("multi", "ref"),
    "instruction_following": ("instruction", "following"),
}


@dataclass(frozen=True)
class PartFiles:
    """The files of one part, in the order in which they are read; ``root`` is the release's folder."""

    part: str
    root: Path
    rows: tuple[Path, ...]
    archives: tuple[Path, ...]

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def find_parts(root: str | Path, parts: Sequence[str] = PARTS) -> dict[str, PartFiles]:
    """The files of the parts that lie under a folder.

    Raises:
        ValueError: an unknown part.
        FileNotFoundError: no folder, or a part that is asked for is not in it or lacks its rows or its archives.
    """
    root = Path(root)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; allowed are {', '.join(PARTS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected the release's: one folder for each part")
    return {part: _part_files(root, part) for part in parts}


def _part_files(root: Path, part: str) -> PartFiles:
    words = _FOLDER_WORDS[part]
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and all(word in p.name.lower() for word in words)]
    if len(folders) != 1:
        here = ", ".join(p.name for p in (folders or sorted(root.iterdir()))) or "nothing"
        raise FileNotFoundError(
            f"{root} has {len(folders)} folders for {part} (a name with {' and '.join(map(repr, words))}); "
            f"exactly one is needed. {'They are' if folders else 'There is'}: {here}"
        )
    files = sorted((p for p in folders[0].rglob("*") if p.is_file()), key=_natural)
    rows = tuple(p for p in files if p.name.lower().endswith(ROWS_SUFFIXES))
    archives = tuple(p for p in files if p.name.lower().endswith(ARCHIVE_SUFFIXES))
    for kind, found, suffixes in (("rows", rows, ROWS_SUFFIXES), ("archives", archives, ARCHIVE_SUFFIXES)):
        if not found:
            raise FileNotFoundError(f"{folders[0]} has no {kind}: no file ends in {' or '.join(suffixes)}")
    return PartFiles(part, root, rows, archives)


def _natural(path: Path) -> list:
    """Numbers by value, so that 5000-10000 comes after 0-5000 and before 10000-15000."""
    return [(0, int(bit), "") if bit.isdigit() else (1, 0, bit) for bit in re.split(r"(\d+)", path.as_posix()) if bit]


def read_upstream(
    root: str | Path, parts: Sequence[str] = PARTS, report: Report | None = None
) -> Iterator[dict[str, Any]]:
    """Rows with the features of :func:`.features.features`, pictures as ``{"bytes", "path"}``, bytes untouched.

    The order is that of the archives and their members, the same every time.

    Args:
        root: The release's folder.
        parts: Which parts to read, in this order.
        report: Filled while reading; what was rejected, and why, is known when the iterator has ended.

    Raises:
        As :func:`find_parts`, before the first row.
    """
    report = Report() if report is None else report
    return _read_parts(find_parts(root, parts), report)


def _read_parts(found: dict[str, PartFiles], report: Report) -> Iterator[dict[str, Any]]:
    for files in found.values():
        yield from read_part(files, report)


def read_part(files: PartFiles, report: Report) -> Iterator[dict[str, Any]]:
    """The rows of one part; see :func:`read_upstream`."""
    waiting = _Waiting(
        files.part, [row for path in files.rows for row in read_rows(path, files.relative(path), report)]
    )
    for archive in files.archives:
        for member in read_archive(archive, files.relative(archive), report):
            complete = waiting.take(member, report)
            report.accepted += len(complete)
            yield from complete
    for finding in waiting.findings():
        report.add(finding)


# --- archives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A picture in an archive."""

    archive: str
    name: str
    data: bytes


def read_archive(path: Path, name: str, report: Report) -> Iterator[Member]:
    """Streams the plain files of an archive, and reports whatever else is in it. Nothing is written anywhere."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for info in archive:
                problem = _problem(info)
                if problem:
                    report.add(Finding(Reason.UNSAFE_MEMBER, name, member=info.name, detail=problem))
                elif info.isreg():
                    yield Member(name, info.name, archive.extractfile(info).read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        report.add(Finding(Reason.UNREADABLE_ARCHIVE, name, detail=f"{type(error).__name__}: {error}"))


def _problem(info: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(info.name.replace("\\", "/"))
    try:
        info.name.encode()
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    if path.is_absolute():
        return "an absolute path"
    if ".." in path.parts:
        return "a path that leads out of the archive"
    if not (info.isreg() or info.isdir()):
        return "a link" if info.islnk() or info.issym() else "neither a file nor a folder"
    if info.size > MAX_MEMBER_BYTES:
        return f"{info.size} bytes; at most {MAX_MEMBER_BYTES} are read"
    return None


# --- joining rows and members -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """What a row's path and a member's have in common: the last component without its extension, and its folder."""

    stem: str
    folder: str

    @classmethod
    def of(cls, path: str) -> "_Name":
        path = PurePosixPath(path.replace("\\", "/"))
        return cls(path.stem, path.parent.name)


@dataclass
class _Pending:
    """A row and those of its pictures that have come: references in their order, the answer last."""

    row: UpstreamRow
    pictures: list[Member | None]

    @property
    def missing(self) -> list[str]:
        return [path for path, picture in zip(self.row.pictures, self.pictures) if picture is None]


@dataclass
class _Waiting:
    """The rows of a part that still lack pictures, found by the pictures' names."""

    part: str
    rows: list[UpstreamRow]
    _places: dict[str, list[tuple[str, _Pending, int]]] = field(init=False)
    _pending: list[_Pending] = field(init=False)
    _seen: dict[str, set[str]] = field(init=False)
    _told_apart: set[str] = field(init=False)

    def __post_init__(self):
        self._pending = [_Pending(row, [None] * len(row.pictures)) for row in self.rows]
        self._places, self._seen, self._told_apart = defaultdict(list), defaultdict(set), set()
        for pending in self._pending:
            names = [_Name.of(path) for path in pending.row.pictures]
            for index, name in enumerate(names):
                self._places[name.stem].append((name.folder, pending, index))
            # A row's path need not be the member's, so folders count only for names that one row has in two folders.
            folders = Counter(stem for stem, _ in {(name.stem, name.folder) for name in names})
            self._told_apart.update(stem for stem, number in folders.items() if number > 1)

    def take(self, member: Member, report: Report) -> list[dict[str, Any]]:
        """Gives a member to every row that names it; the rows that are complete with it."""
        name = _Name.of(member.name)
        places = self._places.get(name.stem, [])
        key = ""
        if name.stem in self._told_apart:
            places, key = [place for place in places if place[0] == name.folder], name.folder
        if not places:
            report.add(Finding(Reason.MEMBER_WITHOUT_ROW, member.archive, member=member.name))
            return []
        if key in self._seen[name.stem]:
            report.add(
                Finding(Reason.DUPLICATE_MEMBER, member.archive, member=member.name, detail="the first is used")
            )
            return []
        self._seen[name.stem].add(key)
        complete = []
        for _, pending, index in places:
            pending.pictures[index] = member
            if not pending.missing:
                complete.append(_example(pending, self.part))
                pending.pictures = []
        return complete

    def findings(self) -> Iterator[Finding]:
        """One finding for each row that never became complete."""
        for pending in self._pending:
            if pending.pictures and pending.missing:
                row, missing = pending.row, pending.missing
                reason = Reason.MISSING_IMAGE if pending.pictures[-1] is None else Reason.MISSING_REFERENCE
                yield Finding(reason, row.file, row.line, detail=f"no archive has {', '.join(missing)}")


def _example(pending: _Pending, part: str) -> dict[str, Any]:
    row, (*references, image) = pending.row, pending.pictures
    metadata = {**row.extra, "archive": image.archive, "member": image.name}
    return {
        "id": content_id(row.instruction, [reference.data for reference in references], image.data),
        "instruction": row.instruction,
        "task": MULTI_REFERENCE if references else TEXT_TO_IMAGE,
        "category": row.category or part,
        "reference_images": [_picture(reference) for reference in references],
        "image": _picture(image),
        "source": f"{row.file}:{row.line}",
        "metadata": json.dumps(metadata, ensure_ascii=False, sort_keys=True),
    }


def _picture(member: Member) -> dict[str, Any]:
    return {"bytes": member.data, "path": PurePosixPath(member.name).name}


def content_id(instruction: str, references: Sequence[bytes], image: bytes) -> str:
    """32 hex digits of what the row says and shows: equal rows have equal ids, wherever and whenever they are read."""
    digest = hashlib.sha256()
    for piece in (instruction.encode(), *references, image):
        digest.update(len(piece).to_bytes(8, "big"))
        digest.update(piece)
    return digest.hexdigest()[:32]
