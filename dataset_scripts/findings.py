"""Problems of rows and archive members, and their counts."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum


class RejectionReason(StrEnum):
    """Why a row is rejected. Every row is accepted, or rejected for exactly one reason."""

    MISSING_IMAGE = "missing image"
    UNDECODABLE = "undecodable"
    TRUNCATED = "truncated"
    DECOMPRESSION_BOMB = "decompression bomb"
    EMPTY_INSTRUCTION = "empty instruction"
    DUPLICATE = "duplicate"  # the same instruction and the same image bytes as an earlier row
    MISSING_REFERENCE = "missing reference"
    UNREADABLE_ROW = "unreadable row"
    UNSAFE_MEMBER = "unsafe member"  # the row's image is a link, a device, or lies outside the archive


class Remark(StrEnum):
    """Problems of the source that reject no row by themselves. No value equals that of a rejection reason."""

    UNSAFE_MEMBER = "refused member"
    DECOMPRESSION_BOMB = "oversized member"
    UNUSED_MEMBER = "member without row"
    SURPLUS_MEMBER = "surplus member"  # its rows already have their image, or are rejected for another reason
    AMBIGUOUS_MEMBER = "ambiguous member"  # several rows' paths fit its name equally well
    DAMAGED_ARCHIVE = "damaged archive"
    UNREAD_ARCHIVE = "unread archive"  # of a kind that is not read: zip, 7z, rar, zstd
    OPEN_ARRAY = "unclosed array"  # a JSON array of rows without its end


@dataclass(frozen=True)
class Finding:
    """A rejected row or a remark on the source. `row` or `raw` is the whole row as it was read."""

    reason: RejectionReason | Remark
    detail: str
    configuration: str = ""
    file: str | None = None
    line: int | None = None
    archive: str | None = None
    member: str | None = None
    row: dict | None = None
    raw: str | None = None

    def to_dict(self) -> dict:
        """As a dictionary, without empty fields."""
        return {"reason": str(self.reason)} | {
            key: value for key, value in asdict(self).items() if key != "reason" and value not in (None, "")
        }

    def __str__(self) -> str:
        row = f"{self.file}:{self.line}" if self.line else self.file
        member = f"{self.archive}: {self.member}" if self.member is not None else self.archive
        return f"{self.reason}: {', '.join(filter(None, (row, member)))}: {self.detail}"


@dataclass
class ReadingReport:
    """Counts of accepted and rejected rows and of remarks; `given` is the number of all rows."""

    accepted: Counter = field(default_factory=Counter)  # by configuration
    rejected: dict[str, Counter] = field(default_factory=dict)  # configuration -> reasons
    remarks: Counter = field(default_factory=Counter)

    def accept(self, configuration: str) -> None:
        self.accepted[configuration] += 1

    def add(self, finding: Finding) -> None:
        if isinstance(finding.reason, RejectionReason):
            self.rejected.setdefault(finding.configuration, Counter())[str(finding.reason)] += 1
        else:
            self.remarks[str(finding.reason)] += 1

    @property
    def given(self) -> int:
        return self.accepted.total() + self.rejected_total

    @property
    def rejected_total(self) -> int:
        return sum(reasons.total() for reasons in self.rejected.values())

    def reasons(self) -> dict[str, int]:
        """Rejected rows by reason, over all configurations, sorted by name."""
        total = sum(self.rejected.values(), Counter())
        return {reason: total[reason] for reason in sorted(total)}

    def __str__(self) -> str:
        text = f"{self.given} rows given, {self.accepted.total()} accepted, {self.rejected_total} rejected"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons().items())
        remarks = ", ".join(f"{count} {name}" for name, count in sorted(self.remarks.items()))
        return text + (f" ({reasons})" if reasons else "") + (f"; remarks: {remarks}" if remarks else "")
