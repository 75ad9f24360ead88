"""Runs of the real command line, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(*arguments, module: str = "echo4o") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def start(*arguments, module: str = "echo4o", **environment) -> subprocess.Popen:
    """A run in a process of its own."""
    return subprocess.Popen(
        command(*arguments, module=module),
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def run(*arguments, module: str = "echo4o", code: int = 0, **environment) -> str:
    """A run to its end; returns what it printed."""
    return finished(start(*arguments, module=module, **environment), code)


def finished(process: subprocess.Popen, code: int = 0) -> str:
    """What a run printed, at its end."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == code, printed[-4000:]
    return printed


def torchrun(processes: int, module: str, *arguments, code: int = 0) -> str:
    return run(
        "--standalone",
        "--nproc-per-node",
        processes,
        "-m",
        module,
        *arguments,
        module="torch.distributed.run",
        code=code,
    )


def train_here(file, *arguments) -> int:
    """The same command line in this process: a second instead of ten."""
    from echo4o.training.train import main

    return main([str(file), *map(str, arguments)])


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(folder)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a pipeline folder or an adapter."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files, folder
    inside = {f: f"{f.parent.name}." if f.parent != folder else "" for f in files}
    return {f"{inside[f]}{name}": tensor for f in files for name, tensor in load_file(f).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]
