"""The loopback Hub itself: what real clients need of it, and the faults that later tests inject."""

import urllib.error
import urllib.request

import pytest

from echo4o.testing.hub import HubFault, LoopbackHub
from echo4o.testing.processes import run_script

CLIENT = """
import datasets
import huggingface_hub as hub
import pathlib
import sys
home = pathlib.Path(sys.argv[1])
api = hub.HfApi()
(home / "folder/sub").mkdir(parents=True)
(home / "folder/a.txt").write_text("text")
(home / "folder/sub/b.bin").write_bytes(b"x" * 100_000)
for kind, extra in (("model", {}), ("dataset", {}), ("space", {"space_sdk": "gradio"})):
    api.create_repo("ns/thing", repo_type=kind, **extra)
    api.create_repo("ns/thing", repo_type=kind, exist_ok=True, **extra)
    first = api.upload_folder(repo_id="ns/thing", folder_path=home / "folder", repo_type=kind).oid
    api.create_tag("ns/thing", tag="v1", repo_type=kind)
    api.upload_file(path_or_fileobj=b"new", path_in_repo="a.txt", repo_id="ns/thing", repo_type=kind)
    api.delete_file("sub/b.bin", "ns/thing", repo_type=kind)
    assert api.list_repo_files("ns/thing", repo_type=kind) == ["a.txt"]
    for revision in (first, "v1"):
        got = pathlib.Path(hub.snapshot_download("ns/thing", repo_type=kind, revision=revision))
        assert (got / "a.txt").read_text() == "text" and (got / "sub/b.bin").read_bytes() == b"x" * 100_000
    assert open(hub.hf_hub_download("ns/thing", "a.txt", repo_type=kind)).read() == "new"
rows = datasets.Dataset.from_dict({"id": ["a", "b"], "n": [1, 2]})
rows.push_to_hub("ns/rows", "some")
assert datasets.load_dataset("ns/rows", "some", split="train")["n"][:] == [1, 2]
streamed = datasets.load_dataset("ns/rows", "some", split="train", streaming=True)
assert [row["id"] for row in streamed] == ["a", "b"]
"""


@pytest.mark.long
def test_clients_find_what_they_stored(tmp_path):
    with LoopbackHub() as hub:
        run_script(CLIENT, tmp_path, env=hub.environment(tmp_path))
        assert {kind for kind, _ in hub.repos} == {"models", "datasets", "spaces"}
        assert hub.requests and all(size >= 0 for _, _, size, _ in hub.requests)


def test_faults_hit_as_often_as_asked(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    with LoopbackHub() as hub:
        hub.add_folder("ns/thing", tmp_path)

        def get(path: str = "/ns/thing/resolve/main/a.txt") -> bytes:
            with urllib.request.urlopen(hub.url + path, timeout=10) as answer:
                return answer.read()

        hub.inject(HubFault(path="a.txt", status=503, times=2))
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError, match="503"):
                get()
        hub.inject(HubFault(method="GET", drop=True))
        with pytest.raises(OSError):
            get()
        hub.inject(HubFault(cut=0.5))
        with pytest.raises(Exception, match="IncompleteRead"):
            get()
        hub.inject(HubFault(path="elsewhere", status=500))
        assert get() == b"0123456789"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/ns/thing/resolve/main/b.txt")
