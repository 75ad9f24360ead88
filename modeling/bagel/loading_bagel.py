"""One folder, two ways to load it: with the package, and with `trust_remote_code=True` on a machine without it.

Stock diffusers writes `diffusers_modules.local.*` or the package's module path into `model_index.json` and leaves the
code out, so that what it saves loads in the process that saved it only. `PortablePipelineMixin` writes the list form
that `DiffusionPipeline.from_pretrained(x, trust_remote_code=True)` understands, puts the source files beside it, and
reads the same folder with the package's own classes when the package is there.

This file is published beside the pipeline's: it imports nothing of the package.
"""

import ast
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from .weights_bagel import PICKLE_SUFFIXES, StoredTensor, component_tensors, main_dtype, nonfinite_names, read_json

INDEX_NAME = "model_index.json"
PIPELINE_FILE = "pipeline.py"  # the only name that diffusers looks for without `custom_pipeline=`
_DYNAMIC_ROOT = "diffusers_modules"  # where diffusers puts code that it loads from a folder or a repository
_LIBRARIES = ("diffusers", "transformers", "tokenizers", "onnxruntime")


# --- source files --------------------------------------------------------------------------------------------------


def relative_imports(source: str) -> list[str]:
    """The sibling modules that a source text imports (`from .x import y`), sorted."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.level]
    outside = [n for n in nodes if n.level > 1 or not n.module or "." in n.module]
    if outside:
        raise ValueError(f"line {outside[0].lineno} imports from outside its own folder; such code is not portable.")
    return sorted({n.module for n in nodes})


def pipeline_sources(file: str | Path) -> dict[str, str]:
    """Published file name -> text, for a pipeline's file (published as `pipeline.py`) and the siblings it imports."""
    file = Path(file)
    text = file.read_text("utf-8")
    siblings = [f"{name}.py" for name in relative_imports(text)]
    return {PIPELINE_FILE: text} | {name: (file.parent / name).read_text("utf-8") for name in siblings}


def require_flat(sources: dict[str, str]) -> dict[str, str]:
    """`sources`; ValueError when a sibling needs one that `pipeline.py` does not import: diffusers copies no others."""
    for name, text in sources.items():
        if deeper := [n for n in relative_imports(text) if f"{n}.py" not in sources]:
            raise ValueError(
                f"{name} imports {deeper}, which the pipeline's file must import as well to be published."
            )
    return sources


def standing_alone(text: str, owner: Any) -> str:
    """`text`, the source of a component; ValueError when it needs a sibling, which the Hub would not fetch."""
    if siblings := relative_imports(text):
        raise ValueError(f"{owner} imports {siblings}: a component's file is fetched alone and must stand alone.")
    return text


def write_sources(folder: Path, pipeline: dict[str, str], components: dict[str, tuple[str, str]]) -> None:
    """Write a pipeline's files into `folder` and each component's (stem, text) into the component's own folder."""
    for name, text in pipeline.items():
        (folder / name).write_text(text, "utf-8")
    for component, (stem, text) in components.items():
        (folder / component).mkdir(exist_ok=True)
        for old in (folder / component).glob("*.py"):
            old.unlink()
        (folder / component / f"{stem}.py").write_text(text, "utf-8")


def _module_file(cls: type) -> Path | None:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


# --- the mixin -----------------------------------------------------------------------------------------------------


class PortablePipelineMixin:
    """Put before `DiffusionPipeline`: `class MyPipeline(PortablePipelineMixin, DiffusionPipeline)`.

    The class that names this mixin among its bases is the one that is published; classes derived from it are saved
    as it. Components whose classes belong to no known library are published with the file that defines them.
    """

    _published_class: type
    _published_sources: dict[str, str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if PortablePipelineMixin in cls.__bases__:
            # Read now: diffusers keeps loaded code in one flat folder, where the next repository overwrites it.
            file = _module_file(cls)
            cls._published_class = cls
            cls._published_sources = pipeline_sources(file) if file else {}

    @classmethod
    def _package(cls) -> str | None:
        """The package that the published class lives in; None when diffusers loaded it through remote code."""
        package = cls._published_class.__module__.rpartition(".")[0]
        return package if package and not package.startswith(_DYNAMIC_ROOT) else None

    # --- loading ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a pipeline from a folder or the Hub, without `trust_remote_code` when the package is installed.

        As `DiffusionPipeline.from_pretrained`, with these differences: `dtype` (a torch.dtype, or a dict by
        component) defaults to the dtype that each component is stored in; only safetensors weights are loaded;
        weights are checked for truncation, for missing and unexpected names and for NaN and infinity;
        `device` ("cpu", "cuda", ...) moves the pipeline there.

        Raises:
            FileNotFoundError: the folder is no pipeline, or lacks weights.
            ValueError: wrong class, damaged, pickled, missing, unexpected or non-finite weights, absent device.
        """
        if cls._package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        device = kwargs.pop("device", None)
        check_device(device)
        check_device(kwargs.get("device_map"))
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which are not loaded.")
        folder = cls._local_folder(pretrained_model_name_or_path, kwargs)
        stored = cls._stored_weights(folder, set(kwargs), kwargs.get("variant"))
        dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
        if dtype is None or (isinstance(dtype, dict) and "default" not in dtype):
            dtype = {name: main_dtype(t) for name, t in stored.items()} | (dtype or {})
        kwargs["dtype"] = dtype
        pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipe._check_loaded(stored)
        return pipe if device is None else pipe.to(device)

    @classmethod
    def from_original(cls, directory: str | os.PathLike, dtype: torch.dtype | None = None, **overrides):
        """Load an original BAGEL / Echo-4o checkpoint folder directly; needs the package.

        `directory` holds ema.safetensors (or shards with an index), ae.safetensors, llm_config.json,
        vit_config.json, config.json and the tokenizer's files. `dtype` defaults to the stored one, by component.
        `overrides` replace components or set the pipeline's own options.
        Raises what `echo4o.modeling.bagel.convert` raises, and RuntimeError in remote-code mode.
        """
        package = cls._package()
        if package is None:
            raise RuntimeError(
                "from_original needs the echo4o package, and this class was loaded through trust_remote_code. "
                "Install echo4o, or load a converted folder (`echo4o convert SRC DST`)."
            )
        # By name: diffusers copies whatever a published file imports relatively, wherever the import stands.
        convert = importlib.import_module(f"{package}.convert")
        components = convert.components_from_original(directory, dtype=dtype, skip=tuple(overrides))
        return cls(**{**components, **overrides})

    @classmethod
    def _local_folder(cls, name: str | os.PathLike, kwargs: dict) -> Path:
        if Path(name).is_dir():
            return Path(name)
        if isinstance(name, os.PathLike) or str(name).startswith((".", "/", "~", "\\")) or str(name).count("/") > 1:
            raise FileNotFoundError(f"There is no folder {str(name)!r}.")
        return Path(cls.download(str(name), **kwargs))

    @classmethod
    def _stored_weights(cls, folder: Path, passed: set[str], variant: str | None) -> dict[str, dict]:
        """Component -> its stored tensors, for every component of the index that has weights of its own."""
        if not (folder / INDEX_NAME).is_file():
            if (folder / "llm_config.json").is_file() or (folder / "ema.safetensors").is_file():
                raise FileNotFoundError(
                    f"{folder} has no {INDEX_NAME}; it looks like an original BAGEL checkpoint. Use "
                    f"{cls.__name__}.from_original, or convert it once with `echo4o convert SRC DST`."
                )
            raise FileNotFoundError(f"{folder} is no pipeline folder: it has no {INDEX_NAME}.")
        components = [k for k, v in cls.load_config(folder).items() if _is_component(v) and k not in passed]
        lost = [c for c in components if not (folder / c).is_dir()]
        if lost:
            raise FileNotFoundError(f"{folder} lacks the component folders that its index names: {', '.join(lost)}.")
        weighted = [c for c in components if (folder / c / "config.json").is_file()]
        return {c: component_tensors(folder / c, variant) for c in weighted}

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in diffusers; with the package, `model_index.json` is made to name the package's classes."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        package = cls._package()
        if package is None:
            return loaded
        config = dict(loaded[0] if isinstance(loaded, tuple) else loaded)
        name = config.get("_class_name")
        name = name[-1] if isinstance(name, (list, tuple)) else name
        if name not in {c.__name__ for c in cls.__mro__}:
            raise ValueError(f"{pretrained_model_name_or_path} holds a {name}, not a {cls._published_class.__name__}.")
        config["_class_name"] = name
        for component, value in config.items():
            if not component.startswith("_") and _is_component(value):
                config[component] = [_package_module(package, value[0]), value[1]]
        return (config, *loaded[1:]) if isinstance(loaded, tuple) else config

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch the pipeline's folder from the Hub and return where it lies; components passed in are left out.

        Nothing is executed and no pickled weights are fetched. Raises FileNotFoundError for a repository that holds
        no pipeline and huggingface_hub's errors (RepositoryNotFoundError, ...) as they are.
        """
        if cls._package() is None:
            return super().download(pretrained_model_name, **kwargs)
        names = ("cache_dir", "force_download", "token", "revision", "local_files_only")
        options = {k: kwargs[k] for k in names if kwargs.get(k) is not None}
        try:
            index = read_json(hf_hub_download(pretrained_model_name, INDEX_NAME, **options))
        except EntryNotFoundError as error:
            raise FileNotFoundError(
                f"The repository {pretrained_model_name!r} is no pipeline: it has no {INDEX_NAME}."
            ) from error
        wanted = [k for k, v in index.items() if not k.startswith("_") and _is_component(v) and k not in kwargs]
        patterns = [INDEX_NAME, "*.py", *(f"{component}/*" for component in wanted)]
        ignored = [f"*{suffix}" for suffix in PICKLE_SUFFIXES]
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, ignore_patterns=ignored, **options)

    def _check_loaded(self, stored: dict[str, dict[str, StoredTensor]]) -> None:
        problems = []
        for name, tensors in stored.items():
            module = getattr(self, name, None)
            if not isinstance(module, torch.nn.Module):
                continue
            state = module.state_dict()
            problems += [f"{name}: non-finite values in {n}" for n in nonfinite_names(state.items())]
            if getattr(module, "hf_quantizer", None) is None:  # a quantizer stores tensors of its own
                problems += [f"{name}: missing {n}" for n in sorted(set(state) - set(tensors))]
                problems += [f"{name}: unexpected {n}" for n in sorted(set(tensors) - set(state))]
        if problems:
            raise ValueError("The weights cannot be used:\n  " + "\n  ".join(problems))

    def to(self, *args, **kwargs):
        """As `DiffusionPipeline.to`; ValueError when the device asked for is absent."""
        for value in (*args, kwargs.get("device")):
            if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                check_device(value)
        return super().to(*args, **kwargs)

    # --- saving ---

    def register_modules(self, **kwargs):
        super().register_modules(**kwargs)
        # Read now, for the reason given in __init_subclass__.
        codes = {name: _component_code(module) for name, module in kwargs.items()}
        known = self.__dict__.get("_component_codes", {})
        self.__dict__["_component_codes"] = known | {name: code for name, code in codes.items() if code}

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs):
        """Save a folder that loads with the package and, through `trust_remote_code=True`, without it.

        As `DiffusionPipeline.save_pretrained` (`push_to_hub`, `max_shard_size`, `variant`, ...); the source files
        go into the folder. Raises ValueError for `safe_serialization=False`, for components with LoRA layers still
        injected (their weights would not load again) and for a component whose class has no file of its own.
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
        self._codes_to_publish()
        return super().save_pretrained(str(save_directory), safe_serialization=True, **kwargs)

    def save_config(self, save_directory: str | os.PathLike):
        """Write model_index.json and the source files; the last step of save_pretrained before an upload."""
        codes = self._codes_to_publish()
        super().save_config(save_directory)
        folder = Path(save_directory)
        write_sources(folder, self._published_sources, {n: (stem, text) for n, (_, stem, text) in codes.items()})
        for component in self.components:
            _forget_origin(folder / component / "config.json")
        index = read_json(folder / INDEX_NAME)
        index.pop("_name_or_path", None)
        index["_class_name"] = [Path(PIPELINE_FILE).stem, self._published_class.__name__]
        for name, (cls, stem, _) in codes.items():
            index[name] = [stem, cls.__name__]
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")

    def _codes_to_publish(self) -> dict[str, tuple[type, str, str]]:
        """Component -> (class, file stem, source text), for the components whose classes no library provides."""
        if not self._published_sources:
            raise ValueError(f"{self._published_class} has no source file, so that it cannot be published.")
        require_flat(self._published_sources)
        kept = self.__dict__.get("_component_codes", {})
        codes = {}
        for name, module in self.components.items():
            code = kept.get(name)
            if code is None or code[0] is not type(_plain(module)):
                code = _component_code(module)
            if code is None:
                continue
            if code[1] is None:
                raise ValueError(f"The class {code[0]} of the component {name!r} has no source file to publish.")
            codes[name] = (code[0], code[1], standing_alone(code[2], f"The file of {code[0]}"))
        return codes


def _component_code(module: Any) -> tuple[type, str | None, str | None] | None:
    if module is None or isinstance(module, (list, tuple)):
        return None
    cls = type(_plain(module))
    if cls.__module__.split(".")[0] in _LIBRARIES:
        return None
    file = _module_file(cls)
    return (cls, file.stem, file.read_text("utf-8")) if file else (cls, None, None)


def _plain(module: Any) -> Any:
    """The module under torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def _is_component(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], str)


def _package_module(package: str, library: str) -> str:
    """The package's module that a component's file was published from, imported; else `library` unchanged."""
    stem = library.rpartition(".")[2]
    if library in _LIBRARIES or not stem.isidentifier() or importlib.util.find_spec(f"{package}.{stem}") is None:
        return library
    # diffusers looks components up among imported modules only.
    return importlib.import_module(f"{package}.{stem}").__name__


def _forget_origin(config_file: Path) -> None:
    """Drop the path that a component was loaded from: it says something about this machine and helps nobody."""
    if config_file.is_file():
        config = read_json(config_file)
        if config.pop("_name_or_path", None) is not None:
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def check_device(device: str | int | torch.device | None) -> None:
    """Raise ValueError when `device` ("cuda", "cuda:1", 0, ...) is absent; None and placement strategies pass."""
    if device is None or device in ("balanced", "auto", "sequential", "balanced_low_0"):
        return
    try:
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        return  # not a device: `to("float16")`-like arguments and device maps are diffusers' to judge
    if wanted.type in ("cpu", "meta"):
        return
    backend = getattr(torch, wanted.type, None) or getattr(torch.backends, wanted.type, None)
    if backend is None or not backend.is_available():
        raise ValueError(f"The device {str(wanted)!r} was asked for, but {wanted.type} is not available; 'cpu' is.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"The device {str(wanted)!r} was asked for; there are {torch.cuda.device_count()} of them.")
