"""After `import echo4o`, `load_dataset("echo-4o-image")` finds the dataset without a namespace.

Its location is, in this order: `data_dir`, the folder ./echo-4o-image, the argument of `use_dataset`, the variable
ECHO4O_DATASET. `datasets` has no public way to name a dataset, so one function of its loader is wrapped, when and
if `datasets` is imported; where that function is missing, everything else works and a warning says what to use instead.
"""

import functools
import importlib.abc
import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path

NAME = "echo-4o-image"
VARIABLE = "ECHO4O_DATASET"
_LOADER = "datasets.load"
_configured: str | None = None

log = logging.getLogger(__name__)


def use_dataset(target: str | None) -> None:
    """Let the bare name mean `target`: a Hub repository ("owner/echo-4o-image"), a folder built with
    `echo4o dataset build`, or a folder or hf:// address in the published layout. None forgets it."""
    global _configured
    _configured = target


def resolve(data_dir: str | None = None) -> str:
    """The location of the bare name. Raises FileNotFoundError if it is not configured."""
    if data_dir:
        return str(data_dir)
    if Path(NAME).is_dir():
        return f"./{NAME}"
    if target := _configured or os.environ.get(VARIABLE):
        return target
    raise FileNotFoundError(
        f'nothing says where "{NAME}" is: pass data_dir=, set {VARIABLE} to a Hub repository or a folder, '
        f'or write the namespace: load_dataset("owner/{NAME}")'
    )


def is_published_layout(target: str) -> bool:
    """Whether our builder must read it; else it is Parquet, which `datasets` reads without any code."""
    if target.startswith("hf://"):
        return True
    folder = Path(target).expanduser()
    return folder.is_dir() and not (folder / "manifest.json").exists() and not any(folder.rglob("*.parquet"))


def install() -> None:
    """Make the name known now, or as soon as `datasets` is imported; importing it here would take seconds."""
    if _LOADER in sys.modules:
        _register(sys.modules[_LOADER])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the name when `datasets` has been imported, and removes itself."""

    def find_spec(self, name, path=None, target=None):
        if name != _LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def _register(loader) -> None:
    try:
        original = loader.dataset_module_factory
        known = {"path", "data_dir"} <= set(inspect.signature(original).parameters)
        if not known or not callable(loader.DatasetModule):
            raise AttributeError("its loader takes other arguments")
    except (AttributeError, TypeError, ValueError) as error:
        log.warning(
            'load_dataset("%s") without a namespace does not work with this version of datasets (%s): use '
            'load_dataset("owner/%s"), load_dataset(folder), or echo4o.dataset_scripts.builder.Echo4oImage',
            NAME, error, NAME,
        )  # fmt: skip
        return
    if not hasattr(original, "__wrapped__"):
        loader.dataset_module_factory = _with_name(loader, original)


def _with_name(loader, original):
    @functools.wraps(original)
    def dataset_module_factory(path, *args, **kwargs):
        if path != NAME:
            return original(path, *args, **kwargs)
        target = resolve(kwargs.pop("data_dir", None))
        if is_published_layout(target):
            return loader.DatasetModule(
                "echo4o.dataset_scripts.builder", "1", {"data_dir": target, "dataset_name": NAME}
            )
        module = original(target, *args, **kwargs)
        module.builder_kwargs.setdefault("data_dir", None)  # it is the place itself, not a folder in it
        return module

    return dataset_module_factory
