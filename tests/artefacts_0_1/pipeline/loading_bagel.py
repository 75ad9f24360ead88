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
import inspect
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .placement_bagel import PlacementMixin, warn_of_device_map
from .weights_bagel import (
    PICKLE_SUFFIXES,
    StoredTensor,
    component_tensors,
    main_dtype,
    nonfinite_names,
    read_header,
    read_json,
    shortened,
)

INDEX_NAME = "model_index.json"
PIPELINE_FILE = "pipeline.py"  # the only name that diffusers looks for without `custom_pipeline=`
_DYNAMIC_ROOT = "diffusers_modules"  # where diffusers puts code that it loads from a folder or a repository
_LIBRARIES = ("diffusers", "transformers", "tokenizers", "onnxruntime")
DEVICE_MAPS = ("balanced",)  # placement strategies, no devices
_checked: weakref.WeakSet = weakref.WeakSet()  # models whose weights were compared with their files


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


class PortablePipelineMixin(PlacementMixin):
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

        As `DiffusionPipeline.from_pretrained`, with these differences: `dtype` (a torch.dtype or its name, or a dict
        of these by component) defaults to the dtype that each component is stored in; only safetensors weights are
        loaded; weights are checked for truncation, for missing and unexpected names and for NaN and infinity;
        `device` ("cpu", "cuda", ...) moves the pipeline there.

        Without the package diffusers loads the components itself, and this class checks what it is given: names, NaN
        and infinity. The transformer and the vision model take the stored dtype by default there as well; the VAE is
        float32 unless `dtype` says otherwise.

        Raises:
            FileNotFoundError: the folder is no pipeline, or lacks weights.
            ValueError: wrong class, damaged, pickled, missing, unexpected or non-finite weights, absent device or
                unknown dtype.
        """
        if cls._package() is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        device = kwargs.pop("device", None)
        check_device(device)
        check_device(kwargs.get("device_map"), DEVICE_MAPS)
        dtype = read_dtype(kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"])
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which are not loaded.")
        folder = cls._local_folder(pretrained_model_name_or_path, kwargs)
        stored = cls._stored_weights(folder, set(kwargs), kwargs.get("variant"))
        if dtype is None or isinstance(dtype, dict):
            given = {name: value for name, value in (dtype or {}).items() if value is not None}
            default = given.get("default")
            dtype = {name: default or main_dtype(t) for name, t in stored.items()} | given
        kwargs["dtype"] = dtype
        pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipe._check_loaded(stored)
        warn_of_device_map("the pipeline", pipe.hf_device_map)
        return pipe if device is None else pipe.to(device)

    @classmethod
    def from_original(
        cls,
        directory: str | os.PathLike,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        **overrides,
    ):
        """Load an original BAGEL / Echo-4o checkpoint folder directly; needs the package.

        `directory` holds ema.safetensors (or shards with an index), ae.safetensors, llm_config.json,
        vit_config.json, config.json and the tokenizer's files. `dtype` (a torch.dtype or its name) defaults to the
        stored one, by component; `device` moves the pipeline there. `overrides` replace components or set the
        pipeline's own options.
        Raises what `echo4o.modeling.bagel.convert` raises, ValueError for other options and an absent device, and
        RuntimeError in remote-code mode.
        """
        package = cls._package()
        if package is None:
            raise RuntimeError(
                "from_original needs the echo4o package, and this class was loaded through trust_remote_code. "
                "Install echo4o, or load a converted folder (`echo4o convert SRC DST`)."
            )
        dtype = read_dtype(dtype)
        if isinstance(dtype, dict):
            raise ValueError("from_original takes one dtype for all components.")
        check_device(device)
        cls._check_options(overrides)
        # By name: diffusers copies whatever a published file imports relatively, wherever the import stands.
        convert = importlib.import_module(f"{package}.convert")
        components = convert.components_from_original(directory, dtype=dtype, skip=tuple(overrides))
        pipe = cls(**{**components, **overrides})
        return pipe if device is None else pipe.to(device)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline of the same components and options as `pipeline`, which it shares them with.

        `kwargs` replace components and options. `dtype` converts the components, in both pipelines; they stay as they
        are without it. Raises ValueError for options that this class does not have, and when `pipeline` lacks a
        component that it needs.
        """
        dtype = read_dtype(kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"])
        kwargs.pop("dtype", None)
        if isinstance(dtype, dict):
            raise ValueError("from_pipe takes one dtype for all components.")
        cls._check_options(kwargs)
        parameters = cls._parameters()
        given = {n: v for n, v in {**pipeline.config, **pipeline.components}.items() if n in parameters} | kwargs
        lost = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
        if lost:
            raise ValueError(f"{type(pipeline).__name__} has no {', '.join(lost)}, which {cls.__name__} needs.")
        pipe = cls(**given)
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe if dtype is None else pipe.to(dtype=dtype)

    @classmethod
    def _parameters(cls) -> dict[str, inspect.Parameter]:
        """The components and options of this class, which may hand `**kwargs` on to the published one."""
        found = [inspect.signature(owner.__init__).parameters for owner in (cls._published_class, cls)]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {n: p for of in found for n, p in of.items() if n != "self" and p.kind in named}

    @classmethod
    def _check_options(cls, options: dict) -> None:
        parameters = cls._parameters()
        if unknown := [n for n in options if n not in parameters]:
            raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(parameters)}.")

    @classmethod
    def _local_folder(cls, name: str | os.PathLike, kwargs: dict) -> Path:
        if not isinstance(name, (str, os.PathLike)) or not str(name):
            raise ValueError(f"A folder or the name of a Hub repository is needed, not {name!r}.")
        if Path(name).is_dir():
            return Path(name)
        if isinstance(name, os.PathLike) or name.startswith((".", "/", "~", "\\")) or name.count("/") != 1:
            raise FileNotFoundError(f"There is no folder {str(name)!r} (a Hub repository is called owner/name).")
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
        read_json(folder / INDEX_NAME)
        config = cls.load_config(folder)
        components = [k for k, v in config.items() if _is_component(v) and k not in passed]
        required = {n for n, p in cls._parameters().items() if p.default is p.empty}
        if unnamed := sorted(required - passed - set(components)):
            raise ValueError(f"{folder / INDEX_NAME} names no library and class for {', '.join(unnamed)}.")
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
        except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError, too
            raise LocalEntryNotFoundError(
                f"{pretrained_model_name!r} is not in the local cache, and the Hub cannot be reached (or was not to be "
                "asked): look at the connection, HF_ENDPOINT, HF_HUB_OFFLINE and local_files_only."
            ) from error
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
            raise ValueError(f"The weights cannot be used:\n  {shortened(problems)}")

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
        if self._package() is None:
            self._check_loaded({n: t for n, m in kwargs.items() if (t := _tensors_of_origin(m))})
            _checked.update(m for m in kwargs.values() if isinstance(m, torch.nn.Module))

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs):
        """Save a folder that loads with the package and, through `trust_remote_code=True`, without it.

        As `DiffusionPipeline.save_pretrained` (`push_to_hub`, `max_shard_size`, `variant`, ...); the source files
        go into the folder. Raises ValueError for `safe_serialization=False`, for components with LoRA layers still
        injected (their weights would not load again), for weights that layerwise casting made 8 bit, and for a component whose class has no file of its own.
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
        for name, module in self._modules_by_name().items():
            if any(p.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for p in module.parameters()):
                raise ValueError(
                    f"{name} was rounded to 8 bits by enable_layerwise_casting, and what it was cannot be had back: "
                    "save a pipeline on which it was not called."
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


def _tensors_of_origin(module: Any) -> dict[str, StoredTensor]:
    """The stored tensors of a model that was loaded from a folder of its own and is as it was then; else nothing."""
    origin = getattr(getattr(module, "config", None), "_name_or_path", None)
    if not isinstance(module, torch.nn.Module) or not origin or module in _checked:
        return {}
    files = sorted(Path(origin).glob("*.safetensors"))
    if not files or getattr(module, "peft_config", None):
        return {}
    if any(f.name.count(".") == 1 for f in files):
        return component_tensors(Path(origin))
    return {name: tensor for file in files for name, tensor in read_header(file).items()}  # variants alone


def _is_component(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, str) for v in value)


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


def read_dtype(value: Any) -> torch.dtype | dict[str, torch.dtype | None] | None:
    """A floating torch.dtype from itself or its name; None, the stored one, from None or "auto"; dicts by entry.

    Raises ValueError for anything else.
    """
    if isinstance(value, dict):
        return {name: read_dtype(of) for name, of in value.items()}
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={value!r} is no floating dtype: use torch.bfloat16 or 'bfloat16', and so on.")
    return dtype


def check_device(device: str | int | torch.device | None, strategies: tuple[str, ...] = ()) -> None:
    """Raise ValueError when `device` ("cuda", "cuda:1", 0, ...) is none or absent; None and `strategies` pass."""
    if device is None or (isinstance(device, str) and device in strategies):
        return
    try:
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        known = ", ".join(map(repr, ("cpu", "cuda", "cuda:1", *strategies)))
        raise ValueError(f"The device {device!r} is unknown; use {known}, ...") from error
    if wanted.type in ("cpu", "meta"):
        return
    backend = getattr(torch, wanted.type, None) or getattr(torch.backends, wanted.type, None)
    if backend is None or not backend.is_available():
        raise ValueError(f"The device {str(wanted)!r} was asked for, but {wanted.type} is not available; 'cpu' is.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"The device {str(wanted)!r} was asked for; there are {torch.cuda.device_count()} of them.")
