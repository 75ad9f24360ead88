"""Reads and writes a repository on the Hub, with retries.

Large files are uploaded first; one commit then makes all files visible at once. After an interruption, the same calls
resume: files that the Hub already has are not sent again.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from echo4o.common.hub_names import require_repository_name

_ATTEMPTS = 6  # per request
_BATCH = 10  # files uploaded between two reports of progress
_SETTINGS = "https://huggingface.co/settings/tokens"
Source = Path | bytes  # a file on disk, or the contents of a generated one
T = TypeVar("T")


class Remote:
    """A repository, or one of its branches.

    Args:
        repo: `owner/name`.
        repo_type: "model", "dataset" or "space".
        branch: the branch to read and write; None for the default branch.
        pause: seconds before the first retry of a failed request; doubles with each retry.
        log: called with a message for each retry.
    """

    def __init__(
        self,
        api: HfApi,
        repo: str,
        repo_type: str,
        branch: str | None = None,
        pause: float = 1.0,
        log: Callable[[str], object] = lambda text: None,
    ):
        require_repository_name(repo)
        self.api, self.repo, self.repo_type, self.branch = api, repo, repo_type, branch
        self.pause, self.log = pause, log

    @property
    def address(self) -> str:
        """URL of the repository."""
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.api.endpoint}/{kind}{self.repo}"

    def require_token(self) -> None:
        """Raises OSError if no token is set."""
        if not (self.api.token or get_token()):
            raise OSError(
                f"not logged in: run `hf auth login`, or set HF_TOKEN to a token with the role 'write' ({_SETTINGS})"
            )

    def state(self, revision: str | None = None) -> tuple[str | None, dict[str, str]]:
        """Returns the head commit and the hash of each file; (None, {}) if the repository does not exist.

        A hash is the SHA-256 (64 digits) of a large file or the git object id (40 digits) of a small one. For a branch
        that does not exist yet, the state of `main` is returned, because the branch will start from it.
        """
        revision = revision or self.branch
        try:
            info = self.call(self.api.repo_info, self.repo, repo_type=self.repo_type, revision=revision)
        except RevisionNotFoundError:
            if revision != self.branch:
                raise
            return self.state("main")
        except RepositoryNotFoundError:
            return None, {}
        options = {"recursive": True, "repo_type": self.repo_type, "revision": info.sha}
        entries = self.call(lambda: list(self.api.list_repo_tree(self.repo, **options)))
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return info.sha, {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in files}

    def read(self, path: str, revision: str) -> bytes:
        """Returns the contents of a small file at a revision."""
        with tempfile.TemporaryDirectory() as cache:
            options = {"repo_type": self.repo_type, "revision": revision, "cache_dir": cache}
            return Path(self.call(self.api.hf_hub_download, self.repo, path, **options)).read_bytes()

    def fetch(self, revision: str, cache: Path, patterns: list[str] | None = None) -> Path:
        """Downloads the repository at a revision into `cache` and returns the folder."""
        options = {"revision": revision, "cache_dir": cache, "allow_patterns": patterns}
        return Path(self.call(self.api.snapshot_download, self.repo, repo_type=self.repo_type, **options))

    def create(self, private: bool) -> None:
        """Creates the repository if it is missing."""
        sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
        common = {"repo_type": self.repo_type, "exist_ok": True}
        self.call(self.api.create_repo, self.repo, private=private, **common, **sdk)

    def make_branch(self) -> None:
        """Creates the branch if it is missing."""
        if self.branch:
            self.call(self.api.create_branch, self.repo, branch=self.branch, repo_type=self.repo_type, exist_ok=True)

    def send(self, additions: list[CommitOperationAdd], progress: Callable[[int, int], object]) -> None:
        """Uploads the large files, before the commit; calls `progress(files done, files in total)`."""
        for start in range(0, len(additions), _BATCH):
            batch = additions[start : start + _BATCH]
            options = {"repo_type": self.repo_type, "revision": self.branch, "free_memory": False}
            self.call(self.api.preupload_lfs_files, self.repo, batch, **options)
            progress(min(start + _BATCH, len(additions)), len(additions))

    def commit(
        self, additions: list[CommitOperationAdd], deletions: Iterable[str], title: str, head: str
    ) -> tuple[str, str]:
        """Commits all files in one commit on top of `head`; returns the hash and the URL of the commit."""
        operations = [*additions, *(CommitOperationDelete(path) for path in deletions)]
        options = {"repo_type": self.repo_type, "revision": self.branch, "parent_commit": head}

        def once() -> tuple[str, str]:
            try:
                info = self.api.create_commit(self.repo, operations, commit_message=title, **options)
                return info.oid, info.commit_url
            except Exception:
                # The commit may exist although its response was lost.
                current, files = self.state()
                added = all(op.path_in_repo in files and same(op, files[op.path_in_repo]) for op in additions)
                if current and current != head and added and not set(files) & set(deletions):
                    return current, f"{self.address}/commit/{current}"
                raise

        return self.call(once)

    def move_tag(self, tag: str, sha: str) -> None:
        """Creates the tag at this commit, or moves it there."""
        refs = self.call(self.api.list_repo_refs, self.repo, repo_type=self.repo_type)
        current = next((t.target_commit for t in refs.tags if t.name == tag), None)
        if current == sha:
            return
        if current:
            self.call(self.api.delete_tag, self.repo, tag=tag, repo_type=self.repo_type)
        self.call(self.api.create_tag, self.repo, tag=tag, revision=sha, repo_type=self.repo_type, exist_ok=True)

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Calls a function of the Hub's API and retries temporary failures.

        Raises:
            OSError: the Hub refused the request, or did not answer after all attempts. A missing repository, revision
                or file raises the error of huggingface_hub.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return function(*arguments, **options)
            except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
                raise
            except OfflineModeIsEnabled as error:
                raise OSError(f"{self.repo}: HF_HUB_OFFLINE is set, and a push needs the Hub") from error
            except Exception as raised:
                error = _reason(raised)
                if not _is_temporary(error):
                    if isinstance(error, HfHubHTTPError):
                        raise OSError(self._explain(error)) from raised
                    raise
                if attempt == _ATTEMPTS - 1:
                    raise OSError(f"{self.repo}: {_first_line(error)}; run the command again to resume") from raised
                wait = max(self.pause * 2**attempt, _retry_after(error))
                self.log(f"{self.repo}: {_first_line(error)}; trying again in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, error: HfHubHTTPError) -> str:
        status, owner = status_of(error), self.repo.split("/")[0]
        if status == 401:
            return (
                f"{self.repo}: the Hub rejects the token (401): run `hf auth login`, or set HF_TOKEN to a token "
                f"with the role 'write' ({_SETTINGS})"
            )
        if status == 403:
            return (
                f"{self.repo}: the token has no write access (403): it needs the role 'write', or, fine-grained, "
                f"'Write access to contents/settings of all repos' of {owner} ({_SETTINGS})"
            )
        if status == 412:
            return f"{self.repo}: the repository changed since this push began (412); nothing was overwritten. Look at the change, then run the command again"
        return f"{self.repo}: {_first_line(error)}"


class Hub:
    """Reads the other repositories that a card names."""

    def __init__(self, api: HfApi, cache: Path, pause: float, log: Callable[[str], object]):
        self.api, self.cache, self.pause, self.log = api, cache, pause, log

    def exists(self, repo: str, repo_type: str = "model") -> bool:
        """Whether the repository exists and the token can read it."""
        return Remote(self.api, repo, repo_type, None, self.pause, self.log).state()[0] is not None

    def require(self, repo: str, repo_type: str = "model") -> str:
        """Returns `repo`; raises ValueError if the repository does not exist."""
        if not self.exists(repo, repo_type):
            raise ValueError(f"there is no {repo_type} {repo} on the Hub, or the token cannot read it")
        return repo

    def fetch(self, repo: str, patterns: list[str] | None = None) -> Path:
        """Downloads a model repository, or the files that match `patterns`, and returns the folder."""
        remote = Remote(self.api, self.require(repo), "model", None, self.pause, self.log)
        return remote.fetch("main", self.cache, patterns)


def addition(path: str, source: Source, sha256: str | None = None) -> CommitOperationAdd:
    """Returns the upload of one file; `sha256`, if it is known, saves reading the file to compute it."""
    operation = CommitOperationAdd(path, source)
    if sha256:
        operation.upload_info.sha256 = bytes.fromhex(sha256)
    return operation


def same(operation: CommitOperationAdd, digest: str) -> bool:
    """Whether a file on the Hub with this hash (SHA-256 or git object id) has the content to be uploaded."""
    if len(digest) == 64:
        return operation.upload_info.sha256.hex() == digest
    return git_id(operation) == digest


def git_id(operation: CommitOperationAdd) -> str:
    """Returns the git object id of the content, which the Hub states for small files."""
    with operation.as_file() as stream:
        data = stream.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status of an error; None if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> Exception:
    """Returns the original error; huggingface_hub wraps errors of its upload threads into a RuntimeError."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def _is_temporary(error: Exception) -> bool:
    """Whether a retry may succeed: rate limits, server errors and connection errors."""
    if isinstance(error, HfHubHTTPError):
        status = status_of(error)
        return status is not None and (status == 429 or status >= 500)
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library.startswith(("httpx", "httpcore", "requests"))


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return min(float(value), 300.0) if value.isdigit() else 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
