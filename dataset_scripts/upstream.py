"""Reads Echo-4o-Image in its published layout: row files beside tar archives, in a folder or on the Hub.

    for row in read_upstream("Echo-4o-Image", "surreal_fantasy"):
        ...

Every archive is read once, from start to end. A row is yielded when its last image has been read, so the order follows
the archives and is reproducible. `read_events` also yields rejected rows and the position of the reader.
"""

import hashlib
import logging
import tempfile
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, NamedTuple

from echo4o.common import strict_json
from echo4o.dataset_scripts.archives import ArchiveMember, read_members
from echo4o.dataset_scripts.findings import Finding, ReadingReport, RejectionReason, Remark
from echo4o.dataset_scripts.flow import ordered, read_ahead
from echo4o.dataset_scripts.images import MAX_IMAGE_BYTES, CheckedImage, ImageVerification, check_image
from echo4o.dataset_scripts.index import PartIndex, WantedImage, base
from echo4o.dataset_scripts.names import ALL, MULTI_REFERENCE, TEXT_TO_IMAGE, parts_of
from echo4o.dataset_scripts.schema import FolderMapping, RowMap
from echo4o.dataset_scripts.source import CompleteStream, PublishedSource, SourcePart

log = logging.getLogger(__name__)

AHEAD_BYTES = 48 << 20  # of images that are read ahead
HELD_BYTES = 64 << 20  # of images in memory whose rows are incomplete; more are kept in a temporary file


class ReadPosition(NamedTuple):
    """Position of the reader. `archive` is -1 before the first archive."""

    part: int
    archive: int
    member: int


_REASONS = {
    Remark.UNSAFE_MEMBER: RejectionReason.UNSAFE_MEMBER,
    Remark.DECOMPRESSION_BOMB: RejectionReason.DECOMPRESSION_BOMB,
}
START = ReadPosition(0, -1, -1)


class ReadEvent(NamedTuple):
    """An accepted row, a rejected row, or a remark (without a number)."""

    place: ReadPosition
    number: tuple[int, int] | None  # number of the part, and of the row in it
    row: dict | None
    finding: Finding | None
    configuration: str
    held_from: int  # the first archive with images of rows that are still incomplete


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a source.

    Args:
        verify: decode images completely, or check only header and end mark.
        workers: number of threads that check images.
        reencode: store images of other formats as PNG instead of rejecting them.
        row_map: the mapping of all folders whose entry in `plan` has none.
        plan: configuration and mapping of single folders.
        spool_dir: folder for temporary files; None for the system's default.
    """

    verify: str = ImageVerification.full
    workers: int = 1
    reencode: bool = False
    row_map: RowMap | None = None
    plan: Mapping[str, FolderMapping] = field(default_factory=dict)
    spool_dir: str | None = None


def read_upstream(
    src: str, configuration: str = ALL, options: ReadOptions | None = None, report: ReadingReport | None = None
) -> Iterator[dict]:
    """The accepted rows of a folder or of `hf://datasets/owner/name`, with images as {"bytes", "path"}.

    Rejected rows are counted in `report` and logged at the end; `read_events` yields them one by one.
    """
    report = ReadingReport() if report is None else report
    for event in read_events(PublishedSource(src), configuration, options):
        if event.row is not None:
            report.accept(event.configuration)
            yield event.row
        elif event.finding is not None:
            report.add(event.finding)
    if report.rejected_total:
        log.warning("%s: %s. `echo4o dataset validate` lists them one by one.", src, report)


def read_events(
    source: PublishedSource,
    configuration: str = ALL,
    options: ReadOptions | None = None,
    *,
    done: Collection[tuple[int, int]] = (),
    seen: Iterable[str] = (),
    start: ReadPosition = START,
    held_from: int = 0,
    remarks: Iterable[dict] = (),
    only: "RowShares | None" = None,
) -> Generator[ReadEvent, None, None]:
    """All events of a source, in reading order.

    To resume, pass the state of the interrupted reading.

    Args:
        done: numbers of the rows that are finished.
        seen: ids of the rows that were accepted.
        start: the position of the last event.
        held_from: the first archive with images of incomplete rows at `start`.
        remarks: remarks on the part at `start`.
        only: yield only rows of these shares.
    """
    seen, options = set(seen), options or ReadOptions()
    parts = check_source(source, configuration, options)
    for number, part in enumerate(parts):
        if number >= start.part:
            here = start if number == start.part else ReadPosition(number, -1, -1)
            with _PartReading(source, part, options, here, done, seen, only) as reading:
                yield from reading.events(held_from, remarks) if number == start.part else reading.events()


def check_source(source: PublishedSource, configuration: str, options: ReadOptions) -> list[SourcePart]:
    """The parts to read. Raises ValueError if one is missing, has no configuration or has rows of unknown shape."""
    parts_of(configuration)  # raises for an unknown name
    parts = source.select(configuration, options.plan)
    for part in parts:
        index = _index(source, part, options)
        index.check_shape()
        index.close()
    return parts


@dataclass(frozen=True)
class RowShares:
    """Some of `count` disjoint shares of all rows. Rows with equal instructions are in the same share."""

    shares: frozenset[int]
    count: int

    def holds(self, instruction: str) -> bool:
        digest = hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:4], "big") % self.count in self.shares


def _index(source: PublishedSource, part: SourcePart, options: ReadOptions) -> PartIndex:
    plan = options.plan.get(part.folder, FolderMapping())
    return PartIndex(source, part, plan.map or options.row_map, options.spool_dir)


class _Item(NamedTuple):
    """An archive member and the image that it may provide: None if unwanted, text if ambiguous."""

    archive: int
    member: ArchiveMember
    slot: WantedImage | str | None


class _PartReading:
    """Joins the rows of one part with the images of its archives while they are streamed."""

    def __init__(
        self,
        source: PublishedSource,
        part: SourcePart,
        options: ReadOptions,
        start: ReadPosition,
        done: Collection[tuple[int, int]],
        seen: set[str],
        only: RowShares | None,
    ):
        self.source, self.part, self.options, self.only = source, part, options, only
        self.configuration = part.configuration or ""
        self.start, self.seen = start, seen
        self.number = start.part
        self.index = _index(source, part, options)
        self.files = [*part.archives, *part.images]
        self.damaged: list[str] = []
        self.place = start
        self.finished = {row for p, row in done if p == self.number}
        self.pending: list[int] = []
        self.held: dict[WantedImage, int] = {}  # slot -> archive
        self.held_bytes = 0
        self.spool: IO[bytes] | None = None

    def __enter__(self) -> "_PartReading":
        return self

    def __exit__(self, *exc) -> None:
        self.index.close()
        if self.spool:
            self.spool.close()

    def events(self, held_from: int = 0, remarks: Iterable[dict] = ()) -> Iterator[ReadEvent]:
        """Yields the events of the part, in reading order; see `read_events`."""
        for number, finding in self.index.scan():
            if number is None:
                if self.start.archive < 0:
                    yield self._remark(finding)
            elif number not in self.finished:
                yield from self._reject(number, finding)
        self.pending = [len(set(slots)) if slots else 0 for slots in self.index.slots]
        for number in sorted(self.finished):
            self._forget(number)
        for remark in remarks:
            self._record_problem(
                Remark(remark["reason"]), remark["detail"], remark["archive"], remark.get("member", "")
            )
        if self.only:
            self._skip_other_shares(self.only)
        first = held_from if self.start.archive >= 0 else 0
        items = read_ahead(self._items(first), _weight, AHEAD_BYTES)
        workers = max(1, self.options.workers)
        with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
            try:
                for item, future in ordered(
                    lambda item: self._submit(pool, item), items, _weight, AHEAD_BYTES, 4 * workers
                ):
                    self.place = ReadPosition(self.number, item.archive, item.member.number)
                    yield from self._join(item, future.result() if future else None)
            finally:
                items.close()
                pool.shutdown(cancel_futures=True)
        yield from self._rest()

    # --- images, in the order of the archives ---

    def _items(self, first: int) -> Iterator[_Item]:
        """All members in reading order. Runs in the reading thread."""
        for number in range(first, len(self.files)):
            file = self.files[number]
            if number < len(self.part.archives):
                with self.source.open(file.path) as stream:
                    for member in read_members(
                        CompleteStream(stream, file), file.path, lambda name, f=file: self._is_open(f.path, name)
                    ):
                        yield _Item(number, member, self.index.match(file.path, member.name))
            else:
                yield _Item(number, self._loose(file), self.index.match("", file.path))

    def _is_open(self, archive: str, name: str) -> bool:
        slot = self.index.match(archive, name)
        return isinstance(slot, WantedImage) and slot.left > 0

    def _loose(self, file) -> ArchiveMember:
        if not self._is_open("", file.path):
            return ArchiveMember(0, file.path)
        if file.size > MAX_IMAGE_BYTES:
            detail = f"{file.size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read"
            return ArchiveMember(0, file.path, problem=Remark.DECOMPRESSION_BOMB, detail=detail)
        with self.source.open(file.path) as stream:
            return ArchiveMember(0, file.path, stream.read())

    def _submit(self, pool: ThreadPoolExecutor, item: _Item):
        slot = item.slot
        if item.member.data is None or not isinstance(slot, WantedImage) or slot.taken or not slot.left:
            return None
        slot.taken = True
        return pool.submit(check_image, item.member.data, self.options.verify, self.options.reencode)

    def _join(self, item: _Item, image: CheckedImage | None) -> Iterator[ReadEvent]:
        member, slot = item.member, item.slot
        archive = self.files[item.archive].path
        if image is None or not isinstance(slot, WantedImage) or slot.joined or not slot.left:
            yield from self._skip(member, slot, archive)
            return
        slot.joined, slot.archive, slot.member = True, archive, member.name
        if image.reason is None:
            slot.image = image
        waiting = False
        for number in slot.rows:
            if number in self.finished:
                continue
            if image.reason is not None:
                yield from self._reject(number, self._bad_image(number, slot, image.reason, image.detail))
                continue
            self.pending[number] -= 1
            if self.pending[number] == 0:
                yield from self._complete(number)
            else:
                waiting = True
        if waiting:
            self._hold(slot, image, item.archive)
        elif slot not in self.held:
            slot.image = None

    def _skip(self, member: ArchiveMember, slot: WantedImage | str | None, archive: str) -> Iterator[ReadEvent]:
        """Report a member that is not used."""
        remark, detail = member.problem, member.detail
        if remark:
            self._record_problem(remark, detail, archive, member.name)
        elif isinstance(slot, str):
            remark, detail = Remark.AMBIGUOUS_MEMBER, slot
        elif slot is None:
            remark, detail = Remark.UNUSED_MEMBER, "no row names it"
        else:
            remark, detail = Remark.SURPLUS_MEMBER, "no row waits for it: the first member of a name is used"
        already_reported = self.place <= self.start
        if remark and not already_reported and not self.only:
            yield self._remark(
                Finding(remark, detail, self.configuration, archive=archive, member=member.name or None)
            )

    def _record_problem(self, remark: Remark, detail: str, archive: str, member: str) -> None:
        """Keep problems of an archive that explain missing images at the end."""
        if remark is Remark.DAMAGED_ARCHIVE or (remark in _REASONS and not member):
            self.damaged.append(archive)
        elif remark in _REASONS:
            slot = self.index.match(archive, member)
            if isinstance(slot, WantedImage) and not slot.problem:
                slot.problem = (_REASONS[remark], detail, archive, member)

    # --- rows ---

    def _complete(self, number: int) -> Iterator[ReadEvent]:
        row, file, line = self.index.row(number)
        fields = self.index.fields_of(row)
        target, *references = [(slot, self._image(slot)) for slot in self.index.images_of(number)]
        identity = row_id(fields.instruction, target[1])
        if identity in self.seen:
            finding = Finding(
                RejectionReason.DUPLICATE, f"the same instruction and image as an earlier row, id {identity}",
                self.configuration, file, line, target[0].archive, target[0].member, row,
            )  # fmt: skip
            yield from self._reject(number, finding)
            return
        self.seen.add(identity)
        metadata = {
            "file": file,
            "line": line,
            "image": _origin(*target),
            "reference_images": [_origin(*reference) for reference in references],
            "row": fields.rest,
        }
        result = {
            "id": identity,
            "instruction": fields.instruction,
            "task": MULTI_REFERENCE if references else TEXT_TO_IMAGE,
            "category": fields.category,
            "reference_images": [_stored(*reference) for reference in references],
            "image": _stored(*target),
            "source": self.part.folder,
            "metadata": strict_json.dumps(metadata, ensure_ascii=False),
        }
        self._forget(number)
        yield self._event(number, row=result)

    def _bad_image(self, number: int, slot: WantedImage, reason: RejectionReason, detail: str) -> Finding:
        row, file, line = self.index.row(number)
        slots = self.index.images_of(number)
        if slot is not slots[0]:
            detail = f"reference {slots.index(slot, 1)}: {detail}"
        return Finding(
            reason, detail, self.configuration, file, line, slot.archive, slot.member, row
        )  # fmt: skip

    def _rest(self) -> Iterator[ReadEvent]:
        """Reject the rows that are incomplete after all archives have been read."""
        self.place = ReadPosition(self.number, len(self.files), 0)
        damaged = f"; damaged: {', '.join(self.damaged[:5])}" if self.damaged else ""
        for number, slots in enumerate(self.index.slots):
            if not slots or number in self.finished:
                continue
            slot = next(s for s in slots if not s.joined)
            absent = RejectionReason.MISSING_IMAGE if slot is slots[0] else RejectionReason.MISSING_REFERENCE
            detail = f"no archive holds {base(slot.path)}{damaged}"
            reason, detail, slot.archive, slot.member = slot.problem or (absent, detail, None, None)
            yield from self._reject(number, self._bad_image(number, slot, reason, detail))

    def _reject(self, number: int, finding: Finding) -> Iterator[ReadEvent]:
        self._forget(number)
        yield self._event(number, finding=finding)

    def _forget(self, number: int) -> None:
        """Mark the row as finished and release images that only it was waiting for."""
        self.finished.add(number)
        slots = self.index.slots[number] if number < len(self.index.slots) else None
        for slot in dict.fromkeys(slots or ()):
            slot.left -= 1
            if not slot.left and slot in self.held:
                self._release(slot)

    def _skip_other_shares(self, shares: RowShares) -> None:
        for number, slots in enumerate(self.index.slots):
            if slots and not shares.holds(self.index.fields_of(self.index.row(number)[0]).instruction):
                self._forget(number)

    def _remark(self, finding: Finding) -> ReadEvent:
        return self._event(None, finding=finding)

    def _event(self, number: int | None, row: dict | None = None, finding: Finding | None = None) -> ReadEvent:
        first = min(self.held.values(), default=max(self.place.archive, 0))
        key = None if number is None else (self.number, number)
        return ReadEvent(self.place, key, row, finding, self.configuration, first)

    # --- images of incomplete rows ---

    def _hold(self, slot: WantedImage, image: CheckedImage, archive: int) -> None:
        """Keeps an image for rows that still miss others: in memory, or in a temporary file once memory is used up."""
        self.held[slot] = archive
        size = len(image.data)
        if self.held_bytes + size <= HELD_BYTES:
            self.held_bytes += size
            return
        if self.spool is None:
            self.spool = tempfile.TemporaryFile(dir=self.options.spool_dir, prefix=".images-")
        start = self.spool.seek(0, 2)
        self.spool.write(image.data)
        slot.spooled = (start, size)
        slot.image = replace(image, data=b"")

    def _image(self, slot: WantedImage) -> CheckedImage:
        """Returns a checked image that was not released yet."""
        if slot.image is None:
            raise RuntimeError(f"the image {slot.path} was released before its last row was complete")
        if slot.spooled is None or self.spool is None:
            return slot.image
        start, size = slot.spooled
        self.spool.seek(start)
        return replace(slot.image, data=self.spool.read(size))

    def _release(self, slot: WantedImage) -> None:
        del self.held[slot]
        if slot.spooled is None and slot.image is not None:
            self.held_bytes -= len(slot.image.data)
        slot.image = slot.spooled = None
        if self.spool and not any(s.spooled for s in self.held):
            self.spool.truncate(0)


def row_id(instruction: str, image: CheckedImage) -> str:
    """The id of a row: a hash of its instruction and the bytes of its image."""
    return hashlib.sha256(instruction.encode() + b"\0" + image.sha256).hexdigest()[:32]


def _weight(item: _Item) -> int:
    return len(item.member.data or b"") + 1024


def _origin(slot: WantedImage, image: CheckedImage) -> dict:
    return {"archive": slot.archive, "member": slot.member} | image.facts()


def _stored(slot: WantedImage, image: CheckedImage) -> dict:
    return {"bytes": image.data, "path": base(slot.member or "")}
