"""Durable files: a process that is killed while it writes leaves the old file or the new one."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from echo4o.common import files

# Writes 4 MB of one letter again and again, and says so before each time.
ENDLESS = """
import sys
from pathlib import Path
from echo4o.common import files
for letter in "abcdefghijklmnopqrstuvwxyz" * 1000:
    print(letter, flush=True)
    files.write_text(Path(sys.argv[1]), letter * 4_000_000)
"""
# Kills itself with the signal that cannot be caught, before the n-th call of one of the three functions.
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from echo4o.common import files
def killing(name, call):
    def function(*arguments):
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        call(*arguments)
    return function
for name in ("write", "sync", "rename"):
    setattr(files, name, killing(name, getattr(files, name)))
files.write_text(Path(sys.argv[1]), "new")
"""


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.11])
def test_a_kill_leaves_a_complete_file(tmp_path, seconds):
    file = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, file], stdout=subprocess.PIPE, text=True)
    process.stdout.readline(), process.stdout.readline()  # the first one is written
    time.sleep(seconds)
    process.kill()
    process.communicate()
    text = file.read_text()
    assert len(text) == 4_000_000 and len(set(text)) == 1
    files.write_text(file, "next")
    assert [f.name for f in tmp_path.iterdir()] == ["file"], "the next write removes what the kill left"


@pytest.mark.parametrize("name", ["write", "sync", "rename"])
def test_a_kill_at_every_step_leaves_the_old_file(tmp_path, name):
    file = tmp_path / "file"
    files.write_text(file, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED_AT, file, name])
    assert killed.returncode == -signal.SIGKILL and file.read_text() == "old"


def test_file_and_folder_are_flushed_in_order(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda n: calls.append("folder" if os.path.isdir(f"/dev/fd/{n}") else "file") or fsync(n)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    files.write_bytes(tmp_path / "new" / "file", b"content")
    assert calls == ["file", "rename", "folder"] and (tmp_path / "new" / "file").read_bytes() == b"content"


def test_an_error_leaves_the_old_file_alone(tmp_path, monkeypatch):
    file = tmp_path / "file"
    files.write_text(file, "old")

    def full(stream, data):
        stream.write(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(file, "new")
    with pytest.raises(RuntimeError), files.replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"


def test_several_processes_may_write_a_shared_file(tmp_path):
    code = "import sys; from pathlib import Path; from echo4o.common import files\n"
    code += "for _ in range(40): files.write_text(Path(sys.argv[1]), sys.argv[2] * 100_000, shared=True)"
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "file", letter]) for letter in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    text = (tmp_path / "file").read_text()
    assert len(text) == 100_000 and len(set(text)) == 1 and len(list(tmp_path.iterdir())) == 1


def test_json(tmp_path):
    file = tmp_path / "value.json"
    assert files.read_json(file) is None
    files.write_json(file, {"a": "é"})
    assert files.read_json(file) == {"a": "é"} and file.read_text() == '{\n  "a": "é"\n}\n'
    with pytest.raises(ValueError):
        files.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": "é"}
    file.write_text("{")
    with pytest.raises(ValueError, match="value.json is not JSON .*delete it"):
        files.read_json(file)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "folder"
    with files.replacing_folder(folder) as work:
        (work / "a").write_text("1")
    with pytest.raises(RuntimeError), files.replacing_folder(folder) as work:
        (work / "b").write_text("2")
        raise RuntimeError
    assert [f.name for f in tmp_path.rglob("*")] == ["folder", "a"]
    with files.replacing_folder(folder) as work:
        (work / "b").write_text("2")
    assert [f.name for f in tmp_path.rglob("*")] == ["folder", "b"]


def test_digest(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "file").startswith("ba7816bf")
