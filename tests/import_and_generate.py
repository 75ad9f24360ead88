"""Imports every module of the installed echo4o, and generates one image: `python import_and_generate.py PIPELINE`.

Run by an environment of its own (tests/test_oldest_libraries.py), so it imports nothing of the tests.
"""

import importlib
import pkgutil
import sys

import echo4o

OPTIONAL = "echo4o.serving."  # most of its modules need echo4o[app]
ROOMS = ("modeling", "training", "dataset_scripts", "model_cards")


def module_names() -> list[str]:
    """All modules but scripts, which run when they are imported, and those that need an optional extra."""
    found = [m.name for m in pkgutil.walk_packages(echo4o.__path__, "echo4o.", onerror=_is_optional)]
    scripts = ("__main__", "app")
    return sorted(name for name in found if name.rpartition(".")[2] not in scripts and not name.startswith(OPTIONAL))


def _is_optional(package: str) -> None:
    assert package.startswith(OPTIONAL), f"{package} cannot be imported"


def main(pipeline: str) -> None:
    names = module_names()
    assert {name.split(".")[1] for name in names} >= set(ROOMS), "the installed package has all rooms"
    for name in names:
        importlib.import_module(name)
    pipe = echo4o.Echo4oPipeline.from_pretrained(pipeline)
    (image,) = pipe("a red square", height=32, width=32, num_inference_steps=2).images
    assert image.size == (32, 32)
    print(f"imported {len(names)} modules, generated one image")


if __name__ == "__main__":
    main(sys.argv[1])
