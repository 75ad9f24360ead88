"""The writer: what it writes, and that it ends with the same bytes wherever it was broken off."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from echo4o.common import files
from echo4o.common.locks import FolderLock
from echo4o.dataset_scripts.build import WORK, BuildOptions, build
from echo4o.dataset_scripts.features import features
from echo4o.dataset_scripts.manifest import check_shards, read_manifest
from echo4o.dataset_scripts.shards import HashingFile
from echo4o.dataset_scripts.upstream import ReadOptions
from tests.dataset_scripts.layout import REFERENCE, SURREAL, member, picture, row, small_release, write_rows, write_tar

SMALL = BuildOptions(shard_bytes=3000, row_group_bytes=1500)
ROOT = Path(__file__).parents[2]


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Three parts with rejected rows of several reasons and remarks, references in other archives than their rows."""
    root = small_release(tmp_path_factory.mktemp("source") / "Echo-4o-Image", rows=4, per_archive=2)
    images = root / SURREAL / "images"
    members = [("00004.jpg", b"no picture"), ("unused.png", b"x"), ("00000.jpg", picture(0))]
    write_tar(images / "4-6.tar.gz", [*members, member("00005.jpg", type=b"2", linkname="x")])
    # The last one is the picture of row 0 again, in another archive, with its instruction: a duplicate.
    later = [("00006.jpg", 6), ("00007.jpg", 7), ("00008.jpg", 8), ("00011.jpg", 0)]
    write_tar(images / "6-8.tar.gz", [(name, picture(seed)) for name, seed in later])
    doubles = [row(3), row(11, row(0)["instruction"])]
    write_rows(root / SURREAL / "rows.jsonl", [row(n) for n in range(9)] + [*doubles, row(9, ""), row(10)])
    with open(root / SURREAL / "rows.jsonl", "a") as stream:
        stream.write("no json\n")
    return root


@pytest.fixture(scope="module")
def built(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "echo-4o-image"
    build(release, out, SMALL)
    return out


def test_a_built_folder_loads(built):
    manifest = read_manifest(built)
    assert manifest["rows"] == {"given": 22, "accepted": 15, "rejected": 7}
    names = ("surreal_fantasy", "multi_reference", "instruction_following")
    assert {name: facts["rows"] for name, facts in manifest["configurations"].items()} == dict(zip(names, (7, 4, 4)))
    assert list(check_shards(built, manifest)) == []
    for name, rows in (*zip(names, (7, 4, 4)), ("all", 15), (None, 15)):
        table = load_dataset(str(built), name, split="train")
        assert table.num_rows == rows and table.features == features()
    assert len(set(table["id"])) == 15
    streamed = load_dataset(str(built), "multi_reference", split="train", streaming=True)
    assert [len(r["reference_images"]) for r in streamed] == [2] * 4
    categories = manifest["configurations"]["surreal_fantasy"]["categories"]
    assert categories["T1"]["rows"] == 7 and categories["T1"]["bytes"] > 7 * len(picture(0)) * 0.9


def test_nothing_that_was_given_vanishes(built, release):
    rejected = [json.loads(line) for line in (built / "rejected.jsonl").read_text().splitlines()]
    assert Counter(r["reason"] for r in rejected) == read_manifest(built)["rejected"]["surreal_fantasy"]
    assert {r["reason"] for r in rejected} == {
        "unreadable row", "empty instruction", "undecodable", "unsafe member", "duplicate", "missing image"
    }  # fmt: skip
    given = (release / SURREAL / "rows.jsonl").read_text().splitlines()
    for r in rejected:
        assert r.get("raw", json.dumps(r.get("row"))) == given[r["line"] - 1]
    remarks = [json.loads(line) for line in (built / "remarks.jsonl").read_text().splitlines()]
    assert Counter(r["reason"] for r in remarks) == read_manifest(built)["remarks"]


def test_shards_are_made_for_streaming(built):
    manifest = read_manifest(built)
    shards = manifest["configurations"]["surreal_fantasy"]["shards"]
    assert len(shards) > 1 and max(len(s["row_groups"]) for s in shards) > 1
    for shard in shards:
        file = pq.ParquetFile(built / shard["file"])
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == shard["row_groups"]
        assert b"content_defined_chunking" in file.metadata.metadata
        columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
        assert all(column.has_offset_index for column in columns)
        by_name = {column.path_in_schema: column for column in columns}
        assert by_name["image.bytes"].compression == "UNCOMPRESSED"


def test_a_second_run_and_more_workers_are_identical(built, release, tmp_path):
    before = tree(built)
    build(release, built, SMALL)
    assert tree(built) == before
    build(release, tmp_path / "again", SMALL, ReadOptions(workers=4))
    assert tree(tmp_path / "again") == before


class Killed(BaseException):
    """What no handler of a library expects."""


def break_off(monkeypatch, at: int, error: BaseException | None) -> list[str]:
    """Make the write, sync or rename with the number `at` fail; the list of all that were done."""
    done = []

    def wrap(name):
        original = getattr(files, name)

        def call(*arguments):
            done.append(name)
            if len(done) - 1 == at:
                raise error
            return original(*arguments)

        monkeypatch.setattr(files, name, call)

    for name in ("write", "sync", "rename"):
        wrap(name)
    return done


def tiny_release(root: Path, rows: int) -> Path:
    small_release(root, rows=rows, per_archive=1)
    members = [("x.jpg", b"x"), ("00002.jpg", b"no picture"), ("00000.jpg", b"again")]
    write_tar(root / SURREAL / "images" / "2-3.tar.gz", members)
    write_rows(root / SURREAL / "rows.jsonl", [row(n) for n in range(4)])
    return root


FULL = OSError(errno.ENOSPC, "No space left on device")
# A step is a write, a sync or a rename. Inside a shard the writes are alike: a few of them are enough to look at always.
BREAKS = [
    pytest.param(100_000, 15, Killed(), id="killed"),
    pytest.param(100_000, 15, FULL, id="full", marks=pytest.mark.long),
    pytest.param(1, 1, Killed(), id="killed at every step, a row per shard", marks=pytest.mark.long),
]


@pytest.mark.long
@pytest.mark.parametrize("shard_bytes, every, error", BREAKS)
def test_broken_off_at_every_write_and_rename(tmp_path, shard_bytes, every, error):
    release, options = (
        tiny_release(tmp_path / "Echo-4o-Image", 2 if every > 1 else 1),
        BuildOptions(shard_bytes=shard_bytes),
    )
    with pytest.MonkeyPatch.context() as patch:
        steps = break_off(patch, -1, None)
        build(release, tmp_path / "whole", options)
    expected = tree(tmp_path / "whole")
    others = {i for i, name in enumerate(steps) if name != "write"}
    assert {"write", "sync", "rename"} == set(steps)
    for at in (i for i in range(len(steps)) if i % every == 0 or {i - 1, i, i + 1} & others):
        out = tmp_path / f"{at}"
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, at, error)
            with pytest.raises(type(error)):
                build(release, out, options)
        visible = [name for name in tree(out) if name.startswith("data/")]
        assert len(visible) in (0, sum(name.startswith("data/") for name in expected)), "half of it is visible"
        build(release, out, options)
        assert tree(out) == expected, (at, steps[at])
        shutil.rmtree(out)


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        steps = break_off(patch, -1, None)
        file = HashingFile(tmp_path / "a")
        file.write(b"x")
        file.finish()
        files.write_text(tmp_path / "b", "y")
    assert steps == ["write", "sync", "rename"] * 2


def test_a_full_disk_leaves_no_torn_shard_and_says_where(release, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, 100, FULL)
        with pytest.raises(OSError, match="No space left on device"):
            build(release, tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_broken_off_again_and_again(release, built, tmp_path):
    """Each run gets a little further than the one before."""
    out, attempts = tmp_path / "out", 0
    while not (out / "manifest.json").exists():
        attempts += 1
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, 200, Killed())
            try:
                build(release, out, SMALL)
            except Killed:
                pass
        assert attempts < 50
    build(release, out, SMALL)
    assert attempts > 2 and tree(out) == tree(built)


def test_finished_shards_are_not_read_again(release, built, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, 250, Killed())
        with pytest.raises(Killed):
            build(release, out, SMALL)
    shards = [p for p in (out / WORK).rglob("*.parquet")]
    assert shards
    checked = []
    monkeypatch.setattr(
        "echo4o.dataset_scripts.upstream.check_image",
        lambda data, *rest, check=sys.modules["echo4o.dataset_scripts.upstream"].check_image: (
            checked.append(1) or check(data, *rest)
        ),
    )
    stamps = {p.relative_to(out / WORK): p.stat().st_mtime_ns for p in shards}
    build(release, out, SMALL)
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps
    assert 0 < len(checked) < 20 and tree(out) == tree(built)


def test_an_altered_shard_is_built_again(release, built, tmp_path):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, 250, Killed())
        with pytest.raises(Killed):
            build(release, out, SMALL)
    min((out / WORK).rglob("*.parquet")).write_bytes(b"damaged")
    build(release, out, SMALL)
    assert tree(out) == tree(built)


SLOW_BUILD = """
import sys, time
from echo4o.common import files
from echo4o.dataset_scripts.build import BuildOptions, build
original = files.write
def write(stream, data):
    time.sleep(0.002)
    original(stream, data)
files.write = write
build(sys.argv[1], sys.argv[2], BuildOptions(shard_bytes=3000, row_group_bytes=1500))
"""


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 4, 7])
def test_killed_for_real(release, built, tmp_path, shards):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(release), str(out)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list((out / WORK).rglob("*.parquet"))) < shards and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "data").exists()
    build(release, out, SMALL)
    assert tree(out) == tree(built)


@pytest.mark.long
def test_a_full_disk_is_one_clear_line(release, built, tmp_path):
    """The process may write no file longer than 4 kB, which meets the first shard as a full disk would."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
    run = "import sys; from echo4o.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", limit + run, "dataset", "build", str(release), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "out" / "data").exists()


def test_two_processes_do_not_build_into_one_folder(release, tmp_path):
    with FolderLock(tmp_path / "out"), pytest.raises(ValueError, match="out is in use by another process"):
        build(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_rejected_rows_fail_and_the_build_continues_with_more(release, built, tmp_path):
    with pytest.raises(ValueError, match=r"more than 2 rows are rejected \(--max-rejected\); the last: "):
        build(release, tmp_path / "out", SMALL, max_rejected=2)
    assert not (tmp_path / "out" / "data").exists()
    build(release, tmp_path / "out", SMALL, max_rejected=7)
    assert tree(tmp_path / "out") == tree(built)


def test_other_folders_are_left_alone(release, built, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"is not empty \(it holds mine.txt\)"):
        build(release, tmp_path)
    with pytest.raises(FileExistsError, match="was built with another verify: choose a new folder"):
        build(release, built, SMALL, ReadOptions(verify="header"))
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, 250, Killed())
        with pytest.raises(Killed):
            build(release, tmp_path / "out", SMALL)
    with pytest.raises(FileExistsError, match="was begun with another shard_bytes"):
        build(release, tmp_path / "out", BuildOptions(shard_bytes=5, row_group_bytes=1500))


def test_a_part_alone_and_no_row_at_all(release, tmp_path):
    manifest = build(release, tmp_path / "part", BuildOptions(configuration="multi_reference"))
    assert list(manifest["configurations"]) == ["multi_reference"]
    assert load_dataset(str(tmp_path / "part"), "all", split="train").num_rows == 4
    empty = tmp_path / "empty"
    write_rows(empty / REFERENCE / "rows.jsonl", [])
    manifest = build(empty, tmp_path / "nothing")
    assert manifest["rows"] == {"given": 0, "accepted": 0, "rejected": 0}


def test_what_was_altered_later_is_found(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    manifest = read_manifest(copy)
    first, second, third, *_ = sorted((copy / "data").rglob("*.parquet"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    (copy / "data" / "more.parquet").write_bytes(b"")
    found = dict(line.split(": ", 1) for line in check_shards(copy, manifest))
    assert {name: text[:10] for name, text in found.items()} == {
        first.relative_to(copy).as_posix(): "its bytes ",
        second.relative_to(copy).as_posix(): "it is gone",
        third.relative_to(copy).as_posix(): "it has " + found[third.relative_to(copy).as_posix()][7:10],
        "data/more.parquet": "the manife",
    }
