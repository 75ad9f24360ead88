"""Checkpoints: the state that a run needs to resume bit for bit. Writing one never damages the previous one.

    checkpoints/step-00000200/
        weights/        trained parameters, optimizer states and averages (torch.distributed.checkpoint); one shard per
                        process if the model is sharded; no frozen parameters
        rank-00000.pt   random states of each process
        state.json      step, data position, recipe
        manifest.json   name and size of every file above; written last

A checkpoint is written into a hidden folder, flushed to the disk (fsync) and renamed; then older ones are deleted.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from echo4o.common import files

MANIFEST, STATE, WEIGHTS, BEST = "manifest.json", "state.json", "weights", "best.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the last complete one."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path

    @property
    def step(self) -> int:
        """Number of optimizer steps that were done."""
        return int(self.folder.name.removeprefix("step-"))

    def state(self) -> dict:
        return json.loads((self.folder / STATE).read_text("utf-8"))


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        keep: how many of the last ones are kept.
        log: prints a message.
    """

    def __init__(self, folder: Path, keep: int = 2, log=print):
        self.folder, self.keep, self.log = Path(folder), keep, log
        self.best: int | None = None  # the step to keep besides the last ones

    def complete(self) -> list[Checkpoint]:
        """Checkpoints that can be loaded, oldest first; incomplete ones are reported and left out."""
        complete = []
        for folder in sorted(self.folder.glob("*step-*")):
            problem = None if folder.name.startswith("step-") else "it was never finished"
            problem = problem or missing_from(folder)
            if problem:
                self.log(f"{folder} is ignored: {problem}.")
            else:
                complete.append(Checkpoint(folder))
        return complete

    def last(self) -> Checkpoint | None:
        return (self.complete() or [None])[-1]

    def save(self, accelerator: Accelerator, step: int, tensors: dict, state: dict) -> Path:
        """Write the checkpoint of `step`, on all processes together. Raises CheckpointError on all of them."""
        final, work = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.tmp"
        if final.is_dir() and missing_from(final) is None:
            return final
        together(accelerator, lambda: _create(work), main_only=True)
        together(accelerator, lambda: _write_shard(accelerator, work, tensors))
        together(accelerator, lambda: _finish(work, final, state), main_only=True)
        together(accelerator, self._remove_old, main_only=True)
        return final

    def mark_best(self, accelerator: Accelerator, step: int, loss: float) -> None:
        """Keep the checkpoint of this step until another one is marked, and name it in `best.json`."""
        if step == self.best or not (self.folder / f"step-{step:08d}").is_dir():
            return
        self.best = step

        def mark() -> None:
            files.write_json(self.folder / BEST, {"step": step, "loss": loss})
            self._remove_old()

        together(accelerator, mark, main_only=True)

    def read_best(self) -> Checkpoint | None:
        """The checkpoint that `best.json` names; None if there is none."""
        marked = files.read_json(self.folder / BEST) if (self.folder / BEST).is_file() else None
        step = marked["step"] if marked else None
        return next((checkpoint for checkpoint in self.complete() if checkpoint.step == step), None)

    def _remove_old(self) -> None:
        complete = [f for f in sorted(self.folder.glob("step-*")) if missing_from(f) is None]
        for old in [f for f in complete[: -self.keep] if Checkpoint(f).step != self.best]:
            files.rename(old, old.with_name(f".{old.name}.tmp"))  # a kill while deleting leaves no half checkpoint
        for left in self.folder.glob(".step-*.tmp"):  # these, and those of runs that were killed while saving
            shutil.rmtree(left, ignore_errors=True)


def missing_from(folder: Path) -> str | None:
    """Why a checkpoint's folder is incomplete; None if it is complete."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text("utf-8"))
        wrong = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError) as error:
        return f"it is incomplete ({error})"
    return f"it is incomplete ({', '.join(wrong)} has another size)" if wrong else None


def together(accelerator: Accelerator, work, main_only: bool = False) -> None:
    """Run `work` on every process (or the main one). All processes raise CheckpointError if it fails on any."""
    problem = None
    if accelerator.is_main_process or not main_only:
        try:
            work()
        except (OSError, CheckpointException, RuntimeError) as error:
            problem = _reason(error)
    problems = [p for p in gather_object([problem]) if p]
    if problems:
        raise CheckpointError(problems[0])


def _reason(error: BaseException) -> str:
    """One line for an error: DCP wraps the reasons of all processes, torch.save hides the system's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = str(cause or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _create(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def _write_shard(accelerator: Accelerator, work: Path, tensors: dict) -> None:
    with quiet():
        save_state_dict(
            tensors,
            storage_writer=FileSystemWriter(work / WEIGHTS, single_file_per_rank=True, sync_files=True),
            no_dist=not dist.is_initialized(),
        )
    with open(work / f"rank-{accelerator.process_index:05d}.pt", "wb") as file:
        torch.save(random_states(), file)
        files.sync(file)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning of DCP that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _finish(work: Path, final: Path, state: dict) -> None:
    files.write_json(work / STATE, state)
    sizes = {str(f.relative_to(work)): f.stat().st_size for f in sorted(work.rglob("*")) if f.is_file()}
    files.write_json(work / MANIFEST, sizes)
    for folder in (work / WEIGHTS, work):
        files.sync_folder(folder)
    if final.exists():  # an incomplete one of the same step
        shutil.rmtree(final)
    files.rename(work, final)


def load(checkpoint: Checkpoint, accelerator: Accelerator, tensors: dict) -> None:
    """Fill `tensors` in place, for any number of processes, and set this process's random states."""
    try:
        with quiet():
            load_state_dict(
                tensors,
                storage_reader=FileSystemReader(checkpoint.folder / WEIGHTS),
                no_dist=not dist.is_initialized(),
            )
        file = checkpoint.folder / f"rank-{accelerator.process_index:05d}.pt"
        if file.is_file():  # more processes than before start with fresh random states
            set_random_states(torch.load(file, weights_only=True))
    except (OSError, CheckpointException, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.folder} cannot be loaded: {_reason(error)}") from error


def random_states() -> dict:
    """Random states of Python, numpy, torch and CUDA. Only LoRA dropout uses them; samples use named generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: dict) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
