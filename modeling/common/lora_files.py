"""Finds, reads, checks and writes files of LoRA adapters.

diffusers and PEFT load the weights that fit and warn about the rest. Here an adapter that does not fit completely is an
error.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from .adapter_presets import PRESET_KEY, SamplingPreset
from .weights import PICKLE_SUFFIXES, nonfinite_names, read_header, read_json, refuse_pickles, shortened

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # diffusers' entry in the header of a safetensors file
_PEFT_PREFIX = "base_model.model."
# Values of `init_lora_weights` that change the base weights.
_CHANGES_BASE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")


# --- finding ---------------------------------------------------------------------------------------------------------


def find_adapter(
    source: str | os.PathLike, weight_name: str | None = None, subfolder: str | None = None, **hub
) -> Path:
    """The adapter's safetensors file. From the Hub, PEFT's configuration is downloaded to the same folder.

    Args:
        source: a file, a folder, or the name of a Hub repository.
        hub: options of `hf_hub_download` (revision, token, cache_dir, force_download, local_files_only).

    Raises:
        ValueError: pickled weights, or several files to choose from.
        FileNotFoundError: there is no adapter. Errors of huggingface_hub are passed on.
    """
    if weight_name is not None and Path(weight_name).suffix != ".safetensors":
        raise ValueError(f"weight_name={weight_name!r}: only .safetensors files are loaded; pickles can run code.")
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: only .safetensors files are loaded; pickles can run code.")
        return path
    if path.is_dir():
        return _in_folder(path / (subfolder or ""), weight_name)
    if isinstance(source, os.PathLike) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f"There is no adapter {str(source)!r} (names of Hub repositories are owner/name).")
    file = _on_hub(source, weight_name, {"subfolder": subfolder, **hub})
    if file.name != DIFFUSERS_FILE:
        with contextlib.suppress(EntryNotFoundError):  # read_adapter raises if it is needed
            hf_hub_download(source, PEFT_CONFIG, subfolder=subfolder, **hub)
    return file


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    names = sorted(f.name for f in folder.glob("*.safetensors"))
    if not names:
        refuse_pickles(folder)
    return folder / _choose(names, weight_name, str(folder))


def _on_hub(repo: str, weight_name: str | None, hub: dict) -> Path:
    unreachable = None
    for name in (weight_name,) if weight_name else (DIFFUSERS_FILE, PEFT_FILE):
        try:
            return Path(hf_hub_download(repo, name, **hub))
        except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError
            unreachable = error
        except EntryNotFoundError:
            continue
    if unreachable is not None:
        raise LocalEntryNotFoundError(
            f"The adapter {repo!r} is not in the local cache, and the Hub cannot be reached (or is disabled)."
        ) from unreachable
    options = {name: hub[name] for name in ("revision", "token") if hub.get(name) is not None}
    prefix = f"{hub['subfolder']}/" if hub["subfolder"] else ""
    inside = [n.removeprefix(prefix) for n in list_repo_files(repo, **options) if n.startswith(prefix)]
    names = sorted(n for n in inside if "/" not in n and n.endswith(".safetensors"))
    pickles = [n for n in inside if "/" not in n and n.endswith(PICKLE_SUFFIXES)]
    if pickles and not names:
        raise ValueError(f"{repo} holds pickled weights ({', '.join(pickles)}), which are not loaded.")
    return Path(hf_hub_download(repo, _choose(names, weight_name, repo), **hub))


def _choose(names: list[str], weight_name: str | None, where: str) -> str:
    if weight_name is not None:
        if weight_name not in names:
            raise FileNotFoundError(f"{where} has no {weight_name!r}; it has {', '.join(names) or 'no safetensors'}.")
        return weight_name
    known = [n for n in (DIFFUSERS_FILE, PEFT_FILE) if n in names]
    if len(known or names) != 1:
        what = f"several adapters ({', '.join(known or names)}): name one with weight_name" if names else "no adapter"
        raise (ValueError if names else FileNotFoundError)(f"{where} holds {what}.")
    return (known or names)[0]


# --- reading and writing ---------------------------------------------------------------------------------------------


def read_adapter(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Read the weights, named `transformer.*`, and the configuration; None if the file has none.

    The configuration has the adapter's sampling preset, if there is one, under the key `sampling_preset`.
    Reads the formats of diffusers and PEFT. Raises ValueError for damaged files and for PEFT's files without
    configuration.
    """
    read_header(file)
    with safe_open(file, "pt") as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}
        header = stored.metadata() or {}
    if any(name.startswith(_PEFT_PREFIX) for name in state):
        config_file = file.parent / PEFT_CONFIG
        if not config_file.is_file():
            raise ValueError(f"{file} was written by PEFT, but {PEFT_CONFIG} is missing: its alpha is unknown.")
        state = {f"transformer.{name.removeprefix(_PEFT_PREFIX)}": tensor for name, tensor in state.items()}
        return state, read_json(config_file)
    raw = header.get(METADATA_KEY)
    if raw is None:
        return state, None
    try:
        settings = json.loads(raw)
        preset = {PRESET_KEY: json.loads(header[PRESET_KEY])} if PRESET_KEY in header else {}
        return state, {name.removeprefix("transformer."): value for name, value in settings.items()} | preset
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} has an unreadable {METADATA_KEY!r} in its header: {error}.") from error


def write_adapter(
    file: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], preset: SamplingPreset | None = None
) -> None:
    """Write an adapter in the format of diffusers, with its configuration in the header of the file.

    Args:
        tensors: named `transformer.*`.
        settings: of `LoraConfig.to_dict()`. Sets are stored as lists, enumerations as their values; options without a
            JSON form are dropped.
        preset: how to sample with the adapter.
    """
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in settings.items()}
    is_json = (str, int, float, bool, list, dict, type(None))
    stored = {f"transformer.{k}": v for k, v in plain.items() if isinstance(v, is_json)}
    header = {"format": "pt", METADATA_KEY: json.dumps(stored, sort_keys=True)}
    if preset is not None:
        header[PRESET_KEY] = json.dumps(preset.to_json())
    save_file(tensors, file, metadata=header)


def lora_config(settings):
    """A `LoraConfig` from a `LoraConfig` or from its options as stored.

    Options that the installed PEFT does not know are dropped if they are off. Raises ValueError if they are on, and for
    configurations of other methods than LoRA.
    """
    from peft import LoraConfig

    if isinstance(settings, LoraConfig):
        settings = settings.to_dict()
    if not isinstance(settings, dict) or str(settings.get("peft_type", "LORA")) not in ("LORA", "PeftType.LORA"):
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"The adapter's configuration has the type {kind}; only LORA is supported.")
    settings = {name: value for name, value in settings.items() if name != PRESET_KEY}
    known = LoraConfig.__dataclass_fields__
    if foreign := [name for name, value in settings.items() if name not in known and value]:
        raise ValueError(f"The installed PEFT does not know the adapter's options {', '.join(foreign)}: update peft.")
    initialization = settings.get("init_lora_weights", True)
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGES_BASE_WEIGHTS):
        raise ValueError(
            f"The adapter was initialized by {initialization!r}, which changes the base weights: with the original "
            "ones it gives other images. Convert it first with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    try:
        # Loading replaces all initial values: the default initialization avoids computing them.
        known_settings: dict[str, Any] = {name: value for name, value in settings.items() if name in known}
        known_settings["init_lora_weights"] = True
        return LoraConfig(**known_settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The adapter's configuration cannot be used: {error}") from error


# --- checking --------------------------------------------------------------------------------------------------------


def check_adapter(transformer: torch.nn.Module, state: dict[str, torch.Tensor], config) -> None:
    """Raise ValueError unless the adapter is complete and fits the model.

    Args:
        state: the adapter's weights, named as in the transformer.
        config: its `LoraConfig`.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    if not state:
        raise ValueError("The adapter has no weights.")
    layers = _linear_layers(transformer)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    if any(layer.weight.dtype in _FP8 for layer in layers.values()):
        raise ValueError(
            "Load adapters before enable_layerwise_casting, so that their own weights are not cast to 8 bits."
        )
    unknown = []
    for name, tensor in state.items():
        match = _PART.fullmatch(name)
        if match is None or match[1] not in layers:
            unknown.append(name)
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    if unknown:
        raise ValueError(
            f"The adapter does not belong to this model, which has no layers for {shortened(unknown, ', ', 3)}."
        )
    wanted = {name for name in layers if check_target_module_exists(config, name)}
    if absent := sorted(wanted - set(parts)):
        raise ValueError(f"The adapter is incomplete: it lacks weights of {shortened(absent, ', ', 3)}.")
    if extra := sorted(set(parts) - wanted):
        raise ValueError(
            f"The adapter has weights of {shortened(extra, ', ', 3)}, which its configuration does not name "
            f"(target_modules={config.target_modules!r})."
        )
    problems = [p for name, tensors in parts.items() for p in _misfits(name, tensors, layers[name], config)]
    problems += [f"non-finite values in {name}" for name in nonfinite_names(state.items())]
    if problems:
        raise ValueError(f"The adapter cannot be used: {shortened(problems, '; ', 3)}.")


def matrix_names(transformer: torch.nn.Module) -> list[str]:
    """Names of the modules that can have an adapter."""
    return list(_linear_layers(transformer))


def _linear_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The transformer's linear layers by name, including those with adapters."""
    layers = {}
    for name, module in transformer.named_modules():
        layer = getattr(module, "base_layer", module)
        is_inside_adapter = ".base_layer" in name or ".lora_" in name
        if isinstance(layer, torch.nn.Linear) and not is_inside_adapter:
            layers[name.removeprefix("_orig_mod.").replace("._orig_mod", "")] = layer
    return layers


def _misfits(name: str, tensors: dict[str, torch.Tensor], layer: torch.nn.Linear, config) -> list[str]:
    from peft.utils.other import get_pattern_key

    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    shapes = {"lora_A.weight": (rank, layer.in_features), "lora_B.weight": (layer.out_features, rank)}
    if config.lora_bias:
        shapes["lora_B.bias"] = (layer.out_features,)
    if config.use_dora:
        shapes["lora_magnitude_vector"] = (layer.out_features,)
    if set(tensors) != set(shapes):
        return [f"{name} has {', '.join(sorted(tensors))} and must have {', '.join(sorted(shapes))}"]
    return [
        f"{name}.{part} is {tuple(tensors[part].shape)} and must be {shape} for this model (rank {rank})"
        for part, shape in shapes.items()
        if tuple(tensors[part].shape) != shape
    ]
