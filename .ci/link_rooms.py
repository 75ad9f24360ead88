"""Makes build/rooms/echo4o: one folder with a link to every module of the package, as an installation lays them out.

Python finds `echo4o.modeling` in modeling/ by a mapping in pyproject.toml that type checkers and editors do not know.
They are told to look here instead (`[tool.basedpyright]`). Links to files and not to folders: basedpyright checks
what it finds behind the former only.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def link_rooms(target: Path) -> None:
    """Replaces the folder `target` by one with the links."""
    shutil.rmtree(target, ignore_errors=True)
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
    for package, folder in rooms.items():
        for module in (ROOT / folder).rglob("*.py"):
            link = target / Path(*package.split(".")) / module.relative_to(ROOT / folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(module, link.parent))


if __name__ == "__main__":
    link_rooms(ROOT / "build" / "rooms")
