"""Publishes a built dataset to the Hub: shards first, out of sight, then one commit that makes all of it loadable.

Broken off, the same call goes on: what the Hub has already is not sent again. Of a repository that holds other
configurations, these stay as they are.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from echo4o.dataset_scripts.card import make_card
from echo4o.dataset_scripts.files import to_json
from echo4o.dataset_scripts.manifest import MANIFEST, check_shards, listed_shards, read_manifest

CARD = "README.md"
SIDE_FILES = ("rejected.jsonl", "remarks.jsonl")
_TRIES, _AT_ONCE = 6, 10


@dataclass
class Publication:
    """What is, or would be, done to a repository."""

    repo: str
    private: bool | None  # None: the repository exists and keeps its visibility
    upload: dict[str, int] = field(default_factory=dict)  # path -> bytes
    unchanged: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    commit: str | None = None  # the address of the commit

    def __str__(self) -> str:
        visibility = {None: "keeps its visibility", True: "is new and private", False: "is new and public"}
        size = sum(self.upload.values()) / 1e6
        return (
            f"{self.repo} {visibility[self.private]}: {len(self.upload)} files ({size:,.1f} MB) to upload, "
            f"{len(self.unchanged)} there already, {len(self.delete)} to remove"
        )


def publish(
    folder: str | Path,
    repo: str,
    configurations: Iterable[str] | None = None,
    *,
    private: bool = True,
    dry_run: bool = False,
    api: HfApi | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    pause: float = 1.0,
) -> Publication:
    """Publish a folder that `build` made, all of it or some configurations.

    Args:
        private: visibility of a new repository; one that exists keeps its own.
        dry_run: only say what would be done.
        progress: told (shards done, shards in all).
        pause: seconds before a failed request is tried again; it doubles each time.

    Raises:
        ValueError: a shard differs from the manifest, or a configuration is not there.
        OSError: the Hub refuses or does not answer; the same call goes on later.
    """
    folder, api = Path(folder), api or HfApi()
    manifest = _select(read_manifest(folder), configurations)
    wrong = [line for line in check_shards(folder, manifest) if not line.endswith("does not list it")]
    if wrong:
        raise ValueError(f"{folder} is not as it was built: {'; '.join(wrong[:3])}. Build it again.")
    remote = _Remote(api, repo, pause)
    head, there = remote.state()
    texts = _texts(folder, remote, manifest, there, repo)
    plan = _plan(repo, manifest, texts, there, None if head else private)
    if dry_run or not (plan.upload or plan.delete):
        return plan
    if not head:
        remote.call(api.create_repo, repo, repo_type="dataset", private=private, exist_ok=True)
        head, there = remote.state()
    shards = [_addition(folder, s) for _, s in listed_shards(manifest) if s["file"] in plan.upload]
    for start in range(0, len(shards), _AT_ONCE):
        batch = shards[start : start + _AT_ONCE]
        remote.call(api.preupload_lfs_files, repo, batch, repo_type="dataset", free_memory=False)
        progress(min(start + _AT_ONCE, len(shards)), len(shards))
    operations = [*shards, *(CommitOperationAdd(p, t) for p, t in texts.items() if p in plan.upload)]
    operations += [CommitOperationDelete(path) for path in plan.delete]
    plan.commit = remote.commit(operations, manifest, head, lambda now: _is_there(manifest, texts, now))
    return plan


def _select(manifest: dict, configurations: Iterable[str] | None) -> dict:
    chosen = list(configurations or manifest["configurations"])
    if unknown := [name for name in chosen if name not in manifest["configurations"]]:
        raise ValueError(
            f"the folder has no configuration {unknown[0]!r}; it has {', '.join(manifest['configurations'])}"
        )
    kept = {name: facts for name, facts in manifest["configurations"].items() if name in chosen}
    rejected = {name: reasons for name, reasons in manifest["rejected"].items() if name in chosen}
    return _count(manifest | {"configurations": kept, "rejected": rejected})


def _count(manifest: dict) -> dict:
    accepted = sum(facts["rows"] for facts in manifest["configurations"].values())
    rejected = sum(sum(reasons.values()) for reasons in manifest["rejected"].values())
    return manifest | {"rows": {"given": accepted + rejected, "accepted": accepted, "rejected": rejected}}


def _texts(folder: Path, remote: "_Remote", manifest: dict, there: dict, repo: str) -> dict[str, bytes]:
    """The small files of the repository, merged with what it holds of other configurations."""
    whole = manifest
    if MANIFEST in there:
        before = json.loads(remote.read(MANIFEST))
        whole = _count(
            manifest
            | {
                "configurations": before["configurations"] | manifest["configurations"],
                "rejected": before["rejected"] | manifest["rejected"],
            }
        )
    card = make_card(whole, remote.read(CARD).decode() if CARD in there else None, repo)
    texts = {CARD: str(card).encode(), MANIFEST: to_json(whole).encode()}
    for name in SIDE_FILES:
        lines = (folder / name).read_bytes().splitlines(keepends=True) if (folder / name).exists() else []
        mine = [line for line in lines if json.loads(line).get("configuration") in manifest["configurations"]]
        old = remote.read(name).splitlines(keepends=True) if name in there else []
        kept = [line for line in old if json.loads(line).get("configuration") not in manifest["configurations"]]
        texts[name] = b"".join(kept + mine)
    return texts


def _plan(repo: str, manifest: dict, texts: dict[str, bytes], there: dict, private: bool | None) -> Publication:
    plan = Publication(repo, private)
    wanted = {s["file"]: (s["bytes"], s["sha256"]) for _, s in listed_shards(manifest)}
    wanted |= {path: (len(text), _git_id(text)) for path, text in texts.items()}
    for path, (size, digest) in wanted.items():
        if there.get(path) == digest:
            plan.unchanged.append(path)
        else:
            plan.upload[path] = size
    ours = tuple(f"data/{name}/" for name in manifest["configurations"])
    plan.delete = [path for path in there if path.startswith(ours) and path not in wanted]
    return plan


def _is_there(manifest: dict, texts: dict[str, bytes], there: dict) -> bool:
    shards = all(there.get(s["file"]) == s["sha256"] for _, s in listed_shards(manifest))
    return shards and all(there.get(path) == _git_id(text) for path, text in texts.items())


def _addition(folder: Path, shard: dict) -> CommitOperationAdd:
    operation = CommitOperationAdd(shard["file"], folder / shard["file"])
    operation.upload_info.sha256 = bytes.fromhex(shard["sha256"])  # just checked: saves reading the file again
    return operation


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Remote:
    """A dataset repository, asked again when it does not answer."""

    def __init__(self, api: HfApi, repo: str, pause: float):
        self.api, self.repo, self.pause = api, repo, pause

    def state(self) -> tuple[str | None, dict[str, str]]:
        """The head commit (None: no such repository) and what names the content of each file."""
        try:
            head = self.call(self.api.repo_info, self.repo, repo_type="dataset").sha
        except RepositoryNotFoundError:
            return None, {}
        files = self.call(lambda: list(self.api.list_repo_tree(self.repo, recursive=True, repo_type="dataset")))
        return head, {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in files if hasattr(f, "blob_id")}

    def read(self, path: str) -> bytes:
        local = self.call(self.api.hf_hub_download, self.repo, path, repo_type="dataset")
        return Path(local).read_bytes()

    def commit(self, operations: list, manifest: dict, head: str, is_there: Callable[[dict], bool]) -> str:
        rows = manifest["rows"]["accepted"]
        title = f"Echo-4o-Image: {', '.join(manifest['configurations'])} ({rows:,} rows)"

        def once() -> str:
            try:
                return self.api.create_commit(
                    self.repo, operations, commit_message=title, repo_type="dataset", parent_commit=head
                ).commit_url
            except Exception:
                # The answer may have been lost on its way back: then it is there.
                now, files = self.state()
                if now != head and is_there(files):
                    return f"{self.api.endpoint}/datasets/{self.repo}/commit/{now}"
                raise

        return self.call(once)

    def call(self, function, *arguments, **options):
        for attempt in range(_TRIES):
            try:
                return function(*arguments, **options)
            except (RepositoryNotFoundError, EntryNotFoundError):
                raise
            except Exception as error:
                if not _passes(error) or attempt == _TRIES - 1:
                    if isinstance(error, HfHubHTTPError) or _passes(error):
                        raise OSError(f"{self.repo}: {_first_line(error)}; run it again to go on") from error
                    raise
                time.sleep(max(self.pause * 2**attempt, _retry_after(error)))


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a moment: too many requests, trouble at the server or on the way."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library.startswith(("httpx", "httpcore", "requests"))


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return min(float(value), 300.0) if value.isdigit() else 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
