"""Saves a pipeline as a folder that loads without the package: the weights, and the source files that read them.

Stock diffusers writes `diffusers_modules.local.*` or the package's module path into `model_index.json` and does not
save the code. `PublishingMixin` writes the list form that `DiffusionPipeline.from_pretrained(x,
trust_remote_code=True)` understands and puts the source files beside it.

How diffusers 0.42 fetches code decides what is written:
- From a local folder it copies `pipeline.py` and the modules that the text of this one file imports from its own
  package, into one flat folder. From the Hub it also follows the imports of these modules.
- It copies a component's file alone, so that such a file must not import other files of its folder.
"""

import ast
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .mixin_base import PipelineMixin
from .placement import modules_by_name
from .weights import read_json

INDEX_NAME = "model_index.json"
PIPELINE_FILE = "pipeline.py"  # the only name that diffusers looks for without `custom_pipeline=`
LIBRARIES = ("diffusers", "transformers", "tokenizers", "onnxruntime")  # components of these need no source file
_DYNAMIC_ROOT = "diffusers_modules"  # where diffusers puts code that it loads from a folder or a repository
_COMMON_IMPORT = re.compile(r"^( *)from \.\.common\.(\w+) import", re.M)
_ALSO_COPIED = """
# Written when the pipeline was saved. diffusers copies the modules that the text of this file imports: these are
# imported by the others only.
if False:
"""


# --- source files --------------------------------------------------------------------------------------------------


@functools.cache  # every load and every save reads the same files
def relative_imports(source: str) -> tuple[str, ...]:
    """The modules that a source text imports as `from .x import y` or `from ..common.x import y`, sorted.

    Raises ValueError for any other relative import: the published files lie in one folder.
    """
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.level]
    names = {f"{'.' * n.level}{n.module or ''}": n.lineno for n in nodes}
    for name, line in names.items():
        if not re.fullmatch(r"\.\w+|\.\.common\.\w+", name):
            raise ValueError(f"line {line} imports {name} from outside its own folder; such code is not portable.")
    return tuple(sorted(names))


def published_text(text: str) -> str:
    """The text of a module as it is published: imports from `..common.x` become imports from `.x`."""
    return _COMMON_IMPORT.sub(r"\1from .\2 import", text)


def published_name(module: str) -> str:
    """The file name that a module, named as in `_published_modules`, is published under."""
    return f"{module.rpartition('.')[2]}.py"


def pipeline_sources(file: str | Path, modules: tuple[str, ...], is_published: bool = False) -> dict[str, str]:
    """Published file name -> text, for a pipeline's file and the modules that are published with it.

    Args:
        file: the file of the pipeline's class; it is published as `pipeline.py`.
        modules: relative names of the other modules, as in `_published_modules`.
        is_published: `file` is a published one, and all others lie beside it.
    """
    file = Path(file)
    text = file.read_text("utf-8")
    if is_published:
        others = {published_name(m): (file.parent / published_name(m)).read_text("utf-8") for m in modules}
        return {PIPELINE_FILE: text} | others
    imported = relative_imports(text)
    if also := [published_name(m).removesuffix(".py") for m in modules if m not in imported]:
        text += "\n" + _ALSO_COPIED + "".join(f"    from .{name} import *\n" for name in also)
    sources = {PIPELINE_FILE: published_text(text)}
    for module in modules:
        folder = file.parents[1] / "common" if module.startswith("..common.") else file.parent
        if published_name(module) in sources:
            raise ValueError(f"two modules would be published as {published_name(module)}.")
        sources[published_name(module)] = published_text((folder / published_name(module)).read_text("utf-8"))
    return sources


def require_closed(sources: dict[str, str]) -> None:
    """Raise ValueError if a published file imports one that is not published."""
    for name, text in sources.items():
        if lacking := [module for module in relative_imports(text) if published_name(module) not in sources]:
            raise ValueError(f"{name} imports {lacking}, which _published_modules does not list.")


def require_standalone(text: str, owner: Any) -> None:
    """Raise ValueError if the file of a component imports other files: diffusers would not copy them."""
    if siblings := relative_imports(text):
        raise ValueError(f"{owner} imports {siblings}: a component's file is fetched alone and must stand alone.")


class ComponentCode(NamedTuple):
    """The source file of a component whose class no library provides; stem and text are empty without a file."""

    cls: type
    stem: str
    text: str


def write_sources(folder: Path, pipeline: dict[str, str], components: dict[str, ComponentCode]) -> None:
    """Write a pipeline's files into `folder` and the file of each component into the component's folder."""
    for name, text in pipeline.items():
        (folder / name).write_text(text, "utf-8")
    for component, code in components.items():
        (folder / component).mkdir(exist_ok=True)
        for old in (folder / component).glob("*.py"):
            old.unlink()
        (folder / component / f"{code.stem}.py").write_text(code.text, "utf-8")


def class_code(cls: type) -> ComponentCode | None:
    """The source file of a component's class; None for a class of a known library."""
    if cls.__module__.split(".")[0] in LIBRARIES:
        return None
    file = _module_file(cls)
    return ComponentCode(cls, file.stem, file.read_text("utf-8")) if file else ComponentCode(cls, "", "")


def _module_file(cls: type) -> Path | None:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


# --- the mixin -----------------------------------------------------------------------------------------------------


class PublishingMixin(PipelineMixin):
    """Saves a pipeline with its code. Use it through `PortablePipelineMixin` (loading.py).

    A class that defines `_published_modules` is the one that is published; classes derived from it are saved as it.
    Components whose classes belong to no known library are published with the file that defines them.
    """

    # Modules that are published with the pipeline's file: every one that it or one of them imports. Named relatively
    # to it: ".x" in the same folder, "..common.x" in the folder that all model families share.
    _published_modules: tuple[str, ...]
    _published_class: type
    _published_sources: dict[str, str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "_published_modules" in cls.__dict__:
            cls._published_class = cls
            # Read now: diffusers keeps loaded code in one flat folder, where the next repository overwrites it.
            file = _module_file(cls)
            is_published = cls._package() is None
            cls._published_sources = pipeline_sources(file, cls._published_modules, is_published) if file else {}

    @classmethod
    def _package(cls) -> str | None:
        """The package that the published class lives in; None if diffusers loaded it through remote code."""
        package = cls._published_class.__module__.rpartition(".")[0]
        return package if package and not package.startswith(_DYNAMIC_ROOT) else None

    def register_modules(self, **kwargs):
        super().register_modules(**kwargs)
        # Read now, for the reason given in __init_subclass__.
        codes = {name: _component_code(module) for name, module in kwargs.items()}
        known = self.__dict__.get("_component_codes", {})
        self.__dict__["_component_codes"] = known | {name: code for name, code in codes.items() if code}

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args, **kwargs):
        """Save a folder that loads with the package and, through `trust_remote_code=True`, without it.

        As `DiffusionPipeline.save_pretrained` (`push_to_hub`, `max_shard_size`, `variant`, ...); the source files
        go into the folder.

        Raises:
            ValueError: `safe_serialization=False`, a component with LoRA layers still injected (their weights would
                not load again), weights that layerwise casting rounded to 8 bits, or a component whose class has no
                file of its own.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for pickled weights, which are not written.")
        adapted = [n for n, m in self.components.items() if getattr(m, "peft_config", None)]
        if adapted:
            raise ValueError(
                f"{', '.join(adapted)} has LoRA layers in it, whose weights would not load as a plain model. Save "
                "the adapter with save_lora_weights; or fuse_lora() and then unload_lora_weights() to keep its effect, "
                "or unload_lora_weights() to drop it, and save again."
            )
        for name, module in modules_by_name(self).items():
            if any(p.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for p in module.parameters()):
                raise ValueError(
                    f"{name} was rounded to 8 bits by enable_layerwise_casting, and its original weights are lost: "
                    "save a pipeline on which it was not called."
                )
        self._codes_to_publish()
        return super().save_pretrained(str(save_directory), True, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Write model_index.json and the source files; the last step of save_pretrained before an upload."""
        codes = self._codes_to_publish()
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        write_sources(folder, self._published_sources, codes)
        for component in self.components:
            _forget_origin(folder / component / "config.json")
        index = read_json(folder / INDEX_NAME)
        index.pop("_name_or_path", None)
        index["_class_name"] = [Path(PIPELINE_FILE).stem, self._published_class.__name__]
        for name, code in codes.items():
            index[name] = [code.stem, code.cls.__name__]
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")

    def _codes_to_publish(self) -> dict[str, ComponentCode]:
        """Code by component, for the components whose classes no library provides."""
        if not self._published_sources:
            raise ValueError(f"{self._published_class} has no source file, so that it cannot be published.")
        require_closed(self._published_sources)
        kept = self.__dict__.get("_component_codes", {})
        codes = {}
        for name, module in self.components.items():
            code = kept.get(name)
            if code is None or code.cls is not type(_uncompiled(module)):
                code = _component_code(module)
            if code is None:
                continue
            if not code.text:
                raise ValueError(f"The class {code.cls} of the component {name!r} has no source file to publish.")
            require_standalone(code.text, f"The file of {code.cls}")
            codes[name] = code
        return codes


def _component_code(module: Any) -> ComponentCode | None:
    is_absent = module is None or isinstance(module, (list, tuple))
    return None if is_absent else class_code(type(_uncompiled(module)))


def _uncompiled(module: Any) -> Any:
    """The module under torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def _forget_origin(config_file: Path) -> None:
    """Drop the path that a component was loaded from: it is about this machine."""
    if config_file.is_file():
        config = read_json(config_file)
        if config.pop("_name_or_path", None) is not None:
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
