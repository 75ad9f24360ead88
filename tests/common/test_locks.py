"""A folder belongs to one process at a time, and to nobody after a kill."""

import os
import signal
import subprocess
import sys

import pytest

from echo4o.common.locks import FolderLock

HOLD = """
import sys, time
from echo4o.common.locks import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_names_the_one_that_holds_the_folder(tmp_path, holder):
    with pytest.raises(ValueError, match=f"out is in use by another process .process {holder.pid}."):
        FolderLock(tmp_path / "out").acquire()


@pytest.mark.parametrize("name", ["link", "link/inside/..", "out/", "other/../out", "links/out"])
def test_a_folder_is_the_same_by_any_name(tmp_path, holder, name):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "links").symlink_to(tmp_path)
    for folder in ("out/inside", "other"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"in use by another process .process {holder.pid}."):
        FolderLock(f"{tmp_path}/{name}").acquire()


def test_a_killed_process_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == [], "the lock leaves no file behind, and makes no folder"


def test_where_nothing_can_be_created_beside_the_folder_it_is_locked_itself(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    beside, open_file = str(tmp_path / ".out.lock"), os.open

    def refuse(path, *more):
        if str(path) == beside:
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, *more)

    monkeypatch.setattr(os, "open", refuse)
    with FolderLock(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == [], "a build needs an empty folder"
        with pytest.raises(ValueError, match="out is in use by another process .process unknown."):
            FolderLock(tmp_path / "out").acquire()
    with FolderLock(tmp_path / "out"):
        pass
    with pytest.raises(ValueError, match="new cannot be created: Permission denied"):
        beside = str(tmp_path / ".new.lock")
        FolderLock(tmp_path / "new").acquire()


def test_it_can_be_taken_again_after_its_release(tmp_path):
    lock = FolderLock(tmp_path / "out").acquire()
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path / "out").acquire()
    lock.release()
    lock.release()
    with FolderLock(tmp_path / "out"):
        pass
