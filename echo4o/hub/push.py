"""Publishes a folder to the Hub: checks it, uploads it in one commit, and loads it back.

result = push("runs/lora", "owner/name", details=PushDetails(base_model="owner/base"))
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from echo4o.common.hub_names import require_repository_name
from echo4o.common.sizes import format_bytes
from echo4o.hub.kinds.base import CARD, SMALL_BYTES, Kind, PushDetails, Read
from echo4o.hub.recognise import PublishableFolder, kind_of, recognise
from echo4o.hub.remote import Hub, Remote, Source, addition, same
from echo4o.hub.safety import left_out, list_files, require_safe
from echo4o.model_cards.merge import merged, own_words
from echo4o.model_cards.schema import validate

_KEPT_FILES = (".gitattributes",)  # of the Hub; a replaced repository keeps them


@dataclass
class PushResult:
    """What a push did; after a dry run, what it would do."""

    kind: str
    repo: str
    address: str  # URL of the repository
    private: bool | None  # None: the repository exists and keeps its visibility
    checked: str  # what was checked before the upload
    upload: dict[str, int] = field(default_factory=dict)  # path -> bytes
    unchanged: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    sha: str | None = None  # the commit that holds all files; None after a dry run
    commit: str | None = None  # URL of the new commit; None if nothing had to be uploaded
    verified: str | None = None  # what was checked after the upload
    next_command: str = ""

    def __str__(self) -> str:
        visibility = {None: "keeps its visibility", True: "is new and private", False: "is new and public"}
        return f"{self.repo} {visibility[self.private]}: {self._amounts('to upload', 'to remove')}"

    @property
    def summary(self) -> str:
        """What was done, in one sentence."""
        new = {None: "", True: ", new and private", False: ", new and public"}[self.private]
        return f"published as {self.repo}{new}: {self._amounts('uploaded', 'removed')}"

    def _amounts(self, uploaded: str, removed: str) -> str:
        size = format_bytes(sum(self.upload.values()))
        return (
            f"{len(self.upload)} files ({size}) {uploaded}, {len(self.unchanged)} unchanged, "
            f"{len(self.delete)} {removed}"
        )


def push(
    target: str | Path,
    repo: str,
    *,
    details: PushDetails | None = None,
    private: bool = True,
    branch: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    api: HfApi | None = None,
    log: Callable[[str], object] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    pause: float = 1.0,
) -> PushResult:
    """Publishes a folder: a pipeline, an adapter, a dataset, a benchmark result, a metric, or a finished run.

    Args:
        target: the folder, or the name of a bundled metric.
        repo: the repository, `owner/name`; created if it is missing.
        details: facts for the card that the files do not state.
        private: visibility of a new repository; an existing repository keeps its visibility.
        branch: push to this branch instead of `main`; created if it is missing.
        message: message of the commit; None for a summary.
        dry_run: check the folder and return what would be done, without uploading.
        overwrite: replace a repository that holds something else; the old files stay in its history.
        verify: download the new commit into an empty cache, compare it and load it.
        api: client of the Hub; None for the default one.
        log: called with status messages.
        progress: called with the number of files done and in total.
        pause: seconds before the first retry of a failed request; doubles with each retry.

    Raises:
        ValueError: the folder, the name or the card is not valid; nothing was uploaded.
        OSError: the Hub refuses the request or does not answer; repeat the call to resume.
    """
    require_repository_name(repo)
    source = recognise(target)
    log(source.description)
    with tempfile.TemporaryDirectory() as cache:
        process = _PushProcess(source, repo, details or PushDetails(), api or HfApi(), branch, pause, log, Path(cache))
        return process.run(private, message, dry_run, overwrite, verify, progress)


class _PushProcess:
    """A push of one folder to one repository."""

    def __init__(
        self,
        source: PublishableFolder,
        repo: str,
        details: PushDetails,
        api: HfApi,
        branch: str | None,
        pause: float,
        log: Callable[[str], object],
        cache: Path,
    ):
        self.log, self.hub = log, Hub(api, cache, pause, log)
        self.kind: Kind = source.kind(source.folder, details, source.run, self.hub)
        self.remote = Remote(api, repo, self.kind.repo_type, branch, pause, log)
        self.repo = repo

    def run(
        self,
        private: bool,
        message: str | None,
        dry_run: bool,
        overwrite: bool,
        verify: bool,
        progress: Callable[[int, int], object],
    ) -> PushResult:
        """Checks the folder, uploads it and verifies the upload; see `push`."""
        kind, remote = self.kind, self.remote
        kind.check_name(self.repo)
        checked_files = list_files(kind.folder)
        require_safe(checked_files)
        if hidden := left_out(kind.folder):
            self.log(f"{hidden} hidden files and caches are not uploaded")
        checked = kind.check()
        self.log(f"checked: {checked}")
        if not dry_run:
            remote.require_token()
        head, published = remote.state()
        foreign = self._foreign_files(published, overwrite)
        readable = {path: partial(remote.read, path, head) for path in published if head and not foreign}
        files = kind.files(readable)
        files[CARD] = self._card(files, readable)
        require_safe({path: source for path, source in files.items() if checked_files.get(path) != source})
        hashes = kind.hashes()
        additions = {path: addition(path, source, hashes.get(path)) for path, source in sorted(files.items())}
        result = self._plan(additions, published, foreign, None if head else private, checked)
        if dry_run:
            return result
        if head is None:
            remote.create(private)
        remote.make_branch()
        sha = head or self._head()
        if result.upload or result.delete:
            sent = [operation for path, operation in additions.items() if path in result.upload]
            remote.send(sent, progress)
            # The parent is the commit that was read above, so that a change made since then is not overwritten.
            sha, result.commit = remote.commit(sent, result.delete, message or kind.title(), sha)
        result.sha = sha
        kind.after(remote, sha)
        if verify:
            result.verified = self.verify(sha, additions)
            self.log(f"loaded back from the Hub at {sha[:12]}: {result.verified}")
        return result

    def _head(self) -> str:
        """Returns the head commit of the repository that was just created."""
        head, _ = self.remote.state()
        if head is None:
            raise OSError(f"{self.repo}: the Hub created the repository but does not find it; run the command again")
        return head

    def _foreign_files(self, published: Mapping[str, str], overwrite: bool) -> list[str]:
        """Returns the files to delete from a repository that holds something else.

        Raises:
            ValueError: the repository holds something else, and `overwrite` is False.
        """
        holds, name = kind_of(set(published)), self.kind.name
        if holds is None or (holds == name and self.kind.was_pushed_to(set(published))):
            return []
        if not overwrite:
            what = "files that echo4o did not write" if holds in ("other", name) else f"a {holds.removesuffix('s')}"
            raise ValueError(
                f"{self.repo} already holds {what}, and this is a {name.removesuffix('s')}: choose another name, or "
                "pass --overwrite to replace it (the old files stay in its history)"
            )
        return [path for path in published if path not in _KEPT_FILES]

    def _card(self, files: Mapping[str, Source], published: Mapping[str, Read]) -> bytes:
        """Returns the generated card with the hand-written text of the folder's card, else of the published card."""
        local = self.kind.folder / CARD
        before = local.read_text("utf-8") if local.is_file() else None
        if not before or not own_words(before):
            before = published[CARD]().decode() if CARD in published else before
        card = merged(self.kind.card(self.repo, files), before)
        validate(card, self.kind.name)
        return card.encode()

    def _plan(
        self,
        additions: Mapping[str, CommitOperationAdd],
        published: Mapping[str, str],
        foreign: list[str],
        private: bool | None,
        checked: str,
    ) -> PushResult:
        """Compares the files with the repository: which to upload, which to delete."""
        plan = PushResult(self.kind.name, self.repo, self.remote.address, private, checked)
        plan.next_command = self.kind.next_command(self.repo)
        for path, operation in additions.items():
            if path in published and same(operation, published[path]):
                plan.unchanged.append(path)
            else:
                plan.upload[path] = operation.upload_info.size
        outdated = foreign or [path for path in published if self.kind.replaces(path)]
        plan.delete = [path for path in outdated if path not in additions]
        return plan

    def verify(self, sha: str, additions: Mapping[str, CommitOperationAdd]) -> str:
        """Compares every file of the commit with the upload, and loads a commit that is small enough to download.

        Raises:
            OSError: a file differs, or the download does not load.
        """
        _, published = self.remote.state(sha)
        if wrong := [p for p, op in additions.items() if p not in published or not same(op, published[p])]:
            raise OSError(f"{self.repo} at {sha} differs from the upload: {', '.join(wrong[:5])}; push again")
        hashes = f"{len(additions)} files have the right hashes"
        if sum(op.upload_info.size for op in additions.values()) > SMALL_BYTES:
            return f"{hashes}; too large to download and load"
        with tempfile.TemporaryDirectory() as cache:
            folder = self.remote.fetch(sha, Path(cache), list(additions))
            if wrong := [path for path, op in additions.items() if not _arrived(folder / path, op)]:
                raise OSError(
                    f"{self.repo} at {sha}: the download of {', '.join(wrong[:5])} differs from the upload; push again"
                )
            try:
                return f"{hashes}; {self.kind.at(folder).check_published()}"
            except ValueError as error:
                raise OSError(f"{self.repo} at {sha} does not load: {error}") from error


def _arrived(path: Path, sent: CommitOperationAdd) -> bool:
    return path.is_file() and addition(path.name, path).upload_info.sha256 == sent.upload_info.sha256
