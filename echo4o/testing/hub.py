"""A Hugging Face Hub on 127.0.0.1, for tests of uploads and downloads of models, datasets and spaces.

    from echo4o.testing.hub import HubFault, LoopbackHub
    from echo4o.testing.processes import run_script

    with LoopbackHub() as hub:
        hub.add_folder("owner/model", folder)                          # stored without HTTP
        hub.inject(HubFault(path="model.safetensors", status=503))     # the next matching request fails
        run_script("...", env=hub.environment(tmp_path))               # code that uploads or downloads
        assert hub.repo("owner/model").files

The server speaks the LFS protocol (HF_HUB_DISABLE_XET=1) and serves ranges. It keeps commits, branches and tags, checks
tokens and write access, and refuses a commit whose parent is not the branch's head.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

from echo4o.testing.hub_store import HubFault, Repo, StoredFile
from echo4o.testing.processes import offline_environment

__all__ = ["HubFault", "LoopbackHub", "Repo", "StoredFile"]

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png", ".jpg", ".jpeg", ".tar", ".gz", ".arrow", ".zip", ".pt")
LFS_BYTES = 10_000_000
KINDS = ("models", "datasets", "spaces")
_DATE = "2025-01-01T00:00:00.000Z"
_REPO = r"([^/]+/[^/]+)"


class LoopbackHub:
    """The server and everything that it stores.

    Args:
        token: a token with the role "write".
        user: the name that the token belongs to.

    Attributes:
        url: the address, for HF_ENDPOINT.
        tokens: the role of each token, "write" or "read".
        owners: the namespaces in which `user` may write.
        repos: the repositories by (kind, name); kinds are "models", "datasets" and "spaces".
        requests: (method, path, bytes of the body, user agent) of every request.
    """

    def __init__(self, token: str = "hf_test", user: str = "ns"):
        self.token, self.user = token, user
        self.tokens, self.owners = {token: "write"}, {user}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int, str]] = []
        self.faults: list[HubFault] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "LoopbackHub":
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses only this Hub, with its caches under `home`."""
        return offline_environment(home) | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            **more,
        }

    def inject(self, fault: HubFault) -> None:
        """Make matching requests fail as `fault` describes."""
        with self.lock:
            self.faults.append(fault)

    def repo(self, name: str, kind: str = "models") -> Repo:
        """The repository of a name, such as "owner/model"."""
        return self.repos[(kind, name)]

    def create(self, name: str, kind: str = "models") -> Repo:
        """Create an empty repository, without HTTP."""
        with self.lock:
            repo = self.repos[(kind, name)] = Repo(kind, name)
            repo.commit("initial commit")
            return repo

    def add_folder(self, name: str, folder: Path, kind: str = "models", title: str = "Upload folder") -> str:
        """Store the files of a folder as one commit, without HTTP; returns the sha of the commit."""
        with self.lock:
            repo = self.repos.get((kind, name)) or self.create(name, kind)
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                repo.files[path.relative_to(folder).as_posix()] = self.store(path.name, path.read_bytes())
            return repo.commit(title)

    def store(self, name: str, data: bytes) -> StoredFile:
        """A file as the Hub keeps it: as an LFS object where its name or size asks for one."""
        if self.is_lfs(name, len(data)):
            digest = hashlib.sha256(data).hexdigest()
            self.blobs[digest] = data
            return self.pointer(digest)
        return StoredFile(data, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def pointer(self, digest: str) -> StoredFile:
        data = self.blobs[digest]
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
        return StoredFile(data, hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest(), digest)

    @staticmethod
    def is_lfs(name: str, size: int) -> bool:
        return size > LFS_BYTES or name.endswith(LFS_SUFFIXES)

    def take_fault(self, method: str, path: str) -> HubFault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    if fault.after:
                        fault.after -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer: no waiting for acknowledgements
    disable_nagle_algorithm = True
    hub: LoopbackHub
    cut: float | None = None
    lost = False

    # --- requests and responses ---

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        body = self.read_body()
        parts = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(parts.path), urllib.parse.parse_qs(parts.query)
        with self.hub.lock:
            agent = self.headers.get("User-Agent", "")
            self.hub.requests.append((self.command, self.path, len(body), agent))
        fault = self.hub.take_fault(self.command, self.path)
        self.cut, self.lost = (fault.cut, fault.lost) if fault else (None, False)
        if fault:
            time.sleep(fault.delay)
            if fault.meanwhile:
                fault.meanwhile()
            if fault.drop:
                self.close_connection = True
                return
            if fault.status:
                self.send(fault.status, {"error": "injected"}, fault.headers)
                return
        if refusal := self.refusal(path, body):
            self.fail(*refusal)
            return
        for pattern, handler in _ROUTES:
            if match := re.fullmatch(pattern, path):
                with self.hub.lock:
                    handler(self, *match.groups(), body=body, query=query)
                return
        self.fail(404, "NotHandled")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, code: int, body: Any = b"", headers: dict | None = None, kind: str = "application/json") -> None:
        if self.lost:
            self.close_connection = True
            return
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            body = body[: int(len(body) * self.cut)]
            self.close_connection = True
        self.wfile.write(body)

    def fail(self, code: int, what: str, **headers: str | None) -> None:
        self.send(
            code,
            {"error": what},
            {"X-Error-Code": what, "X-Error-Message": what, **{name: value or "" for name, value in headers.items()}},
        )

    # --- accounts and repositories ---

    def refusal(self, path: str, body: bytes) -> tuple[int, str] | None:
        """The status and error code for a missing, unknown or insufficient token; None where the request is allowed."""
        role = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if self.headers.get("Authorization") and role is None:
            return 401, "InvalidCredentials"
        match = re.match(rf"/(?:api/)?(?:({'|'.join(KINDS)})/)?{_REPO}(?:\.git)?(?:/|$)", path)
        name = f"{json.loads(body).get('organization') or self.hub.user}/x" if path == "/api/repos/create" else ""
        if match and (match[1] or "models", match[2]) in self.hub.repos:
            repo = self.hub.repos[match[1] or "models", match[2]]
            if repo.private and role is None:
                return 401, "RepoNotFound"
            name = repo.name
        if not name or self.command in ("GET", "HEAD") or path.endswith(("/paths-info", "/validate-yaml")):
            return None
        if "/paths-info/" in path:
            return None
        if role is None:
            return 401, "InvalidCredentials"
        return None if role == "write" and name.split("/")[0] in self.hub.owners else (403, "Forbidden")

    def whoami(self, body, query) -> None:
        auth = {"accessToken": {"role": "write", "displayName": "test"}}
        self.send(200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": auth})

    def validate_yaml(self, body, query) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def create_repo(self, body, query) -> None:
        asked = json.loads(body)
        kind = (asked.get("type") or "model") + "s"
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            self.send(409, {"error": "You already created this repo", "url": url})
            return
        self.hub.create(name, kind).private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.send(200, {"url": url, "id": name, "name": name})

    def delete_repo(self, body, query) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        gone = self.hub.repos.pop(((asked.get("type") or "model") + "s", name), None)
        self.send(200, {}) if gone else self.fail(404, "RepoNotFound")

    def info(self, kind, name, revision=None, *, body, query) -> None:
        repo = self.hub.repos.get((kind, name))
        files = repo and repo.at(revision)
        if not repo:
            self.fail(404, "RepoNotFound")
        elif files is None:
            self.fail(404, "RevisionNotFound")
        else:
            siblings = [{"rfilename": p, "size": len(f.data), "blobId": f.oid} for p, f in files.items()]
            facts = {"id": name, "modelId": name, "_id": "x", "sha": repo.resolve(revision), "siblings": siblings}
            state = {"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0}
            self.send(200, facts | state | {"likes": 0, "lastModified": _DATE, "createdAt": _DATE})

    def verb(self, kind, name, verb, rest, *, body, query) -> None:
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            self.fail(404, "RepoNotFound")
            return
        _VERBS[verb](self, repo, rest or "", body, query)

    # --- uploads ---

    def do_preupload(self, repo: Repo, rest: str, body: bytes, query) -> None:
        answers = []
        for file in json.loads(body)["files"]:
            known = repo.files.get(file["path"])
            mode = "lfs" if self.hub.is_lfs(file["path"], file["size"]) else "regular"
            oid = known and known.oid
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def lfs_batch(self, kind, name, *, body, query) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                upload, verify = f"{self.hub.url}/_lfs/{wanted['oid']}", f"{self.hub.url}/_verify"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs_put(self, digest, *, body, query) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            self.fail(400, "WrongDigest")
            return
        self.hub.blobs[digest] = body
        self.send(200)

    def lfs_verify(self, *, body, query) -> None:
        self.send(200, {})

    def do_commit(self, repo: Repo, rest: str, body: bytes, query) -> None:
        branch = rest or "main"
        operations = [json.loads(line) for line in filter(None, (part.strip() for part in body.splitlines()))]
        header = next((o["value"] for o in operations if o["key"] == "header"), {})
        if header.get("parentCommit") not in (None, repo.resolve(branch)):
            self.fail(412, "A commit has happened since")
            return
        files = repo.files if branch == "main" else dict(repo.at(branch) or {})
        for operation in operations:
            self.apply(files, operation["key"], operation["value"])
        sha = repo.commit(header.get("summary", ""), branch, files)
        url = f"{self.hub.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.name}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, files: dict[str, StoredFile], key: str, value: dict) -> None:
        if key == "file":
            data = base64.b64decode(value["content"])
            files[value["path"]] = StoredFile(data, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
        elif key == "lfsFile":
            files[value["path"]] = self.hub.pointer(value["oid"])
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            for gone in [p for p in files if p.startswith(value["path"].rstrip("/") + "/")]:
                del files[gone]

    def do_tag(self, repo: Repo, rest: str, body: bytes, query) -> None:
        if self.command == "DELETE":
            self.send(200, {}) if repo.tags.pop(rest, None) else self.fail(404, "RevisionNotFound")
            return
        if json.loads(body)["tag"] in repo.tags:
            self.fail(409, "Tag reference exists already")
            return
        repo.tags[json.loads(body)["tag"]] = repo.resolve(rest) or ""
        self.send(200, {})

    def do_branch(self, repo: Repo, rest: str, body: bytes, query) -> None:
        if rest in repo.branches:
            self.fail(409, "Reference already exists")
            return
        start = json.loads(body or b"{}").get("startingPoint")
        repo.branches[rest] = repo.resolve(start) or ""
        self.send(200, {})

    # --- listings and downloads ---

    def do_revision(self, repo: Repo, rest: str, body: bytes, query) -> None:
        self.info(repo.kind, repo.name, rest, body=body, query=query)

    def do_refs(self, repo: Repo, rest: str, body: bytes, query) -> None:
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": s} for n, s in repo.tags.items()]
        self.send(200, {"branches": heads, "converts": [], "tags": tags})

    def do_commits(self, repo: Repo, rest: str, body: bytes, query) -> None:
        listed = reversed(repo.commits)
        self.send(200, [{"id": s, "title": t, "message": "", "date": _DATE, "authors": []} for s, t, _ in listed])

    def do_tree(self, repo: Repo, rest: str, body: bytes, query) -> None:
        revision, _, folder = rest.partition("/")
        files = repo.at(revision)
        if files is None:
            self.fail(404, "RevisionNotFound")
            return
        prefix = folder + "/" if folder else ""
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict] = {}
        for path in sorted(p for p in files if p.startswith(prefix)):
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = files[path].entry(path)
        if folder and not entries:
            self.fail(404, "EntryNotFound")
        else:
            self.send(200, list(entries.values()))

    def do_paths_info(self, repo: Repo, rest: str, body: bytes, query) -> None:
        files = repo.at(rest)
        if files is None:
            self.fail(404, "RevisionNotFound")
            return
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body) if is_json else urllib.parse.parse_qs(body.decode())
        entries = []
        for path in asked["paths"]:
            if path in files:
                entries.append(files[path].entry(path))
            elif any(p.startswith(path.rstrip("/") + "/") for p in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.send(200, entries)

    def resolve(self, kind, name, revision, path, *, body, query) -> None:
        repo = self.hub.repos.get((kind or "models", name))
        files = repo and repo.at(revision)
        if not repo:
            self.fail(404, "RepoNotFound")
        elif files is None:
            self.fail(404, "RevisionNotFound")
        elif path not in files:
            self.fail(404, "EntryNotFound", **{"X-Repo-Commit": repo.resolve(revision)})
        else:
            self.send_file(files[path], repo.resolve(revision))

    def send_file(self, file: StoredFile, sha: str | None) -> None:
        headers = {"ETag": f'"{file.lfs or file.oid}"', "X-Repo-Commit": sha or "", "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.lfs}"'}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not span:
            self.send(200, file.data, headers, "application/octet-stream")
            return
        first, last = int(span[1]), min(int(span[2] or len(file.data) - 1), len(file.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        self.send(206, file.data[first : last + 1], headers, "application/octet-stream")


_VERBS = {
    "preupload": _Handler.do_preupload,
    "commit": _Handler.do_commit,
    "tree": _Handler.do_tree,
    "paths-info": _Handler.do_paths_info,
    "refs": _Handler.do_refs,
    "revision": _Handler.do_revision,
    "commits": _Handler.do_commits,
    "branch": _Handler.do_branch,
    "tag": _Handler.do_tag,
}
_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create_repo),
    (r"/api/repos/delete", _Handler.delete_repo),
    (rf"/(?:(datasets|spaces|models)/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/_lfs/(\w+)", _Handler.lfs_put),
    (r"/_verify", _Handler.lfs_verify),
    (rf"/api/({'|'.join(KINDS)})/{_REPO}/({'|'.join(_VERBS)})(?:/(.*))?", _Handler.verb),
    (rf"/api/({'|'.join(KINDS)})/{_REPO}", _Handler.info),
    (rf"/(?:(datasets|spaces)/)?{_REPO}/(?:resolve|raw)/([^/]+)/(.+)", _Handler.resolve),
]
