"""What [`LoopbackHub`](hub.py) stores: repositories with their commits, and the faults to inject."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoredFile:
    """One file of a repository."""

    data: bytes
    oid: str  # git's object id
    lfs: str | None = None  # sha256, for files behind a pointer

    def entry(self, path: str) -> dict:
        """The file in a listing of the API."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.lfs, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass
class Repo:
    """A repository; `files` are those of the branch main."""

    kind: str
    name: str
    files: dict[str, StoredFile] = field(default_factory=dict)
    commits: list[tuple[str, str, dict[str, StoredFile]]] = field(default_factory=list)  # (sha, title, files)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, title: str, branch: str = "main", files: dict[str, StoredFile] | None = None) -> str:
        """Commit `files` (default: those of main) to a branch; returns the sha."""
        sha = hashlib.sha1(f"{self.kind} {self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append((sha, title, dict(self.files if files is None else files)))
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str | None) -> str | None:
        """The sha of a branch, tag or (abbreviated) sha; None where there is no such revision."""
        revision = (revision or "main").removeprefix("refs/heads/")
        named = self.branches.get(revision) or self.tags.get(revision)
        if named:
            return named
        return next((sha for sha, _, _ in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)

    def at(self, revision: str | None) -> dict[str, StoredFile] | None:
        """The files at a revision; None where there is no such revision."""
        sha = self.resolve(revision)
        return next((files for s, _, files in self.commits if s == sha), None)


@dataclass
class HubFault:
    """A fault for matching requests.

    Args:
        path: regular expression, searched for in the path with its query.
        method: regular expression for the whole HTTP method.
        status: answer with this code and `headers`.
        delay: seconds to wait first.
        cut: send this fraction of the body, then close the connection.
        drop: close the connection without handling the request.
        lost: handle the request, then close the connection without an answer.
        meanwhile: called before the request is handled, to change the Hub at that moment.
        times: how many matching requests fail.
        after: how many matching requests succeed first.
    """

    path: str = ".*"
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
