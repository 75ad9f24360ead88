"""A repository on the Hub: its state, its files, one commit; asked again when it does not answer.

Large files go first, out of sight; one commit then makes everything visible, or nothing. Broken off, the same calls go
on: what the Hub has already is not sent again.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from echo4o.common.hub_names import require_repository_name

_TRIES, _AT_ONCE = 6, 10
_SETTINGS = "https://huggingface.co/settings/tokens"
Source = Path | bytes


class Remote:
    """One repository, or one of its branches.

    Args:
        pause: seconds before a failed request is tried again; it doubles each time.
        tell: told, in a sentence, why something takes longer.
    """

    def __init__(
        self,
        api: HfApi,
        repo: str,
        repo_type: str,
        branch: str | None = None,
        pause: float = 1.0,
        tell: Callable[[str], object] = lambda text: None,
    ):
        require_repository_name(repo)
        self.api, self.repo, self.repo_type, self.branch = api, repo, repo_type, branch
        self.pause, self.tell = pause, tell

    @property
    def address(self) -> str:
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.api.endpoint}/{kind}{self.repo}"

    def require_token(self) -> None:
        """Raise OSError when nobody is logged in."""
        if not (self.api.token or get_token()):
            raise OSError(
                f"nobody is logged in: run `hf auth login`, or set HF_TOKEN to a token with the role 'write' ({_SETTINGS})"
            )

    def state(self, revision: str | None = None) -> tuple[str | None, dict[str, str]]:
        """The head commit (None: no such repository) and, per file, the sha256 (64 digits) or git's id (40) of it.

        A branch that does not exist yet will begin as `main` does.
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
        files = self.call(lambda: list(self.api.list_repo_tree(self.repo, **options)))
        return info.sha, {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in files if hasattr(f, "blob_id")}

    def read(self, path: str, revision: str) -> bytes:
        """A small file of the repository, as it is at a commit."""
        with tempfile.TemporaryDirectory() as cache:
            options = {"repo_type": self.repo_type, "revision": revision, "cache_dir": cache}
            return Path(self.call(self.api.hf_hub_download, self.repo, path, **options)).read_bytes()

    def fetch(self, revision: str, cache: Path, patterns: list[str] | None = None) -> Path:
        """The repository at a commit, downloaded into a cache of its own."""
        options = {"revision": revision, "cache_dir": cache, "allow_patterns": patterns}
        return Path(self.call(self.api.snapshot_download, self.repo, repo_type=self.repo_type, **options))

    def create(self, private: bool) -> None:
        """Make the repository where it is missing."""
        sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
        common = {"repo_type": self.repo_type, "exist_ok": True}
        self.call(self.api.create_repo, self.repo, private=private, **common, **sdk)

    def make_branch(self) -> None:
        if self.branch:
            self.call(self.api.create_branch, self.repo, branch=self.branch, repo_type=self.repo_type, exist_ok=True)

    def send(self, additions: list[CommitOperationAdd], progress: Callable[[int, int], object]) -> None:
        """Upload what is large, before the commit; `progress` is told (files done, files in all)."""
        for start in range(0, len(additions), _AT_ONCE):
            batch = additions[start : start + _AT_ONCE]
            options = {"repo_type": self.repo_type, "revision": self.branch, "free_memory": False}
            self.call(self.api.preupload_lfs_files, self.repo, batch, **options)
            progress(min(start + _AT_ONCE, len(additions)), len(additions))

    def commit(
        self, additions: list[CommitOperationAdd], deletions: Iterable[str], title: str, head: str
    ) -> tuple[str, str]:
        """Make everything visible at once, on top of `head`; (sha, address) of the commit."""
        operations = [*additions, *(CommitOperationDelete(path) for path in deletions)]
        options = {"repo_type": self.repo_type, "revision": self.branch, "parent_commit": head}

        def once() -> tuple[str, str]:
            try:
                made = self.api.create_commit(self.repo, operations, commit_message=title, **options)
                return made.oid, made.commit_url
            except Exception:
                # The answer may have been lost on its way back: then it is there.
                now, files = self.state()
                added = all(op.path_in_repo in files and same(op, files[op.path_in_repo]) for op in additions)
                if now != head and added and not set(files) & set(deletions):
                    return now, f"{self.address}/commit/{now}"
                raise

        return self.call(once)

    def move_tag(self, tag: str, sha: str) -> None:
        """Let a tag name this commit, whatever it named before."""
        refs = self.call(self.api.list_repo_refs, self.repo, repo_type=self.repo_type)
        there = next((t.target_commit for t in refs.tags if t.name == tag), None)
        if there == sha:
            return
        if there:
            self.call(self.api.delete_tag, self.repo, tag=tag, repo_type=self.repo_type)
        self.call(self.api.create_tag, self.repo, tag=tag, revision=sha, repo_type=self.repo_type, exist_ok=True)

    def call(self, function, *arguments, **options):
        """Call the Hub; what may be otherwise in a moment is tried again, the rest becomes one sentence."""
        for attempt in range(_TRIES):
            try:
                return function(*arguments, **options)
            except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
                raise
            except OfflineModeIsEnabled as error:
                raise OSError(f"{self.repo}: HF_HUB_OFFLINE is set, and a push needs the Hub") from error
            except Exception as raised:
                error = _reason(raised)
                if not _passes(error):
                    if isinstance(error, HfHubHTTPError):
                        raise OSError(self._explain(error)) from raised
                    raise
                if attempt == _TRIES - 1:
                    raise OSError(f"{self.repo}: {_first_line(error)}; run it again to go on") from raised
                wait = max(self.pause * 2**attempt, _retry_after(error))
                self.tell(f"{self.repo}: {_first_line(error)}; trying again in {wait:.0f} s")
                time.sleep(wait)

    def _explain(self, error: HfHubHTTPError) -> str:
        status, owner = status_of(error), self.repo.split("/")[0]
        if status == 401:
            return (
                f"{self.repo}: the Hub does not know the token (401): run `hf auth login`, or set HF_TOKEN to a token "
                f"with the role 'write' ({_SETTINGS})"
            )
        if status == 403:
            return (
                f"{self.repo}: the token has no right to write there (403): it needs the role 'write', or, fine-grained, "
                f"'Write access to contents/settings of all repos' of {owner} ({_SETTINGS})"
            )
        if status == 412:
            return f"{self.repo}: somebody else changed it meanwhile (412), and nothing was sent over that: look at it, then run it again"
        return f"{self.repo}: {_first_line(error)}"


class Hub:
    """The other repositories that a card names."""

    def __init__(self, api: HfApi, cache: Path, pause: float, tell: Callable[[str], object]):
        self.api, self.cache, self.pause, self.tell = api, cache, pause, tell

    def exists(self, repo: str, repo_type: str = "model") -> bool:
        """Whether there is such a repository, and the token may read it."""
        return Remote(self.api, repo, repo_type, None, self.pause, self.tell).state()[0] is not None

    def require(self, repo: str, repo_type: str = "model") -> str:
        """`repo`; ValueError when there is none."""
        if not self.exists(repo, repo_type):
            raise ValueError(f"there is no {repo_type} {repo} on the Hub, or the token may not read it")
        return repo

    def fetch(self, repo: str, patterns: list[str] | None = None) -> Path:
        """A model's repository, or some of its files, as a folder."""
        remote = Remote(self.api, self.require(repo), "model", None, self.pause, self.tell)
        return remote.fetch("main", self.cache, patterns)


def addition(path: str, source: Source, sha256: str | None = None) -> CommitOperationAdd:
    """A file to be sent: from the disk, or its bytes. One whose sha256 is known is not read for it."""
    operation = CommitOperationAdd(path, source)
    if sha256:
        operation.upload_info.sha256 = bytes.fromhex(sha256)
    return operation


def same(operation: CommitOperationAdd, digest: str) -> bool:
    """Whether a file of the Hub, by what names its content, is the one to be sent."""
    if len(digest) == 64:
        return operation.upload_info.sha256.hex() == digest
    return git_id(operation) == digest


def git_id(operation: CommitOperationAdd) -> str:
    """git's name of a file's content, which the Hub gives for small files."""
    with operation.as_file() as stream:
        data = stream.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def status_of(error: Exception) -> int | None:
    """The HTTP status of an error, if an answer came."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> Exception:
    """What went wrong; huggingface_hub wraps what fails in its threads into a RuntimeError."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a moment: too many requests, trouble at the server or on the way."""
    if isinstance(error, HfHubHTTPError):
        return status_of(error) is not None and (status_of(error) == 429 or status_of(error) >= 500)
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library.startswith(("httpx", "httpcore", "requests"))


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return min(float(value), 300.0) if value.isdigit() else 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
