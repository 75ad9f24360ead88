"""Reads Echo-4o-Image in its published layout: row files beside tar archives, in a folder or on the Hub.

    for row in read_upstream("Echo-4o-Image", "surreal_fantasy"):
        ...

Every archive is read once, from front to back. A row comes out when the last of its pictures has come by, so that the
order follows the archives and is the same every time. `read_events` also tells what is rejected and where reading is.
"""

import hashlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from echo4o.common import strict_json
from echo4o.dataset_scripts.archives import Member, read_members
from echo4o.dataset_scripts.findings import Finding, Reason, Remark, Report
from echo4o.dataset_scripts.flow import ordered, read_ahead
from echo4o.dataset_scripts.index import PartIndex, Slot, base
from echo4o.dataset_scripts.names import ALL, MULTI_REFERENCE, TEXT_TO_IMAGE, parts_of
from echo4o.dataset_scripts.pictures import MAX_PICTURE_BYTES, Picture, Verify, check_picture
from echo4o.dataset_scripts.schema import FolderPlan, RowMap
from echo4o.dataset_scripts.source import Part, Source, Whole

log = logging.getLogger(__name__)

AHEAD_BYTES = 48 << 20  # pictures read before their turn
HELD_BYTES = 64 << 20  # pictures in memory that wait for others of their row; more wait in a temporary file


class Place(NamedTuple):
    """How far reading has come. `archive` -1 is before the first one."""

    part: int
    archive: int
    member: int


_REASONS = {
    Remark.UNSAFE_MEMBER: Reason.UNSAFE_MEMBER,
    Remark.DECOMPRESSION_BOMB: Reason.DECOMPRESSION_BOMB,
}
BEGINNING = Place(0, -1, -1)


class Event(NamedTuple):
    """One accepted row, one rejected row, or one remark (without number)."""

    place: Place
    number: tuple[int, int] | None  # part and row in it
    row: dict | None
    finding: Finding | None
    configuration: str
    held_from: int  # the first archive that rows still to come hold pictures of


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read.

    Args:
        verify: decode pictures fully, or only look at header and end mark.
        workers: pictures checked at a time. Threads do it: the decoders let go of the interpreter.
        reencode: store pictures of other formats as PNG instead of rejecting them.
        row_map: the mapping of all folders whose plan has none.
        plan: what was decided for single folders.
        spool_dir: where temporary files go; None for the system's place.
    """

    verify: str = Verify.full
    workers: int = 1
    reencode: bool = False
    row_map: RowMap | None = None
    plan: Mapping[str, FolderPlan] = field(default_factory=dict)
    spool_dir: str | None = None


def read_upstream(
    src: str, configuration: str = ALL, options: ReadOptions | None = None, report: Report | None = None
) -> Iterator[dict]:
    """The accepted rows of a folder or of `hf://datasets/owner/name`, pictures as {"bytes", "path"}.

    What is rejected is counted in `report`, logged at the end, and told row by row by `read_events`.
    """
    report = Report() if report is None else report
    for event in read_events(Source(src), configuration, options):
        if event.row is not None:
            report.accept(event.configuration)
            yield event.row
        else:
            report.add(event.finding)
    if report.rejected_total:
        log.warning("%s: %s. `echo4o dataset validate` lists them one by one.", src, report)


def read_events(
    source: Source,
    configuration: str = ALL,
    options: ReadOptions | None = None,
    *,
    done: Collection[tuple[int, int]] = (),
    seen: Iterable[str] = (),
    start: Place = BEGINNING,
    held_from: int = 0,
    remarks: Iterable[dict] = (),
    only: "Shard | None" = None,
) -> Iterator[Event]:
    """All events of a reading, in their order.

    To go on after an earlier reading, give the numbers of rows that are `done`, the ids already `seen`, the `start`
    up to which events were told, the archive that pictures were `held_from` there, and the `remarks` told on its part.
    """
    seen, options = set(seen), options or ReadOptions()
    parts = check_source(source, configuration, options)
    for number, part in enumerate(parts):
        if number >= start.part:
            here = start if number == start.part else Place(number, -1, -1)
            with _PartReading(source, part, options, here, done, seen, only) as reading:
                yield from reading.events(held_from, remarks) if number == start.part else reading.events()


def check_source(source: Source, configuration: str, options: ReadOptions) -> list[Part]:
    """The parts that will be read; ValueError when one is missing, unnamed or has rows of no known shape."""
    parts_of(configuration)  # refuses an unknown name
    parts = source.select(configuration, options.plan)
    for part in parts:
        index = _index(source, part, options)
        index.check_shape()
        index.close()
    return parts


@dataclass(frozen=True)
class Shard:
    """Some of `count` disjoint shares of all rows. Rows with equal instructions are in one share."""

    shares: frozenset[int]
    count: int

    def holds(self, instruction: str) -> bool:
        digest = hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:4], "big") % self.count in self.shares


def _index(source: Source, part: Part, options: ReadOptions) -> PartIndex:
    plan = options.plan.get(part.folder, FolderPlan())
    return PartIndex(source, part, plan.map or options.row_map, options.spool_dir)


class _Item(NamedTuple):
    """A member with the slot it fills, on its way to the check."""

    archive: int
    member: Member
    slot: Slot | str | None


class _PartReading:
    """Joins the rows of one part with the pictures of its archives as they stream by."""

    def __init__(self, source, part, options, start, done, seen, only):
        self.source, self.part, self.options, self.only = source, part, options, only
        self.start, self.seen = start, seen
        self.number = start.part
        self.index = _index(source, part, options)
        self.files = [*part.archives, *part.pictures]
        self.damaged: list[str] = []
        self.place = start
        self.finished = {row for p, row in done if p == self.number}
        self.pending: list[int] = []
        self.held: dict[Slot, int] = {}  # slot -> archive
        self.held_bytes = 0
        self.spool = None

    def __enter__(self) -> "_PartReading":
        return self

    def __exit__(self, *exc) -> None:
        self.index.close()
        if self.spool:
            self.spool.close()

    def events(self, held_from: int = 0, remarks: Iterable[dict] = ()) -> Iterator[Event]:
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
            self._keep_in_mind(Remark(remark["reason"]), remark["detail"], remark["archive"], remark.get("member", ""))
        if self.only:
            self._leave_out_other_shares()
        first = held_from if self.start.archive >= 0 else 0
        items = read_ahead(self._items(first), _weight, AHEAD_BYTES)
        workers = max(1, self.options.workers)
        with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
            try:
                for item, future in ordered(
                    lambda item: self._submit(pool, item), items, _weight, AHEAD_BYTES, 4 * workers
                ):
                    self.place = Place(self.number, item.archive, item.member.number)
                    yield from self._arrive(item, future.result() if future else None)
            finally:
                items.close()
                pool.shutdown(cancel_futures=True)
        yield from self._rest()

    # --- pictures, in the order of the archives ---

    def _items(self, first: int) -> Iterator[_Item]:
        """Runs in the reading thread."""
        for number in range(first, len(self.files)):
            file = self.files[number]
            if number < len(self.part.archives):
                with self.source.open(file.path) as stream:
                    for member in read_members(
                        Whole(stream, file), file.path, lambda name, f=file: self._is_open(f.path, name)
                    ):
                        yield _Item(number, member, self.index.match(file.path, member.name))
            else:
                yield _Item(number, self._loose(file), self.index.match("", file.path))

    def _is_open(self, archive: str, name: str) -> bool:
        slot = self.index.match(archive, name)
        return isinstance(slot, Slot) and slot.left > 0

    def _loose(self, file) -> Member:
        if not self._is_open("", file.path):
            return Member(0, file.path)
        if file.size > MAX_PICTURE_BYTES:
            detail = f"{file.size:,} bytes; at most {MAX_PICTURE_BYTES:,} are read"
            return Member(0, file.path, problem=Remark.DECOMPRESSION_BOMB, detail=detail)
        with self.source.open(file.path) as stream:
            return Member(0, file.path, stream.read())

    def _submit(self, pool: ThreadPoolExecutor, item: _Item):
        slot = item.slot
        if item.member.data is None or not isinstance(slot, Slot) or slot.taken or not slot.left:
            return None
        slot.taken = True
        return pool.submit(check_picture, item.member.data, self.options.verify, self.options.reencode)

    def _arrive(self, item: _Item, picture: Picture | None) -> Iterator[Event]:
        member, slot = item.member, item.slot
        archive = self.files[item.archive].path
        if picture is None or slot.joined or not slot.left:
            yield from self._pass_over(member, slot, archive)
            return
        slot.joined, slot.archive, slot.member = True, archive, member.name
        if picture.reason is None:
            slot.picture = picture
        waiting = False
        for number in slot.rows:
            if number in self.finished:
                continue
            if picture.reason is not None:
                yield from self._reject(number, self._spoiled(number, slot, picture.reason, picture.detail))
                continue
            self.pending[number] -= 1
            if self.pending[number] == 0:
                yield from self._complete(number)
            else:
                waiting = True
        if waiting:
            self._hold(slot, item.archive)
        elif slot not in self.held:
            slot.picture = None

    def _pass_over(self, member: Member, slot: Slot | str | None, archive: str) -> Iterator[Event]:
        """A member whose bytes are not used."""
        remark, detail = member.problem, member.detail
        if remark:
            self._keep_in_mind(remark, detail, archive, member.name)
        elif isinstance(slot, str):
            remark, detail = Remark.AMBIGUOUS_MEMBER, slot
        elif slot is None:
            remark, detail = Remark.UNUSED_MEMBER, "no row names it"
        else:
            remark, detail = Remark.SURPLUS_MEMBER, "no row waits for it: the first of a name counts"
        told = self.place <= self.start
        if remark and not told and not self.only:
            yield self._remark(
                Finding(remark, detail, self.part.configuration, archive=archive, member=member.name or None)
            )

    def _keep_in_mind(self, remark: Remark, detail: str, archive: str, member: str) -> None:
        """What explains, at the end, why a row's picture never came."""
        if remark is Remark.DAMAGED_ARCHIVE or (remark in _REASONS and not member):
            self.damaged.append(archive)
        elif remark in _REASONS:
            slot = self.index.match(archive, member)
            if isinstance(slot, Slot) and not slot.problem:
                slot.problem = (_REASONS[remark], detail, archive, member)

    # --- rows ---

    def _complete(self, number: int) -> Iterator[Event]:
        row, file, line = self.index.row(number)
        fields = self.index.fields_of(row)
        target, *references = [(slot, self._picture(slot)) for slot in self.index.slots[number]]
        identity = row_id(fields.instruction, target[1])
        if identity in self.seen:
            finding = Finding(
                Reason.DUPLICATE, f"the same instruction and image as an earlier row, id {identity}",
                self.part.configuration, file, line, target[0].archive, target[0].member, row,
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

    def _spoiled(self, number: int, slot: Slot, reason: Reason, detail: str) -> Finding:
        row, file, line = self.index.row(number)
        slots = self.index.slots[number]
        if slot is not slots[0]:
            detail = f"reference {slots.index(slot, 1)}: {detail}"
        return Finding(
            reason, detail, self.part.configuration, file, line, slot.archive, slot.member, row
        )  # fmt: skip

    def _rest(self) -> Iterator[Event]:
        """What is left when all archives have been read."""
        self.place = Place(self.number, len(self.files), 0)
        damaged = f"; damaged: {', '.join(self.damaged[:5])}" if self.damaged else ""
        for number, slots in enumerate(self.index.slots):
            if not slots or number in self.finished:
                continue
            slot = next(s for s in slots if not s.joined)
            absent = Reason.MISSING_IMAGE if slot is slots[0] else Reason.MISSING_REFERENCE
            detail = f"no archive holds {base(slot.path)}{damaged}"
            reason, detail, slot.archive, slot.member = slot.problem or (absent, detail, None, None)
            yield from self._reject(number, self._spoiled(number, slot, reason, detail))

    def _reject(self, number: int, finding: Finding) -> Iterator[Event]:
        self._forget(number)
        yield self._event(number, finding=finding)

    def _forget(self, number: int) -> None:
        """The row is done: let go of pictures that only it was waiting for."""
        self.finished.add(number)
        slots = self.index.slots[number] if number < len(self.index.slots) else None
        for slot in dict.fromkeys(slots or ()):
            slot.left -= 1
            if not slot.left and slot in self.held:
                self._release(slot)

    def _leave_out_other_shares(self) -> None:
        for number, slots in enumerate(self.index.slots):
            if slots and not self.only.holds(self.index.fields_of(self.index.row(number)[0]).instruction):
                self._forget(number)

    def _remark(self, finding: Finding) -> Event:
        return self._event(None, finding=finding)

    def _event(self, number: int | None, row: dict | None = None, finding: Finding | None = None) -> Event:
        first = min(self.held.values(), default=max(self.place.archive, 0))
        key = None if number is None else (self.number, number)
        return Event(self.place, key, row, finding, self.part.configuration, first)

    # --- pictures that wait for others ---

    def _hold(self, slot: Slot, archive: int) -> None:
        self.held[slot] = archive
        size = len(slot.picture.data)
        if self.held_bytes + size <= HELD_BYTES:
            self.held_bytes += size
            return
        if self.spool is None:
            self.spool = tempfile.TemporaryFile(dir=self.options.spool_dir, prefix=".pictures-")
        start = self.spool.seek(0, 2)
        self.spool.write(slot.picture.data)
        slot.spooled = (start, size)
        slot.picture = replace(slot.picture, data=b"")

    def _picture(self, slot: Slot) -> Picture:
        if slot.spooled is None:
            return slot.picture
        self.spool.seek(slot.spooled[0])
        return replace(slot.picture, data=self.spool.read(slot.spooled[1]))

    def _release(self, slot: Slot) -> None:
        del self.held[slot]
        if slot.spooled is None:
            self.held_bytes -= len(slot.picture.data)
        slot.picture = slot.spooled = None
        if self.spool and not any(s.spooled for s in self.held):
            self.spool.truncate(0)


def row_id(instruction: str, picture: Picture) -> str:
    """What names a row wherever it is found: its instruction and the bytes of its image."""
    return hashlib.sha256(instruction.encode() + b"\0" + picture.sha256).hexdigest()[:32]


def _weight(item: _Item) -> int:
    return len(item.member.data or b"") + 1024


def _origin(slot: Slot, picture: Picture) -> dict:
    return {"archive": slot.archive, "member": slot.member} | picture.facts()


def _stored(slot: Slot, picture: Picture) -> dict:
    return {"bytes": picture.data, "path": base(slot.member)}
