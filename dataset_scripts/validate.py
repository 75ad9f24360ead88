"""Checks a dataset row by row, in the published layout or built."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from echo4o.dataset_scripts.findings import Finding, ReadingReport, RejectionReason
from echo4o.dataset_scripts.flow import ordered
from echo4o.dataset_scripts.images import CheckedImage, check_image
from echo4o.dataset_scripts.manifest import MANIFEST, listed_shards, read_manifest
from echo4o.dataset_scripts.names import ALL, MULTI_REFERENCE
from echo4o.dataset_scripts.source import PublishedSource
from echo4o.dataset_scripts.upstream import ReadOptions, read_events, row_id

_BATCH = 32


@dataclass(frozen=True)
class RowCheck:
    """A checked row; `finding` is None if it is valid."""

    configuration: str
    finding: Finding | None


def is_built(target: str | Path) -> bool:
    """Whether `target` is a folder that `echo4o dataset build` finished."""
    return "://" not in str(target) and (Path(target) / MANIFEST).is_file()


def validate(
    target: str | Path,
    configuration: str = ALL,
    options: ReadOptions | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[ReadingReport, Iterator[Finding]]:
    """Returns a report and the findings; the report is filled while the findings are iterated."""
    report = ReadingReport()
    options = options or ReadOptions()

    def findings() -> Iterator[Finding]:
        checks = (
            _built(Path(target), configuration, options)
            if is_built(target)
            else _source(target, configuration, options)
        )
        for check in checks:
            if check.finding is None:
                report.accept(check.configuration)
            else:
                report.add(check.finding)
                yield check.finding
            progress(check.finding is None or isinstance(check.finding.reason, RejectionReason))

    return report, findings()


def _source(target: str | Path, configuration: str, options: ReadOptions) -> Iterator[RowCheck]:
    for event in read_events(PublishedSource(target), configuration, options):
        yield RowCheck(event.configuration, event.finding)


def _built(folder: Path, configuration: str, options: ReadOptions) -> Iterator[RowCheck]:
    """The rows of the shards, each with its images decoded; files are checked by `check_shards`."""
    seen: set[str | None] = set()
    with ThreadPoolExecutor(max(1, options.workers)) as pool:
        for name, shard in listed_shards(read_manifest(folder)):
            if configuration not in (ALL, name):
                continue
            jobs = ordered(
                lambda item: pool.submit(_check_row, item[1], options.verify),
                _rows(folder / shard["file"]),
                lambda item: len(item[1]["image"]["bytes"] or b"") if item[1] and item[1]["image"] else 0,
                32 << 20,
                4 * options.workers,
            )
            for (number, row), job in jobs:
                fault, row_id = job.result(), row["id"] if row else None
                if not fault and row_id in seen:
                    fault = RejectionReason.DUPLICATE, f"an earlier row has the id {row_id}"
                if fault:
                    reason, detail = fault
                    shown = {key: row[key] for key in ("id", "instruction", "metadata")} if row else None
                    yield RowCheck(name, Finding(reason, detail, name, shard["file"], number, row=shown))
                else:
                    seen.add(row_id)
                    yield RowCheck(name, None)


def _rows(path: Path) -> Iterator[tuple[int, dict | None]]:
    """(number from 1, row). A shard that cannot be read ends with a row None."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError):  # ArrowInvalid is a ValueError
        yield number + 1, None


def _check_row(row: dict | None, verify: str) -> tuple[RejectionReason, str] | None:
    if row is None:
        return RejectionReason.UNREADABLE_ROW, "the shard cannot be read from here on"
    if not (row["instruction"] or "").strip():
        return RejectionReason.EMPTY_INSTRUCTION, "there is no text"
    target, fault = _check_stored(row["image"], RejectionReason.MISSING_IMAGE, verify)
    if fault:
        return fault
    references = row["reference_images"] or []
    if row["task"] == MULTI_REFERENCE and not references:
        return RejectionReason.MISSING_REFERENCE, "the row has none"
    for number, stored in enumerate(references, 1):
        _, fault = _check_stored(stored, RejectionReason.MISSING_REFERENCE, verify)
        if fault:
            return fault[0], f"reference {number}: {fault[1]}"
    if row["metadata"] is not None:
        try:
            json.loads(row["metadata"])
        except ValueError as error:
            return RejectionReason.UNREADABLE_ROW, f"metadata is not JSON: {error}"
    if target and row["id"] != row_id(row["instruction"], target) and "archive" in (row["metadata"] or ""):
        return RejectionReason.UNREADABLE_ROW, "the id does not belong to this instruction and image"
    return None


def _check_stored(
    stored: dict | None, absent: RejectionReason, verify: str
) -> tuple[CheckedImage | None, tuple[RejectionReason, str] | None]:
    if not stored or stored["bytes"] is None:
        return None, (absent, "there are no bytes")
    image = check_image(stored["bytes"], verify)
    return image, (image.reason, image.detail) if image.reason else None
