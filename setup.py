"""Lists the packages of every room; everything else is in pyproject.toml."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
rooms = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
packages = []
for name, folder in rooms.items():
    packages.append(name)
    packages += [f"{name}.{sub}" for sub in find_packages(str(root / folder))]

setup(packages=packages)
