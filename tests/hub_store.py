"""What the loopback Hub keeps: repositories with their commits, and the faults that are asked of it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    oid: str  # git's object id
    lfs: str | None = None  # sha256, for files behind a pointer

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.lfs, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass
class Repo:
    kind: str
    name: str
    files: dict[str, StoredFile] = field(default_factory=dict)
    commits: list[tuple[str, str, dict[str, StoredFile]]] = field(default_factory=list)  # (sha, title, files)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, title: str, branch: str = "main", files: dict[str, StoredFile] | None = None) -> str:
        """Make `files` (those of `main`) a commit of the branch; its sha."""
        sha = hashlib.sha1(f"{self.kind} {self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append((sha, title, dict(self.files if files is None else files)))
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str | None) -> str | None:
        revision = (revision or "main").removeprefix("refs/heads/")
        named = self.branches.get(revision) or self.tags.get(revision)
        if named:
            return named
        return next((sha for sha, _, _ in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)

    def at(self, revision: str | None) -> dict[str, StoredFile] | None:
        sha = self.resolve(revision)
        return next((files for s, _, files in self.commits if s == sha), None)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match, once `after` of them went well.

    `status` answers with that code and `headers`; `delay` waits so many seconds first; `cut` sends that fraction of the
    body and closes the connection; `drop` closes it without an answer; `lost` does what was asked and closes it without
    an answer; `meanwhile` is called first: what somebody else does at that moment.
    """

    path: str = ".*"  # regular expression, searched for in the path with its query
    method: str = ".*"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: float | None = None
    drop: bool = False
    lost: bool = False
    meanwhile: Callable[[], object] | None = None
    times: int = 1
    after: int = 0
