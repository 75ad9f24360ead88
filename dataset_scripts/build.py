"""Builds Echo-4o-Image as a folder of Parquet shards that `load_dataset` can load and stream.

Shards are written in `OUT/.build`. A shard is renamed when it is on the disk, and a line of the journal then records the
position of the reader. The last rename makes the dataset loadable. After an interruption the same call resumes from the
last shard and produces the same bytes.
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

from echo4o.common import files
from echo4o.common.json_lines import JsonLines, JsonLinesWriter
from echo4o.common.locks import FolderLock
from echo4o.dataset_scripts.card import write_card
from echo4o.dataset_scripts.findings import Finding, ReadingReport
from echo4o.dataset_scripts.manifest import MANIFEST, make_manifest, read_manifest, versions
from echo4o.dataset_scripts.names import ALL, SPLIT
from echo4o.dataset_scripts.shards import ROW_GROUP_BYTES, ShardWriter
from echo4o.dataset_scripts.source import PublishedSource
from echo4o.dataset_scripts.upstream import START, ReadEvent, ReadOptions, ReadPosition, check_source, read_events

SHARD_BYTES = 500 << 20
WORK = ".build"
_REMOVED = ".build.done"
JOURNAL = "journal.jsonl"
REJECTED, REMARKS, CARD = "rejected.jsonl", "remarks.jsonl", "README.md"


@dataclass(frozen=True)
class BuildOptions:
    """Options that determine the bytes of the result, together with the source and the versions of the libraries."""

    configuration: str = ALL
    shard_bytes: int = SHARD_BYTES
    row_group_bytes: int = ROW_GROUP_BYTES


def build(
    src: str,
    out: str | Path,
    options: BuildOptions | None = None,
    reading: ReadOptions | None = None,
    *,
    max_rejected: int | None = None,
    progress: Callable[[int, ReadingReport], object] = lambda rows, report: None,
) -> dict:
    """Build `src`, a folder or `hf://datasets/owner/name` in the published layout, into the folder `out`.

    An interrupted build is resumed; a finished one is not changed. Rejected rows are written to rejected.jsonl, and
    remarks on the source to remarks.jsonl. `progress` is called after every row.

    Returns:
        The manifest.

    Raises:
        ValueError: the source cannot be mapped, all rows are rejected, there are more than `max_rejected` rejected
            rows, or `out` is being built by another process.
        FileExistsError: `out` holds something else.
        OSError: the disk is full; the same call resumes once there is space.
    """
    out = Path(out)
    options, reading = options or BuildOptions(), reading or ReadOptions()
    source = PublishedSource(src)
    terms = _terms(source, options, reading)
    shutil.rmtree(out / _REMOVED, ignore_errors=True)
    if (out / "data").exists() and (out / MANIFEST).is_file() and not (out / WORK).exists():
        return _with_rows(_finished(out, terms), out)
    with FolderLock(out):
        _prepare(out, terms)
        work = _Build(out, source, terms, options, max_rejected)
        try:
            if not work.complete:
                work.run(replace(reading, spool_dir=str(out / WORK)), progress)
        finally:
            work.close()
        return _with_rows(work.publish(), out)


def _with_rows(manifest: dict, out: Path) -> dict:
    """The manifest. Raises ValueError if there were rows and none was accepted."""
    if manifest["rows"]["accepted"] == 0 and manifest["rows"]["given"] > 0:
        raise ValueError(
            f"{out}: none of {manifest['rows']['given']:,} rows was accepted; {out / REJECTED} says why, and "
            f"{out / REMARKS} what is wrong with archives."
        )
    return manifest


def _terms(source: PublishedSource, options: BuildOptions, reading: ReadOptions) -> dict:
    """Everything that the result depends on. A build is resumed only with the same terms."""
    parts = check_source(source, options.configuration, reading)
    row_files = {}
    for file in (file for part in parts for file in part.rows):
        with source.open(file.path) as stream:
            digest = hashlib.sha256()
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
            row_files[file.path] = digest.hexdigest()
    plan = {
        folder: {"configuration": p.configuration, "map": p.map and p.map.to_dict()}
        for folder, p in sorted(reading.plan.items())
    }
    return {
        "source": {
            "name": source.location if source.revision else source.name,
            "revision": source.revision,
            "fingerprint": source.fingerprint(),
            "row_files": row_files,
            "about": source.about(),
        },
        "options": {
            "configuration": options.configuration,
            "verify": str(reading.verify),
            "reencode": reading.reencode,
            "map": reading.row_map and reading.row_map.to_dict(),
            "folders": plan,
            "shard_bytes": options.shard_bytes,
            "row_group_bytes": options.row_group_bytes,
        },
        "versions": versions(),
    }


def _finished(out: Path, terms: dict) -> dict:
    manifest = read_manifest(out)
    if difference := _difference(manifest, {key: terms[key] for key in ("source", "options")}):
        raise FileExistsError(f"{out} holds a dataset that was built with another {difference}: choose a new folder")
    return manifest


def _difference(before: dict, now: dict) -> str:
    return ", ".join(
        key if section == "options" else f"{section} ({key})"
        for section in now
        for key in now[section]
        if before.get(section, {}).get(key) != now[section][key]
    )


def _prepare(out: Path, terms: dict) -> None:
    """Create the work folder, or check that the existing one belongs to the same build."""
    begun = out / WORK / "terms.json"
    if begun.is_file() and _size(out / WORK / JOURNAL):
        if difference := _difference(json.loads(begun.read_text("utf-8")), terms):
            raise FileExistsError(
                f"{out / WORK} was begun with another {difference}: use the same settings, or remove it"
            )
        return
    others = [p.name for p in out.iterdir() if p.name != WORK] if out.exists() else []
    if others:
        raise FileExistsError(f"{out} is not empty (it holds {others[0]}): choose a new folder")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    files.write_json(begun, terms)


class _Writers:
    """The files of a build in progress, cut to the lengths in the last journal entry."""

    def __init__(self, folder: Path, last: dict):
        self.rejected = JsonLinesWriter(folder / REJECTED, last.get("rejected_bytes", 0))
        self.remarks = JsonLinesWriter(folder / REMARKS, last.get("remarks_bytes", 0))
        self.journal = JsonLinesWriter(folder / JOURNAL, last.get("journal_bytes", 0))

    def close(self) -> None:
        for lines in (self.rejected, self.remarks, self.journal):
            lines.close()


class _Build:
    """A build in progress: its journal, the shard being written, the counts of rows."""

    def __init__(
        self, out: Path, source: PublishedSource, terms: dict, options: BuildOptions, max_rejected: int | None
    ):
        self.out, self.folder, self.source, self.terms = out, out / WORK, source, terms
        self.options, self.max_rejected = options, max_rejected
        self.entries = self._read_journal()
        last = self.entries[-1] if self.entries else {}
        self.complete = last.get("complete", False)
        self.place = ReadPosition(*last.get("place", START))
        self.held_from = last.get("held_from", 0)
        self.report = _report(last)
        self._open_writers = None if self.complete else _Writers(self.folder, last)
        self.shard: ShardWriter | None = None
        self.shard_name = self.configuration = ""
        self.numbers: list[tuple[int, int]] = []  # of rows done since the last entry

    def _read_journal(self) -> list[dict]:
        """The entries up to the first whose shard is missing or has another size."""
        path, entries = self.folder / JOURNAL, []
        for entry, end in JsonLines(path).with_ends():
            if shard := entry.get("shard"):
                there = _size(self.folder / shard["file"]) or _size(self.out / shard["file"])
                if there != shard["bytes"]:
                    break
            entries.append(entry | {"journal_bytes": end})
        return entries

    @property
    def _writers(self) -> "_Writers":
        if self._open_writers is None:
            raise RuntimeError("a complete build is not written to")
        return self._open_writers

    def close(self) -> None:
        if self._open_writers:
            self._open_writers.close()
        if self.shard:
            self.shard.give_up()

    def run(self, reading: ReadOptions, progress: Callable[[int, ReadingReport], object]) -> None:
        """Reads the source from the last journal entry on and writes shards."""
        done = {tuple(number) for entry in self.entries for number in entry["numbers"]}
        remarks = [r for r in JsonLines(self.folder / REMARKS) if r["part"] == self.place.part]
        events = read_events(
            self.source,
            self.options.configuration,
            reading,
            done=done,
            seen=self._ids(),
            start=self.place,
            held_from=self.held_from,
            remarks=[r for r in remarks if "archive" in r],
        )
        progress(len(done), self.report)
        with contextlib.closing(events):  # ends its threads
            for event in events:
                if event.place.part != self.place.part:
                    self._end_shard(ReadPosition(event.place.part, -1, -1), 0)
                self._take(event)
                progress(event.number is not None, self.report)
        self._end_shard(self.place, self.held_from, complete=True)

    def _ids(self) -> Iterable[str]:
        for entry in self.entries:
            if entry.get("shard"):
                yield from pq.read_table(self.folder / entry["shard"]["file"], columns=["id"])["id"].to_pylist()

    def _take(self, event: ReadEvent) -> None:
        self.place, self.held_from = event.place, event.held_from
        if event.number is not None:
            self.numbers.append(event.number)
        if event.finding is not None:
            self._record(event, event.finding)
        if event.row is None:
            return
        self.report.accept(event.configuration)
        if self.shard is None:
            self.shard = self._new_shard(event.configuration)
        self.shard.add(event.row)
        if self.shard.bytes >= self.options.shard_bytes:
            self._end_shard(event.place, event.held_from)

    def _record(self, event: ReadEvent, finding: Finding) -> None:
        self.report.add(finding)
        if event.number is None:
            self._writers.remarks.append(finding.to_dict() | {"part": event.place.part})
            return
        self._writers.rejected.append(finding.to_dict())
        if self.max_rejected is not None and self.report.rejected_total > self.max_rejected:
            raise ValueError(
                f"more than {self.max_rejected} rows are rejected (--max-rejected); the last: {finding}; "
                f"all of them: {self.folder / REJECTED}"
            )

    def _new_shard(self, configuration: str) -> ShardWriter:
        number = sum((entry.get("shard") or {}).get("configuration") == configuration for entry in self.entries)
        self.configuration, self.shard_name = configuration, f"data/{configuration}/{SPLIT}-{number:05d}.parquet"
        path = self.folder / self.shard_name
        path.parent.mkdir(parents=True, exist_ok=True)
        return ShardWriter(path, self.options.row_group_bytes)

    def _end_shard(self, place: ReadPosition, held_from: int, complete: bool = False) -> None:
        """Finish the open shard, if any, and record in the journal that everything up to `place` is done."""
        shard, self.shard = self.shard, None
        facts = None
        if shard:
            try:
                facts = {"file": self.shard_name, "configuration": self.configuration} | shard.finish()
            except BaseException:
                shard.give_up()
                raise
        writers = self._writers
        writers.rejected.sync()
        writers.remarks.sync()
        entry = {
            "shard": facts,
            "numbers": self.numbers,
            "place": place,
            "held_from": held_from,
            "rejected_bytes": writers.rejected.length,
            "remarks_bytes": writers.remarks.length,
            "report": {
                "accepted": self.report.accepted,
                "rejected": self.report.rejected,
                "remarks": self.report.remarks,
            },
            "complete": complete,
        }
        writers.journal.append(entry)
        writers.journal.sync()
        self.entries.append(entry | {"numbers": []})  # they are on the disk
        self.numbers, self.place, self.held_from = [], place, held_from

    def publish(self) -> dict:
        """Write card and manifest, and move all files to the output folder; `data` last, which makes it loadable."""
        shards = [entry["shard"] for entry in self.entries if entry.get("shard")]
        manifest = make_manifest(shards, self.report, self.terms)
        if not (self.out / "data").exists():
            (self.folder / "data").mkdir(exist_ok=True)  # also when no row was accepted
        for name in (REJECTED, REMARKS):
            if (self.folder / name).exists():
                files.rename(self.folder / name, self.out / name)
        files.write_json(self.out / MANIFEST, manifest)
        write_card(self.out / CARD, manifest)
        if (self.folder / "data").exists():
            files.rename(self.folder / "data", self.out / "data")
        files.rename(self.folder, self.out / _REMOVED)  # all of it goes at once
        shutil.rmtree(self.out / _REMOVED)
        return manifest


def _report(entry: dict) -> ReadingReport:
    counts = entry.get("report", {})
    rejected = {name: Counter(reasons) for name, reasons in counts.get("rejected", {}).items()}
    return ReadingReport(Counter(counts.get("accepted", {})), rejected, Counter(counts.get("remarks", {})))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
