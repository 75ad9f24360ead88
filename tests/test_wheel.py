"""The wheel and the sdist: what is in them, and that the wheel alone, in an environment of its own, runs the quickstart.

They are built from the files that git tracks, so that nothing that merely lies around slips in.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import echo4o
from tests.test_package import ROOMS, ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (ROOT / ".git").exists(), reason="needs a git checkout: it says which files are the project's"
    ),
]
INFO = f"echo4o-{echo4o.__version__}.dist-info"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def build(source: Path, kind: str) -> Path:
    """The sdist or the wheel of a source folder, as `python -m build --no-isolation` makes it."""
    out = source / "dist"
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return out / done.stdout.splitlines()[-1]


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return build(source, "sdist")


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    return build(sdist.parents[1], "wheel")


def test_the_wheel_holds_every_tracked_file_of_the_rooms_and_nothing_else(wheel):
    expected = set()
    for package, folder in ROOMS.items():
        inside = [name for name in tracked() if name.is_relative_to(folder)]
        expected |= {(Path(*package.split(".")) / name.relative_to(folder)).as_posix() for name in inside}
    found = names_in(wheel)
    assert {name for name in found if not name.startswith(f"{INFO}/")} == expected
    assert f"{INFO}/licenses/LICENSE" in found
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(found)} files")


def test_the_sdist_holds_what_the_wheel_needs_and_no_tests(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (top,) = tmp_path.iterdir()
    assert {entry.name for entry in top.iterdir()} == {
        *("LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"),
        *(*ROOMS.values(), "echo4o.egg-info"),
    }
    assert names_in(build(top, "wheel")) == names_in(wheel)
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        said = Parser().parsestr(archive.read(f"{INFO}/METADATA").decode())
    assert (said["Name"], said["Version"]) == ("echo4o", echo4o.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == "<3.14,>=3.11"
    assert all(url.partition(", ")[2].startswith("https://") for url in said.get_all("Project-URL"))
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().startswith("# echo4o\n")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel installed, which sees the dependencies of this one but not its echo4o.

    A path from a .pth file is searched, but its own .pth files, an editable installation's among them, are not read.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    return folder


def run(environment: Path, cwd: Path, *command: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(environment / "bin" / command[0]), *command[1:]]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
def test_the_installed_command_uses_the_wheels_files(environment, tmp_path):
    code = (
        "import sys, echo4o.cli, echo4o.modeling, echo4o.training, echo4o.dataset_scripts, echo4o.model_cards;"
        "print([m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'echo4o'])"
    )
    for file in ast.literal_eval(run(environment, tmp_path, "python", "-c", code)):
        assert Path(file).is_relative_to(environment), file
    assert run(environment, tmp_path, "echo4o", "--version").strip() == f"echo4o {echo4o.__version__}"
    facts = json.loads(run(environment, tmp_path, "echo4o", "info", "--json"))
    assert facts["echo4o"]["version"] == echo4o.__version__ and facts["libraries"]["torch"]


@pytest.mark.long
def test_the_installed_command_runs_the_quickstart(environment, tmp_path):
    run(environment, tmp_path, "echo4o", "quickstart", "--short")
    assert (tmp_path / "quickstart" / "report.html").stat().st_size > 10_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["quickstart"]
