"""Loads a pipeline folder in two ways: with the package, and with `trust_remote_code=True` on a machine without it.

With the package, `PortablePipelineMixin` maps the names in `model_index.json` to the package's own classes, so that no
code of the folder runs. publishing.py writes such folders.
"""

import importlib
import importlib.util
import inspect
import os
import re
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .placement import PlacementMixin, warn_of_device_map
from .publishing import INDEX_NAME, LIBRARIES, PublishingMixin
from .weights import (
    PICKLE_SUFFIXES,
    StoredTensor,
    component_tensors,
    main_dtype,
    nonfinite_names,
    read_header,
    read_json,
    shortened,
)

HUB_OPTIONS = ("cache_dir", "force_download", "token", "revision", "local_files_only")
DEVICE_MAPS = ("balanced",)  # placement strategies of diffusers, not devices
_checked: weakref.WeakSet = weakref.WeakSet()  # models whose weights were compared with their files


# --- the mixin -----------------------------------------------------------------------------------------------------


class PortablePipelineMixin(PublishingMixin, PlacementMixin):
    """Loads and saves pipelines with or without the package; put it before `DiffusionPipeline` in the bases.

    The class sets `_published_modules` (see `PublishingMixin`), and `_original_files` and `_conversion_module` if
    checkpoints exist in an original layout.
    """

    # File names of the original layout: a folder with one of them and without an index is such a checkpoint.
    _original_files: tuple[str, ...] = ()
    # Relative name of the module that reads and writes the original layout. It is not published.
    _conversion_module: str | None = None

    # --- loading ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a pipeline from a folder or the Hub. With the package, `trust_remote_code` is not needed.

        As `DiffusionPipeline.from_pretrained`, with these differences: `dtype` (a torch.dtype or its name, or a dict
        of these by component) defaults to the dtype that each component is stored in; only safetensors weights are
        loaded; weights are checked for truncation, for missing and unexpected names and for NaN and infinity;
        `device` ("cpu", "cuda", ...) moves the pipeline there.

        Without the package diffusers loads the components itself, and this class checks what it is given: names, NaN
        and infinity. The transformer and the vision model take the stored dtype by default there as well; the VAE is
        float32 unless `dtype` says otherwise.

        Raises:
            FileNotFoundError: the folder is not a pipeline, or lacks weights.
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
        kwargs |= cls._load_tokenizer(folder, set(kwargs))
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
        """Load a checkpoint folder in the layout of the original release; needs the package.

        Args:
            directory: the checkpoint's folder; the class's `conversion()` module says which files it holds.
            dtype: a torch.dtype or its name; by default the stored one, by component.
            device: moves the pipeline there.
            overrides: replace components or set the pipeline's own options.

        Raises:
            RuntimeError: this class was loaded through remote code.
            ValueError: unknown options, an absent device; and what the conversion module raises.
        """
        if cls._package() is None:
            raise RuntimeError(
                "from_original needs the echo4o package, and this class was loaded through trust_remote_code. "
                "Install echo4o, or load a converted folder (`echo4o convert SRC DST`)."
            )
        weights_dtype = read_dtype(dtype)
        if isinstance(weights_dtype, dict):
            raise ValueError("from_original takes one dtype for all components.")
        check_device(device)
        cls._check_options(overrides)
        components = cls.conversion().components_from_original(directory, dtype=weights_dtype, skip=tuple(overrides))
        pipe = cls(**{**components, **overrides})
        return pipe if device is None else pipe.to(device)

    @classmethod
    def conversion(cls):
        """The module with `convert_to_diffusers(src, dst)`, `convert_to_original(src, dst)` and
        `components_from_original(directory, dtype, skip)`; needs the package."""
        # Imported by name: diffusers copies all modules that a published file imports relatively.
        assert cls._conversion_module is not None
        return importlib.import_module(cls._conversion_module, cls._package())

    @classmethod
    def is_original(cls, folder: str | os.PathLike) -> bool:
        """Whether a folder looks like a checkpoint in the original layout of this class's models."""
        has_index = Path(folder, INDEX_NAME).is_file()
        return not has_index and any(Path(folder, name).is_file() for name in cls._original_files)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline that shares the components and options of `pipeline`.

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
        """The components and options of this class, and of the published class that it may pass `**kwargs` to."""
        found = [inspect.signature(owner.__init__).parameters for owner in (cls._published_class, cls)]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {n: p for parameters in found for n, p in parameters.items() if n != "self" and p.kind in named}

    @classmethod
    def _check_options(cls, options: dict) -> None:
        parameters = cls._parameters()
        if unknown := [n for n in options if n not in parameters]:
            raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(parameters)}.")

    @classmethod
    def _local_folder(cls, name: str | os.PathLike, kwargs: dict) -> Path:
        require_name(name)
        return Path(name) if Path(name).is_dir() else Path(cls.download(str(name), **kwargs))

    @classmethod
    def stored_weights(cls, folder: Path) -> dict[str, dict[str, StoredTensor]]:
        """Component -> its stored tensors, as [`from_pretrained`] loads them. Raises as it does for absent files."""
        return cls._stored_weights(folder, set(), None)

    @classmethod
    def check_names(cls, component: str, module: torch.nn.Module, names: Iterable[str]) -> None:
        """Raise ValueError if the names of a component's stored tensors are not those of its model."""
        if problems := cls._different_names(component, module, names):
            raise ValueError(f"The weights cannot be used:\n  {shortened(problems)}")

    @classmethod
    def _different_names(cls, component: str, module: torch.nn.Module, names: Iterable[str]) -> list[str]:
        wanted, found = (cls._comparable_names(component, module, n) for n in (module.state_dict(), names))
        missing = [f"{component}: missing {n}" for n in sorted(wanted - found)]
        return missing + [f"{component}: unexpected {n}" for n in sorted(found - wanted)]

    @classmethod
    def _stored_weights(cls, folder: Path, passed: set[str], variant: str | None) -> dict[str, dict]:
        """Component -> its stored tensors, for every component of the index that has weights."""
        if not (folder / INDEX_NAME).is_file():
            if cls.is_original(folder):
                raise FileNotFoundError(
                    f"{folder} has no {INDEX_NAME}; it looks like a checkpoint in the original layout. Use "
                    f"{cls.__name__}.from_original, or convert it once with `echo4o convert SRC DST`."
                )
            raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no {INDEX_NAME}.")
        read_json(folder / INDEX_NAME)
        config = dict(cls.load_config(folder))
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
    def _load_tokenizer(cls, folder: Path, passed: set[str]) -> dict[str, Any]:
        """The tokenizer of a pipeline folder as an argument of this class; empty if it is passed, or the index has none.

        It is loaded here because the errors of transformers do not say which file is wrong.
        """
        entry: Any = read_json(folder / INDEX_NAME).get("tokenizer")
        if "tokenizer" in passed or not _is_component(entry) or entry[0] != "transformers":
            return {}
        tokenizer_class = getattr(importlib.import_module("transformers"), entry[1], None)
        if tokenizer_class is None:
            raise ValueError(f"{folder / INDEX_NAME}: transformers has no tokenizer {entry[1]}.")
        return {"tokenizer": load_tokenizer(folder / "tokenizer", tokenizer_class)}

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """As in diffusers; with the package, the classes named in `model_index.json` become the package's."""
        loaded: Any = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
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
        """Download a pipeline's folder from the Hub and return its path; passed components are not downloaded.

        Nothing is executed and no pickled weights are fetched. Raises FileNotFoundError for a repository that holds
        no pipeline and huggingface_hub's errors (RepositoryNotFoundError, ...) as they are.
        """
        if cls._package() is None:
            return str(super().download(pretrained_model_name, **kwargs))
        options = {k: kwargs[k] for k in HUB_OPTIONS if kwargs.get(k) is not None}
        index = read_json(download_index(pretrained_model_name, **options))
        wanted = [k for k, v in index.items() if not k.startswith("_") and _is_component(v) and k not in kwargs]
        patterns = [INDEX_NAME, "*.py", *(f"{component}/*" for component in wanted)]
        ignored = [f"*{suffix}" for suffix in PICKLE_SUFFIXES]
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, ignore_patterns=ignored, **options)

    @classmethod
    def _comparable_names(cls, component: str, module: torch.nn.Module, names: Iterable[str]) -> set[str]:
        """Names of a component's tensors, in memory or in its files, in one form that can be compared."""
        return set(names)

    def _check_loaded(self, stored: dict[str, dict[str, StoredTensor]]) -> None:
        problems = []
        for name, tensors in stored.items():
            module = getattr(self, name, None)
            if not isinstance(module, torch.nn.Module):
                continue
            state = module.state_dict()
            problems += [f"{name}: non-finite values in {n}" for n in nonfinite_names(state.items())]
            if getattr(module, "hf_quantizer", None) is None:  # quantizers store additional tensors
                problems += self._different_names(name, module, tensors)
        if problems:
            raise ValueError(f"The weights cannot be used:\n  {shortened(problems)}")

    def to(self, *args, **kwargs):
        """As `DiffusionPipeline.to`. Raises ValueError if the device is not available."""
        for value in (*args, kwargs.get("device")):
            if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                check_device(value)
        return super().to(*args, **kwargs)

    def register_modules(self, **kwargs):
        super().register_modules(**kwargs)
        if self._package() is None:
            self._check_loaded({n: t for n, m in kwargs.items() if (t := _tensors_of_origin(m))})
            _checked.update(m for m in kwargs.values() if isinstance(m, torch.nn.Module))


def qwen_names(module: torch.nn.Module, names: Iterable[str]) -> set[str]:
    """Names of a transformers Qwen2.5-VL's tensors, in memory or in its files, in one form.

    transformers stores the model under the names of its first version, and without a tied output head.
    """
    stored = (re.sub(r"^model\.(language_model|visual)\.", r"\1.", name) for name in names)
    stored = (re.sub(r"^language_model\.", "model.", name) for name in stored)
    config: Any = module.config
    return {name for name in stored if not (config.tie_word_embeddings and name == "lm_head.weight")}


def load_tokenizer(folder: Path, tokenizer_class: Any, needed: Iterable[str] = ()) -> Any:
    """Load a tokenizer from its files. `needed`: special tokens that it must have.

    Raises FileNotFoundError without files, and ValueError if they cannot be read or lack a token.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{folder} holds no tokenizer: it has neither tokenizer.json nor vocab.json.")
    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder))
    except Exception as error:  # transformers and tokenizers raise errors of any type for files that they cannot read
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {text}).") from error
    known = tokenizer.get_vocab()
    if lost := [token for token in needed if token not in known]:
        raise ValueError(f"{folder}: its tokenizer lacks {', '.join(lost)}.")
    return tokenizer


def download_index(repo: str, **options) -> str:
    """Download the `model_index.json` of a Hub repository and return its path.

    Raises FileNotFoundError for a repository without one, or if the Hub cannot be reached, and huggingface_hub's
    errors (RepositoryNotFoundError, ...) as they are.
    """
    try:
        return hf_hub_download(repo, INDEX_NAME, **options)
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError
        raise LocalEntryNotFoundError(
            f"{repo!r} is not in the local cache, and the Hub cannot be reached (or is disabled): check the "
            "connection, HF_ENDPOINT, HF_HUB_OFFLINE and local_files_only."
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"The repository {repo!r} is not a pipeline: it has no {INDEX_NAME}.") from error


def is_hub_name(name: str | os.PathLike) -> bool:
    """Whether `name`, which is not a folder, can be the name of a Hub repository (owner/name)."""
    return isinstance(name, str) and not name.startswith((".", "/", "~", "\\")) and name.count("/") == 1


def require_name(name: Any) -> None:
    """Check that `name` is a folder or can be the name of a Hub repository.

    Raises ValueError unless it is a string or a path, and FileNotFoundError if it is neither.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise ValueError(f"A folder or the name of a Hub repository is needed, not {name!r}.")
    if not Path(name).is_dir() and not is_hub_name(name):
        raise FileNotFoundError(f"There is no folder {str(name)!r} (a Hub repository is called owner/name).")


def _tensors_of_origin(module: Any) -> dict[str, StoredTensor]:
    """The stored tensors of a model that was loaded from a folder and not changed since; otherwise empty."""
    origin = getattr(getattr(module, "config", None), "_name_or_path", None)
    if not isinstance(module, torch.nn.Module) or not origin or module in _checked:
        return {}
    files = sorted(Path(origin).glob("*.safetensors"))
    if not files or getattr(module, "peft_config", None):
        return {}
    if any(f.name.count(".") == 1 for f in files):
        return component_tensors(Path(origin))
    return {name: tensor for file in files for name, tensor in read_header(file).items()}  # variants only


def _is_component(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _package_module(package: str, library: str) -> str:
    """Import the package's module that a component's file was published from; returns `library` if there is none."""
    stem = library.rpartition(".")[2]
    if library in LIBRARIES or not stem.isidentifier() or importlib.util.find_spec(f"{package}.{stem}") is None:
        return library
    # diffusers finds components in imported modules only.
    return importlib.import_module(f"{package}.{stem}").__name__


def read_dtype(value: Any) -> torch.dtype | dict[str, torch.dtype | None] | None:
    """A floating torch.dtype, from a dtype or its name. None and "auto" mean the stored dtype and give None.

    A dict of such values gives a dict. Raises ValueError for anything else.
    """
    if isinstance(value, dict):
        return {name: _read_one_dtype(entry) for name, entry in value.items()}
    return _read_one_dtype(value)


def _read_one_dtype(value: Any) -> torch.dtype | None:
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={value!r} is not a floating dtype: use torch.bfloat16 or 'bfloat16', and so on.")
    return dtype


def check_device(device: str | int | torch.device | None, strategies: tuple[str, ...] = ()) -> None:
    """Raise ValueError for an unknown or unavailable device; None and `strategies` are accepted."""
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
        raise ValueError(f"The device {str(wanted)!r} is not available: there is no {wanted.type} here. Use 'cpu'.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"The device {str(wanted)!r} is not available: there are {torch.cuda.device_count()} CUDA devices."
        )
