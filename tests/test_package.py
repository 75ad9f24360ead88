"""The package as it is installed: its packages, its imports, its versions."""

import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import echo4o

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ROOMS = PROJECT["tool"]["setuptools"]["package-dir"]
# Libraries of optional extras, which the rooms that need them import.
OF_EXTRAS = ("fastapi", "gradio", "starlette", "uvicorn")
SLOW_LIBRARIES = ("torch", "diffusers", "transformers", "datasets", "numpy", "matplotlib")


def python(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def packages_on_disk() -> set[str]:
    names = set()
    for name, folder in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            names.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return names


def modules() -> list[str]:
    found = {"echo4o"}
    for name, folder in ROOMS.items():
        found.add(name)
        found |= {m.name for m in pkgutil.walk_packages([str(ROOT / folder)], f"{name}.") if _importable(m.name)}
    return sorted(found)


def _importable(name: str) -> bool:
    # A metric's app.py is the script of its Space: it runs when imported, and elsewhere than here.
    return not name.endswith("__main__") and not re.fullmatch(r"echo4o\.evaluation\.metrics\.\w+\.app", name)


def test_every_folder_with_an_init_is_packaged():
    listed = python(
        "-c", "from distutils.core import run_setup; import json;"
        "print(json.dumps(run_setup('setup.py', stop_after='init').packages))"
    )  # fmt: skip
    assert set(json.loads(listed.splitlines()[-1])) == packages_on_disk()


def test_every_folder_with_code_has_an_init():
    # A folder without one would import in a checkout and be missing from the wheel.
    for folder in ROOMS.values():
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent.relative_to(ROOT)} has no __init__.py"


def test_importing_the_package_is_cheap():
    rooms = ", ".join(ROOMS)
    code = f"import echo4o.cli, {rooms}, sys; print([m for m in {SLOW_LIBRARIES} if m in sys.modules])"
    assert python("-c", code).strip() == "[]"


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OF_EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed: pip install 'echo4o[app]'")


def test_public_names_resolve():
    for name in echo4o.__all__:
        assert getattr(echo4o, name) is not None
        assert name in dir(echo4o)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = echo4o.no_such_name


def test_constraints_satisfy_the_bounds():
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:1] not in ("#", "")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions without a local part"
    pinned = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["dev"]:
        requirement = Requirement(text)
        if requirement.name == "echo4o":  # the app's own extra
            continue
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_tools_find_every_module_behind_a_link(tmp_path):
    spec = importlib.util.spec_from_file_location("link_rooms", ROOT / ".ci" / "link_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.link_rooms(tmp_path / "rooms")
    for name, folder in ROOMS.items():
        for file in (ROOT / folder).rglob("*.py"):
            link = tmp_path / "rooms" / Path(*name.split(".")) / file.relative_to(ROOT / folder)
            assert link.resolve() == file.resolve()
    assert (ROOT / "echo4o" / "py.typed").is_file()
