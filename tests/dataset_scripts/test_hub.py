"""The Hub: publishing, the three meanings of load_dataset("echo-4o-image"), reading the published layout from there."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from echo4o.dataset_scripts import bare_name
from echo4o.dataset_scripts.build import BuildOptions, build
from echo4o.hub.kinds.base import PushDetails
from echo4o.hub.push import push
from echo4o.testing.hub import HubFault, LoopbackHub
from echo4o.testing.processes import offline_environment, run_script
from tests.dataset_scripts.layout import SURREAL, picture, row, small_release, write_rows, write_tar

REPO = "ns/echo-4o-image"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    small_release(root / "Echo-4o-Image", rows=8)
    with open(root / "Echo-4o-Image" / SURREAL / "rows.jsonl", "a") as stream:
        stream.write(json.dumps(row(99)) + "\n")
    build(root / "Echo-4o-Image", root / "echo-4o-image", BuildOptions(shard_bytes=5000, row_group_bytes=2500))
    return root


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=hub.token)


def send(folder, api, *names, **options):
    details = PushDetails(configurations=names)
    return push(folder, REPO, details=details, api=api, pause=0.01, **{"verify": False, **options})


def listing(hub) -> dict[str, bytes]:
    return {path: file.data for path, file in hub.repo(REPO, "datasets").files.items()}


def test_publishing_makes_one_commit_and_a_second_time_nothing(folders, hub, api):
    done = send(folders / "echo-4o-image", api)
    repo = hub.repo(REPO, "datasets")
    assert repo.private and len(repo.commits) == 2 and done.commit
    expected = {
        p.relative_to(folders / "echo-4o-image").as_posix(): p.read_bytes()
        for p in (folders / "echo-4o-image").rglob("*")
        if p.is_file()
    }
    got = listing(hub)
    assert b'load_dataset("ns/echo-4o-image"' in got.pop("README.md") and expected.pop("README.md")
    assert got == expected
    again = send(folders / "echo-4o-image", api)
    assert again.commit is None and not again.upload and len(repo.commits) == 2


def test_a_dry_run_touches_nothing(folders, hub, api):
    plan = send(folders / "echo-4o-image", api, dry_run=True)
    assert (REPO in str(plan)) and "is new and private" in str(plan) and len(plan.upload) > 10
    assert not hub.repos and all(method in ("GET", "HEAD") for method, *_ in hub.requests)


def test_configurations_come_one_by_one(folders, hub, api, tmp_path):
    send(folders / "echo-4o-image", api, "multi_reference", private=False)
    assert not hub.repo(REPO, "datasets").private
    first = listing(hub)
    assert not any("surreal" in path for path in first) and b"surreal_fantasy" not in first["README.md"]
    assert first["rejected.jsonl"] == b""
    text = first["README.md"].decode() + "\nWords of a person.\n"
    hub.repo(REPO, "datasets").files["README.md"] = hub.store("README.md", text.encode())
    hub.repo(REPO, "datasets").commit("words")
    done = send(folders / "echo-4o-image", api, "surreal_fantasy", verify=True)
    assert done.verified.endswith("unchanged since they were built, and surreal_fantasy can be read")
    second = listing(hub)
    assert {p: d for p, d in second.items() if "multi" in p} == {p: d for p, d in first.items() if "multi" in p}
    manifest = json.loads(second["manifest.json"])
    assert sorted(manifest["configurations"]) == ["multi_reference", "surreal_fantasy"]
    assert manifest["rows"] == {"given": 17, "accepted": 16, "rejected": 1}
    card = second["README.md"].decode()
    assert card.count("Words of a person.") == 1 and card.count("# Echo-4o-Image") == 1
    assert "config_name: surreal_fantasy" in card and "config_name: multi_reference" in card
    assert b"row 99" in second["rejected.jsonl"]


def test_shards_of_an_older_version_go_in_the_same_commit(folders, hub, api):
    send(folders / "echo-4o-image", api)
    repo = hub.repo(REPO, "datasets")
    repo.files["data/surreal_fantasy/train-00099.parquet"] = hub.store("x.parquet", b"old")
    repo.files["data/mine/other.parquet"] = hub.store("x.parquet", b"mine")
    repo.commit("older")
    done = send(folders / "echo-4o-image", api)
    assert done.delete == ["data/surreal_fantasy/train-00099.parquet"]
    assert "data/mine/other.parquet" in repo.files and len(repo.commits) == 4


TROUBLE = [
    HubFault(path="/api/repos/create", status=500),
    HubFault(path="/preupload/", status=429),
    HubFault(path="/info/lfs/objects/batch", status=503, times=2),
    HubFault(path="/_lfs/", status=500, times=2),
    HubFault(path="/_lfs/", drop=True),
    HubFault(path="/commit/", method="POST", status=500, times=2),
    HubFault(path="/commit/", method="POST", drop=True),
    HubFault(path="/revision/|/api/datasets/", method="GET", status=429, times=2),
    HubFault(path="/tree/", status=502),
]


@pytest.mark.parametrize("fault", TROUBLE, ids=lambda f: f"{f.path} {f.status or 'dropped'}")
def test_trouble_that_passes_is_waited_out(folders, hub, api, fault, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.inject(fault)
    send(folders / "echo-4o-image", api)
    assert not fault.times and len(hub.repo(REPO, "datasets").commits) == 2


def test_an_answer_lost_after_the_commit_does_not_commit_twice(folders, hub, api, monkeypatch):
    create = api.create_commit

    def lost(*arguments, **options):
        create(*arguments, **options)
        monkeypatch.setattr(api, "create_commit", create)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(api, "create_commit", lost)
    done = send(folders / "echo-4o-image", api)
    assert done.commit and len(hub.repo(REPO, "datasets").commits) == 2


def test_an_interrupted_run_continues_with_what_is_missing(folders, hub, api, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("echo4o.hub.remote._BATCH", 1)
    hub.inject(HubFault(path="/commit/", method="POST", status=500, times=1000))
    with pytest.raises(OSError, match="run the command again to resume"):
        send(folders / "echo-4o-image", api)
    repo = hub.repo(REPO, "datasets")
    assert not repo.files and len(repo.commits) == 1, "nothing is half visible"
    hub.faults.clear()
    before = len(hub.requests)
    send(folders / "echo-4o-image", api)
    sent = [size for method, path, size, _ in hub.requests[before:] if method == "PUT"]
    assert not sent and len(repo.commits) == 2


def test_an_altered_folder_is_not_published(folders, hub, api, tmp_path):
    shutil.copytree(folders / "echo-4o-image", tmp_path / "copy")
    shard = next((tmp_path / "copy" / "data").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="was changed after it was built: .* its bytes were altered"):
        send(tmp_path / "copy", api)
    with pytest.raises(ValueError, match="has no configuration 'poems'; it has surreal_fantasy"):
        send(folders / "echo-4o-image", api, "poems")
    assert not hub.repos


READ = """
import sys
from echo4o.dataset_scripts.upstream import ReadingReport, read_upstream
report = ReadingReport()
rows = list(read_upstream("hf://datasets/ns/Echo-4o-Image", report=report))
assert str(report) == "25 rows given, 24 accepted, 1 rejected (1 missing image)", report
"""


@pytest.mark.long
def test_reading_from_the_hub_survives_its_moods(folders, hub, tmp_path):
    hub.add_folder("ns/Echo-4o-Image", folders / "Echo-4o-Image", "datasets")
    hub.inject(HubFault(path="0-3.tar.gz", method="GET", cut=0.5))
    hub.inject(HubFault(path="3-6.tar.gz", method="GET", status=500))
    hub.inject(HubFault(path="6-9.tar.gz", method="GET", status=429))
    hub.inject(HubFault(path="rows.jsonl", method="GET", drop=True))
    hub.inject(HubFault(path="1-2.tar.gz", method="GET", delay=4))
    run_script(READ, env=hub.environment(tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="2"))
    assert not any(fault.times for fault in hub.faults)


THREE_MEANINGS = """
import os, sys
from datasets import load_dataset, disable_progress_bars
disable_progress_bars()
built, source = sys.argv[1:]

def check(rows, count):
    rows = list(rows)
    assert len(rows) == count, (len(rows), count)
    assert all(row["image"].size == (24, 24) for row in rows)
    return [row["id"] for row in rows]

# On the Hub, without any code of ours.
everything = check(load_dataset("ns/echo-4o-image", split="train"), 24)
assert check(load_dataset("ns/echo-4o-image", split="train", streaming=True), 24) == everything
for name in ("surreal_fantasy", "multi_reference", "instruction_following"):
    assert check(load_dataset("ns/echo-4o-image", name, split="train", streaming=True), 8) == check(
        load_dataset("ns/echo-4o-image", name, split="train"), 8)
assert "echo4o" not in sys.modules

# A folder built here, without a namespace and without our code, and the same with it.
os.chdir(built)
assert check(load_dataset("echo-4o-image", split="train"), 24) == everything
import echo4o
assert check(load_dataset("echo-4o-image", "all", split="train"), 24) == everything
references = [row["reference_images"] for row in load_dataset("echo-4o-image", "multi_reference", split="train")]
assert [len(r) for r in references] == [2] * 8

# The bare name: nothing configured, a repository, a folder, the published layout.
os.chdir("/")
try:
    load_dataset("echo-4o-image")
except FileNotFoundError as error:
    assert "set ECHO4O_DATASET" in str(error), error
else:
    raise AssertionError("found something")
os.environ["ECHO4O_DATASET"] = "ns/echo-4o-image"
assert check(load_dataset("echo-4o-image", split="train"), 24) == everything
assert check(load_dataset("echo-4o-image", "surreal_fantasy", split="train", streaming=True), 8) == everything[:8]
assert check(load_dataset("echo-4o-image", split="train", data_dir=os.path.join(built, "echo-4o-image")), 24) == everything
echo4o.use_dataset(source)
assert sorted(check(load_dataset("echo-4o-image", split="train"), 24)) == sorted(everything)
assert check(load_dataset("echo-4o-image", "multi_reference", split="train", streaming=True), 8) == everything[8:16]
hub = "hf://datasets/ns/Echo-4o-Image"
assert check(load_dataset("echo-4o-image", "multi_reference", data_dir=hub, split="train", streaming=True), 8) == everything[8:16]
assert len(load_dataset("json", data_files=os.path.join(built, "echo-4o-image", "rejected.jsonl"))["train"]) == 1

# For training, from the Hub.
assert sorted(row["id"] for row in echo4o.training_rows("ns/echo-4o-image", streaming=True)) == sorted(everything)
# Building from the Hub notes the revision.
from echo4o.dataset_scripts.build import build
manifest = build(hub, os.path.join(os.environ["HF_HOME"], "built"))
assert len(manifest["source"]["revision"]) == 40 and manifest["rows"]["accepted"] == 24
"""


@pytest.mark.long
def test_the_three_meanings_of_load_dataset(folders, hub, api, tmp_path):
    send(folders / "echo-4o-image", api)
    hub.add_folder("ns/Echo-4o-Image", folders / "Echo-4o-Image", "datasets")
    run_script(THREE_MEANINGS, folders, folders / "Echo-4o-Image", env=hub.environment(tmp_path), timeout=200)


WITHOUT_REGISTRY = """
import logging, sys
logging.basicConfig()
sys.modules.pop("datasets.load", None)
import echo4o, importlib.util
import datasets.load as loader
original = loader.dataset_module_factory.__wrapped__
for broken in (lambda name: None, None):
    loader.dataset_module_factory = broken
    from echo4o.dataset_scripts import bare_name
    bare_name.install()
    assert loader.dataset_module_factory is broken
del loader.dataset_module_factory
bare_name.install()
loader.dataset_module_factory = original
bare_name.install(); bare_name.install()
assert loader.dataset_module_factory.__wrapped__ is original
from echo4o import Echo4oImage
"""


@pytest.mark.long
def test_without_the_private_function_the_rest_works_and_a_message_helps(tmp_path):
    env = offline_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT_REGISTRY], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('use load_dataset("owner/echo-4o-image")') == 3


def test_what_the_bare_name_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECHO4O_DATASET", "owner/a")
    assert bare_name.resolve() == "owner/a"
    bare_name.use_dataset("owner/b")
    try:
        assert bare_name.resolve() == "owner/b" and bare_name.resolve("/here") == "/here"
        (tmp_path / "echo-4o-image").mkdir()
        assert bare_name.resolve() == "./echo-4o-image"
    finally:
        bare_name.use_dataset(None)
    write_tar(tmp_path / SURREAL / "0.tar", [("00000.jpg", picture(0))], "w")
    write_rows(tmp_path / SURREAL / "rows.jsonl", [row(0)])
    assert bare_name.is_published_layout(str(tmp_path)) and not bare_name.is_published_layout("owner/a")
    assert bare_name.is_published_layout("hf://datasets/Yejy53/Echo-4o-Image")
