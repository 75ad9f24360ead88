"""What is interrupted goes on bit by bit; what is damaged while saving costs nothing that was there before."""

import builtins
import errno
import io
import json
import os
import shutil
import signal
import time

import pytest
import torch
from accelerate import Accelerator

from echo4o.common.locks import FolderLock
from echo4o.training.checkpoints import CheckpointError, CheckpointFolder, load, missing_from

from .running import assert_same, log_of, losses_of, run, start, train_here, weights_of

# Everything that a run's state is made of: two optimizers; or LoRA dropout, packs, an average.
KINDS = {
    "full, muon": {
        "optimizer": {"name": "muon", "lr": 1e-3, "muon_lr": 1e-2, "schedule": "cosine", "warmup_steps": 2}
    },
    "lora, packs, average": {
        "batch_size": None,
        "packing": {"tokens": 100, "packs_per_step": 2, "buffer": 4},
        "tune": {"method": "lora", "experts": ["gen", "und"], "rank": 4, "alpha": 8, "dropout": 0.3},
        "ema": {"decay": 0.9},
    },
    "streaming": {"batch_size": None, "packing": {"tokens": 100, "packs_per_step": 2, "buffer": 4}, "streaming": True},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(recipe_file, tmp_path, rows_folder, kind):
    changes = {"steps": 6, "checkpoints": {"every": 2, "keep": 3}} | KINDS[kind]
    if changes.pop("streaming", False):
        changes["data"] = {"path": str(rows_folder), "streaming": True}
    file = recipe_file("whole", **changes)
    assert train_here(file) == 0
    whole, out = tmp_path / "whole", "adapter" if "tune" in changes else "pipeline"
    for step in (2, 4):
        part = tmp_path / f"from-{step}"
        shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", part / "checkpoints" / f"step-{step:08d}")
        shutil.copy(whole / "train_log.jsonl", part)
        torch.manual_seed(step)  # whatever random state the process is in
        assert train_here(file, "--resume", "--set", f"output_dir={part}") == 0
        assert losses_of(part) == losses_of(whole)
        assert_same(weights_of(part / out), weights_of(whole / out))


@pytest.mark.long
def test_a_second_run_does_not_write_over_the_first(recipe_file, capsys):
    file = recipe_file(checkpoints={"every": 2})
    assert train_here(file, "--set", "steps=2") == 0
    assert train_here(file) == 2
    assert "holds a run up to step 2: continue it with --resume" in capsys.readouterr().err
    assert train_here(file, "--resume", "--set", "optimizer.lr=1e-2") == 2
    assert "The interrupted run had other settings: optimizer" in capsys.readouterr().err
    assert train_here(file, "--resume") == 0


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


ENDLESS = {"steps": 100_000, "optimizer": {"lr": 1e-3}}


def uninterrupted(file, tmp_path, steps: int):
    """The same run without an interruption; returns its folder."""
    assert train_here(file, "--set", f"steps={steps}", "--set", f"output_dir={tmp_path / 'straight'}") == 0
    return tmp_path / "straight"


@pytest.mark.long
def test_sigterm_saves_and_the_run_continues(recipe_file, tmp_path):
    file = recipe_file("run", **ENDLESS, checkpoints={"every": 10_000})
    process = start("train", file)
    log = tmp_path / "run" / "train_log.jsonl"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) >= 3, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "Stopped by SIGTERM after step" in printed and "Traceback" not in printed
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*")
    steps = int(saved.name.removeprefix("step-")) + 2
    assert train_here(file, "--resume", "--set", f"steps={steps}") == 0
    straight = uninterrupted(file, tmp_path, steps)
    assert losses_of(tmp_path / "run") == losses_of(straight)
    assert_same(weights_of(tmp_path / "run" / "pipeline"), weights_of(straight / "pipeline"))


@pytest.mark.long
def test_kill_at_any_moment(recipe_file, tmp_path):
    file = recipe_file("run", **ENDLESS, checkpoints={"every": 1, "keep": 2})
    process = start("train", file)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir(), process)
    process.kill()
    process.wait()
    check_goes_on(file, tmp_path)


@pytest.mark.long
def test_kill_in_the_middle_of_saving(recipe_file, tmp_path):
    file = recipe_file("run", **ENDLESS, checkpoints={"every": 1, "keep": 2})
    run("train", file, module="tests.training.kill_while_saving", code=-signal.SIGKILL, KILL_AT_STEP="3")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(f.name for f in folder.iterdir()) == [".step-00000003.tmp", "step-00000001", "step-00000002"]
    check_goes_on(file, tmp_path)


def check_goes_on(file, tmp_path):
    last = CheckpointFolder(tmp_path / "run" / "checkpoints", log=lambda text: None).last()
    steps = last.step + 2
    assert train_here(file, "--resume", "--set", f"steps={steps}") == 0
    straight = uninterrupted(file, tmp_path, steps)
    assert losses_of(tmp_path / "run") == losses_of(straight)
    assert_same(weights_of(tmp_path / "run" / "pipeline"), weights_of(straight / "pipeline"))
    left = sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [f"step-{steps - 1:08d}", f"step-{steps:08d}"], "leftovers go, two are kept"


class Faults:
    """Lets `allowed` operations on files pass (open for writing, write, fsync, rename, mkdir); the next fails."""

    def __init__(self, monkeypatch, folder):
        self.allowed, self.done, self.folder = None, 0, str(folder)
        for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name), name))
        for module in (io, builtins):
            monkeypatch.setattr(module, "open", self.opened(module.open))

    def count(self, what: str) -> None:
        if self.allowed is None:
            return
        if self.done >= self.allowed:
            raise OSError(errno.ENOSPC, f"No space left on device ({what})")
        self.done += 1

    def counted(self, function, name):
        def call(*args, **kwargs):
            self.count(name)
            return function(*args, **kwargs)

        return call

    def opened(self, function):
        def call(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+") or self.folder not in str(file):
                return function(file, mode, *args, **kwargs)
            self.count("open")
            stream = function(file, mode, *args, **kwargs)
            return Failing(stream, self)

        return call


class Failing:
    """A file whose writes count."""

    def __init__(self, stream, faults):
        self.stream, self.faults = stream, faults

    def write(self, data):
        self.faults.count("write")
        return self.stream.write(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()


def tensors(value: float) -> dict:
    return {"model": {"a": torch.full((3, 2), value), "b": torch.full((4,), -value)}, "optimizer": {"lr": value}}


@pytest.mark.long
def test_no_fault_while_saving_costs_the_one_before(tmp_path, monkeypatch):
    accelerator, folder = (
        Accelerator(cpu=True),
        CheckpointFolder(tmp_path / "checkpoints", keep=1, log=lambda text: None),
    )
    folder.save(accelerator, 1, tensors(1.0), {"step": 1})
    faults = Faults(monkeypatch, tmp_path)
    failures = 0
    while True:
        faults.allowed, faults.done, failed = failures, 0, False
        try:
            folder.save(accelerator, 2, tensors(2.0), {"step": 2})
        except CheckpointError as error:
            failures, failed = failures + 1, True
            assert "No space left on device" in str(error)
        finally:
            faults.allowed = None
        last = folder.last()
        held = tensors(0.0)
        load(last, accelerator, held)
        assert held["model"]["a"].unique().tolist() == [float(last.step)]
        assert last.state()["step"] == last.step and held["optimizer"]["lr"] == float(last.step)
        if not failed or failures > 1000:
            break
        if last.step == 2:  # the rename was done, what failed came after: start over
            shutil.rmtree(last.folder)
            folder.save(accelerator, 1, tensors(1.0), {"step": 1})
    assert 15 < failures < 1000, failures


def test_incomplete_ones_are_named_and_left_out(tmp_path, capsys):
    accelerator, folder = Accelerator(cpu=True), CheckpointFolder(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        folder.save(accelerator, step, tensors(1.0), {"step": step})
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    file = tmp_path / "step-00000003" / "weights" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    os.rename(tmp_path / "step-00000002", tmp_path / ".step-00000002.tmp")
    assert [checkpoint.step for checkpoint in folder.complete()] == [1]
    said = capsys.readouterr().out
    assert "step-00000004 is ignored" in said and "__0_0.distcp has another size" in said and "never finished" in said
    assert missing_from(tmp_path / "step-00000001") is None


@pytest.mark.long
def test_a_second_run_into_the_folder_of_a_running_one_is_refused(recipe_file, tmp_path, capsys):
    file = recipe_file("run")
    with FolderLock(tmp_path / "run"):
        assert train_here(file) == 2
    assert "run is in use by another process" in capsys.readouterr().err
    assert train_here(file) == 0


@pytest.mark.long
def test_a_full_disk_ends_the_run_with_one_line(recipe_file, tmp_path, monkeypatch, capsys):
    file = recipe_file("run", checkpoints={"every": 2})
    from echo4o.training import checkpoints

    finish, calls = checkpoints._finish, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(*args)

    monkeypatch.setattr(checkpoints, "_finish", full)
    assert train_here(file) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "step 4 could not be written: [Errno 28] No space left on device; the last complete one is" in line
    assert train_here(file, "--resume") == 0


@pytest.mark.long
def test_a_loss_that_is_not_a_number_is_saved_and_named(recipe_file, tmp_path, monkeypatch, capsys):
    from echo4o.training.backbones.bagel import BagelBackbone

    prepare = BagelBackbone.prepare

    def spoiled(self, rows):
        made = prepare(self, rows)
        for row in made:
            if row.id == "row-5" and spoil:
                row.moments.fill_(float("nan"))
        return made

    monkeypatch.setattr(BagelBackbone, "prepare", spoiled)
    file, spoil = recipe_file("run", steps=5, checkpoints={"every": 100}), True
    assert train_here(file) == 1
    assert "is not finite. Samples: row-5." in capsys.readouterr().err
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    assert state["data"]["drawn"] == [2 * state["step"]], "the position is the one before the spoiled step"
    assert len(log_of(tmp_path / "run")) == state["step"]
    spoil = False
    assert train_here(file, "--resume") == 0
    assert len(log_of(tmp_path / "run")) == 5
