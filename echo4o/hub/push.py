"""The one way to the Hub: look at a folder, refuse what must not go, send it, load it back.

done = push("runs/lora", "owner/name", said=Said(base_model="owner/base"))
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from echo4o.common.hub_names import require_repository_name
from echo4o.common.sizes import format_bytes
from echo4o.hub.kinds.base import CARD, SMALL_BYTES, Kind, Read, Said
from echo4o.hub.recognise import Found, kind_of, recognise
from echo4o.hub.remote import Hub, Remote, Source, addition, same
from echo4o.hub.safety import left_out, list_files, require_safe
from echo4o.model_cards.merge import merged, own_words
from echo4o.model_cards.schema import validate

_KEPT = (".gitattributes",)


@dataclass
class Push:
    """What is, or would be, done to a repository."""

    kind: str
    repo: str
    address: str
    private: bool | None  # None: the repository exists and keeps its visibility
    checked: str  # before it was sent
    upload: dict[str, int] = field(default_factory=dict)  # path -> bytes
    unchanged: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    sha: str | None = None  # the commit that holds all of it; None after a dry run
    commit: str | None = None  # the address of the commit that was made; None when there was nothing to do
    verified: str | None = None
    next_command: str = ""

    def __str__(self) -> str:
        visibility = {None: "keeps its visibility", True: "is new and private", False: "is new and public"}
        return f"{self.repo} {visibility[self.private]}: {self._amounts('to upload', 'to remove')}"

    @property
    def told(self) -> str:
        """What was done."""
        new = {None: "", True: ", new and private", False: ", new and public"}[self.private]
        return f"published as {self.repo}{new}: {self._amounts('sent', 'removed')}"

    def _amounts(self, sent: str, removed: str) -> str:
        size = format_bytes(sum(self.upload.values()))
        return (
            f"{len(self.upload)} files ({size}) {sent}, {len(self.unchanged)} there already, "
            f"{len(self.delete)} {removed}"
        )


def push(
    target: str | Path,
    repo: str,
    *,
    said: Said | None = None,
    private: bool = True,
    branch: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    api: HfApi | None = None,
    tell: Callable[[str], object] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    pause: float = 1.0,
) -> Push:
    """Publish a folder: a pipeline, an adapter, a dataset, a benchmark's result, a metric, or a finished run.

    Args:
        target: the folder, or the name of a metric that comes along.
        said: what its card needs and no file says.
        private: visibility of a new repository; one that exists keeps its own.
        branch: push to this branch instead of `main`; it is made if it is missing.
        message: of the commit.
        dry_run: only say what would be done.
        overwrite: replace a repository that holds something else; its history keeps it.
        verify: load the result back from the Hub, at its commit, into a fresh cache.
        tell: told what is going on, in sentences.
        progress: told (files done, files in all).
        pause: seconds before a failed request is tried again; it doubles each time.

    Raises:
        ValueError: a folder, a name, or a card that must not be published; nothing was sent.
        OSError: the Hub refuses or does not answer; the same call goes on later.
    """
    require_repository_name(repo)
    found = recognise(target)
    tell(found.told)
    with tempfile.TemporaryDirectory() as cache:
        return _Pushing(found, repo, said or Said(), api or HfApi(), branch, pause, tell, Path(cache)).run(
            private, message, dry_run, overwrite, verify, progress
        )


class _Pushing:
    """One push under way."""

    def __init__(self, found: Found, repo: str, said: Said, api: HfApi, branch, pause: float, tell, cache: Path):
        self.tell, self.hub = tell, Hub(api, cache, pause, tell)
        self.kind: Kind = found.kind(found.folder, said, found.run, self.hub)
        self.remote = Remote(api, repo, self.kind.repo_type, branch, pause, tell)
        self.repo = repo

    def run(self, private: bool, message, dry_run: bool, overwrite: bool, verify: bool, progress) -> Push:
        kind, remote = self.kind, self.remote
        kind.check_name(self.repo)
        looked_at = list_files(kind.folder)
        require_safe(looked_at)
        if hidden := left_out(kind.folder):
            self.tell(f"{hidden} hidden files and caches stay here")
        checked = kind.check()
        self.tell(f"checked: {checked}")
        if not dry_run:
            remote.require_token()
        head, there = remote.state()
        strangers = self._strangers(there, overwrite)
        readable = {path: partial(remote.read, path, head) for path in there if not strangers}
        files = kind.files(readable)
        files[CARD] = self._card(files, readable)
        require_safe({path: source for path, source in files.items() if looked_at.get(path) != source})
        hashes = kind.hashes()
        additions = {path: addition(path, source, hashes.get(path)) for path, source in sorted(files.items())}
        done = self._plan(additions, there, strangers, None if head else private, checked)
        if dry_run:
            return done
        if head is None:
            remote.create(private)
        remote.make_branch()
        if done.upload or done.delete:
            sent = [operation for path, operation in additions.items() if path in done.upload]
            remote.send(sent, progress)
            # On top of what was looked at: what somebody else changed since then is not written over.
            head = head or remote.state()[0]
            done.sha, done.commit = remote.commit(sent, done.delete, message or kind.title(), head)
        else:
            done.sha = head
        kind.after(remote, done.sha)
        if verify:
            done.verified = self.verify(done.sha, additions)
            self.tell(f"loaded back from the Hub at {done.sha[:12]}: {done.verified}")
        return done

    def _strangers(self, there: Mapping[str, str], overwrite: bool) -> list[str]:
        """Files of something else that lies in the repository, which go with --overwrite."""
        holds, name = kind_of(set(there)), self.kind.name
        if holds is None or (holds == name and self.kind.was_pushed_to(set(there))):
            return []
        if not overwrite:
            what = "files that are none of echo4o's" if holds in ("other", name) else f"a {holds.removesuffix('s')}"
            raise ValueError(
                f"{self.repo} already holds {what}, and this is a {name.removesuffix('s')}: choose another name, or "
                "give --overwrite to replace it (its history keeps it)"
            )
        return [path for path in there if path not in _KEPT]

    def _card(self, files: Mapping[str, Source], there: Mapping[str, Read]) -> bytes:
        """The card, joined with what a person wrote in the folder's, else in the repository's."""
        local = self.kind.folder / CARD
        mine = local.read_text("utf-8") if local.is_file() else None
        if not mine or not own_words(mine):
            mine = there[CARD]().decode() if CARD in there else mine
        card = merged(self.kind.card(self.repo, files), mine)
        validate(card, self.kind.name)
        return card.encode()

    def _plan(self, additions: Mapping[str, CommitOperationAdd], there, strangers, private, checked: str) -> Push:
        plan = Push(self.kind.name, self.repo, self.remote.address, private, checked)
        plan.next_command = self.kind.next_command(self.repo)
        for path, operation in additions.items():
            if path in there and same(operation, there[path]):
                plan.unchanged.append(path)
            else:
                plan.upload[path] = operation.upload_info.size
        gone = strangers or [path for path in there if self.kind.replaces(path)]
        plan.delete = [path for path in gone if path not in additions]
        return plan

    def verify(self, sha: str, additions: Mapping[str, CommitOperationAdd]) -> str:
        """Compare every file of the commit with what was sent, and load what is not too large to be fetched.

        Raises:
            OSError: it is not what was sent, or does not load.
        """
        _, there = self.remote.state(sha)
        if wrong := [path for path, op in additions.items() if path not in there or not same(op, there[path])]:
            raise OSError(f"{self.repo} at {sha} is not what was sent: {', '.join(wrong[:5])}; push again")
        hashes = f"{len(additions)} files have the right hashes"
        if sum(op.upload_info.size for op in additions.values()) > SMALL_BYTES:
            return f"{hashes}; too large to be fetched and loaded"
        with tempfile.TemporaryDirectory() as cache:
            folder = self.remote.fetch(sha, Path(cache), list(additions))
            if wrong := [path for path, op in additions.items() if not _arrived(folder / path, op)]:
                raise OSError(f"{self.repo} at {sha}: {', '.join(wrong[:5])} came back altered; push again")
            try:
                return f"{hashes}; {self.kind.at(folder).check_published()}"
            except ValueError as error:
                raise OSError(f"{self.repo} at {sha} does not load: {error}") from error


def _arrived(path: Path, sent: CommitOperationAdd) -> bool:
    return path.is_file() and addition(path.name, path).upload_info.sha256 == sent.upload_info.sha256
