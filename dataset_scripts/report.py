"""What a reader could not use, and why: nothing that was given vanishes without a finding."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why a row was rejected, or what is wrong with a file beside the rows."""

    # of rows: each makes a given row a rejected one
    UNREADABLE_ROW = "unreadable_row"
    EMPTY_INSTRUCTION = "empty_instruction"
    MISSING_IMAGE = "missing_image"
    MISSING_REFERENCE = "missing_reference"
    # of archives and their members
    UNREADABLE_ARCHIVE = "unreadable_archive"
    UNSAFE_MEMBER = "unsafe_member"
    DUPLICATE_MEMBER = "duplicate_member"
    MEMBER_WITHOUT_ROW = "member_without_row"


ROW_REASONS = frozenset(
    {Reason.UNREADABLE_ROW, Reason.EMPTY_INSTRUCTION, Reason.MISSING_IMAGE, Reason.MISSING_REFERENCE}
)


@dataclass(frozen=True)
class Finding:
    """One thing that could not be used. ``file`` is relative to the release's folder, ``line`` counts from 1."""

    reason: Reason
    file: str
    line: int | None = None
    member: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        place = (
            self.file + (f":{self.line}" if self.line else "") + (f" member {self.member!r}" if self.member else "")
        )
        return f"{self.reason.value}: {place}" + (f": {self.detail}" if self.detail else "")


@dataclass
class Report:
    """Counts of rows and every finding. ``given == accepted + rejected`` once reading has ended."""

    given: int = 0
    accepted: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        return sum(finding.reason in ROW_REASONS for finding in self.findings)

    @property
    def reasons(self) -> Counter:
        return Counter(finding.reason for finding in self.findings)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} x {reason.value}" for reason, number in sorted(self.reasons.items()))
        return f"{self.given} rows given, {self.accepted} accepted, {self.rejected} rejected" + (
            f" ({counts})" if counts else ""
        )
