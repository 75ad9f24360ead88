"""The lower bounds of pyproject.toml: they install together, every module imports, and a pipeline generates an image."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_package import PROJECT, ROOMS, ROOT

OLDEST = ROOT / "constraints-oldest.txt"
NOT_THE_OLDEST = {"torch"}  # see the file


def pinned() -> dict[str, Version]:
    lines = [line for line in OLDEST.read_text("utf-8").splitlines() if line[:1] not in ("#", "")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions without a local part"
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_file_holds_exactly_the_lower_bounds():
    versions, bounds = pinned(), {}
    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        (bound,) = requirement.specifier
        assert bound.operator == ">=", text
        bounds[canonicalize_name(requirement.name)] = Version(bound.version)
    assert versions.keys() == bounds.keys()
    assert {name: v for name, v in versions.items() if name not in NOT_THE_OLDEST} == {
        name: v for name, v in bounds.items() if name not in NOT_THE_OLDEST
    }
    assert all(versions[name] >= bounds[name] for name in NOT_THE_OLDEST)


def run(*command, cwd: Path, **variables) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the oldest libraries have wheels for Python 3.11")
def test_everything_imports_and_generates(tmp_path):
    source = tmp_path / "source"
    for folder in ROOMS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    # As in the Makefile: TORCH_ARGS names an index with a CPU build of torch.
    torch = next(line for line in OLDEST.read_text("utf-8").splitlines() if line.startswith("torch=="))
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", OLDEST]
    run(*pip, *os.environ.get("TORCH_ARGS", "").split(), torch, cwd=tmp_path)
    run(*pip, source, cwd=tmp_path)
    script, pipeline = ROOT / "tests" / "import_and_generate.py", ROOT / "tests" / "artefacts_0_1" / "pipeline"
    told = run(python, script, pipeline, cwd=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert "generated one image" in told
