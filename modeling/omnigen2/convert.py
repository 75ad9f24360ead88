"""The released layout of OmniGen2 to a self-contained pipeline folder and back, bit for bit.

Weight files keep their names and contents, which are the same in both layouts. What differs: the release has one
folder `processor` for tokenizer and image processor, its own name for the scheduler's time shift, and no pipeline code.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from ..common.conversion import copy_files, files_fingerprint, finish, raise_problems, write_json, write_weights
from ..common.loading import load_tokenizer, qwen_names
from ..common.publishing import INDEX_NAME, class_code, require_closed, require_standalone, write_sources
from ..common.safetensors_stream import TensorCopy
from ..common.weights import StoredTensor, component_tensors, main_dtype, nonfinite_names, read_json
from .pipeline_omnigen2 import RELEASED_PROCESSOR, OmniGen2Pipeline
from .transformer_omnigen2 import OmniGen2Transformer2DModel

WEIGHTED = ("transformer", "vae", "mllm")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json",)
CONFIG_FILES = ("config.json", "generation_config.json")
KEPT_FOLDER = "original"  # JSON files of the release, kept for the way back
_KEPT = (INDEX_NAME, "scheduler_config.json")
_RELEASED_INDEX = {
    "_class_name": "OmniGen2Pipeline",
    "_diffusers_version": "0.33.1",
    "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def convert_to_diffusers(src: Path, dst: Path) -> None:
    """Write the release's layout in `src` as a self-contained pipeline folder into `dst`.

    `dst` must be new, empty, or left by an interrupted conversion of the same `src`. Every tensor keeps its dtype and
    its bits.

    Raises:
        FileNotFoundError: `src` does not have the release's layout.
        FileExistsError: `dst` holds something else.
        ValueError: pickled, damaged or non-finite weights, or tensors that do not fit the transformer's config.json.
        OSError: there is not enough room at `dst`.
    """
    src, dst = Path(src), Path(dst)
    _require_release(src)
    read_processor(src)  # its files are copied as they are
    _copy_weights(src, dst, _stored(src))
    copy_files(src / RELEASED_PROCESSOR, dst / "tokenizer", TOKENIZER_FILES)
    copy_files(src / RELEASED_PROCESSOR, dst / "image_processor", IMAGE_PROCESSOR_FILES)
    released = read_json(src / "scheduler" / "scheduler_config.json")
    (dst / "scheduler").mkdir(exist_ok=True)
    write_json(dst / "scheduler" / "scheduler_config.json", _scheduler_config(released))
    copy_files(src, dst / KEPT_FOLDER, (INDEX_NAME,))
    copy_files(src / "scheduler", dst / KEPT_FOLDER, ("scheduler_config.json",))
    copy_files(src / "transformer", dst / KEPT_FOLDER, ("config.json",))
    sources = OmniGen2Pipeline._published_sources
    require_closed(sources)
    code = class_code(OmniGen2Transformer2DModel)
    assert code is not None
    require_standalone(code.text, "The file of the transformer")
    write_sources(dst, sources, {"transformer": code})
    entry = {"auto_map": {"AutoModel": f"{code.stem}.{OmniGen2Transformer2DModel.__name__}"}}
    write_json(dst / "transformer" / "config.json", read_json(src / "transformer" / "config.json") | entry)
    write_json(dst / INDEX_NAME, _index())
    finish(dst)


def convert_to_original(src: Path, dst: Path) -> None:
    """Write a pipeline folder, also one that `save_pretrained` wrote, in the release's layout. Raises as above."""
    src, dst = Path(src), Path(dst)
    if not (src / INDEX_NAME).is_file() or OmniGen2Pipeline.is_original(src):
        raise FileNotFoundError(f"{src} is not a pipeline folder of OmniGen2 as echo4o writes it.")
    _copy_weights(src, dst, _stored(src))
    copy_files(src / "tokenizer", dst / RELEASED_PROCESSOR, TOKENIZER_FILES)
    copy_files(src / "image_processor", dst / RELEASED_PROCESSOR, IMAGE_PROCESSOR_FILES)
    (dst / "scheduler").mkdir(exist_ok=True)
    if all((src / KEPT_FOLDER / name).is_file() for name in _KEPT):
        copy_files(src / KEPT_FOLDER, dst, (INDEX_NAME,))
        copy_files(src / KEPT_FOLDER, dst / "scheduler", ("scheduler_config.json",))
    else:
        ours = read_json(src / "scheduler" / "scheduler_config.json")
        write_json(dst / "scheduler" / "scheduler_config.json", _released_scheduler_config(ours))
        write_json(dst / INDEX_NAME, _RELEASED_INDEX)
    _write_released_transformer_config(src, dst)
    finish(dst)


def components_from_original(
    directory: str | Path, dtype: torch.dtype | None = None, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The components of a folder in the release's layout; arguments for `OmniGen2Pipeline`.

    Args:
        dtype: of all components; None: the stored one, by component.
        skip: components that are not loaded.

    Raises:
        FileNotFoundError, ValueError: as [`convert_to_diffusers`].
    """
    folder = Path(directory)
    _require_release(folder)
    stored = _stored(folder)
    transformers = importlib.import_module("transformers")
    classes = {
        "transformer": OmniGen2Transformer2DModel,
        "vae": AutoencoderKL,
        "mllm": transformers.Qwen2_5_VLForConditionalGeneration,
    }
    components: dict[str, Any] = {}
    for name, cls in classes.items():
        if name not in skip:
            chosen = dtype or main_dtype(stored[name])
            model = cls.from_pretrained(folder / name, dtype=chosen, use_safetensors=True)
            bad = nonfinite_names(model.state_dict().items())
            raise_problems(folder / name, [f"non-finite values in {tensor}" for tensor in bad])
            components[name] = model
    if "scheduler" not in skip:
        released = read_json(folder / "scheduler" / "scheduler_config.json")
        config = {name: value for name, value in _scheduler_config(released).items() if not name.startswith("_")}
        components["scheduler"] = FlowMatchEulerDiscreteScheduler(**config)
    return components | read_processor(folder, skip)


def read_processor(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Tokenizer and image processor of the release's layout, by component name.

    Tokenizer and image processor are loaded one by one: transformers' `Qwen2_5_VLProcessor` needs torchvision.
    """
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    processor, components = Path(folder) / RELEASED_PROCESSOR, {}
    if not processor.is_dir():
        raise FileNotFoundError(f"{folder} has no folder {RELEASED_PROCESSOR}.")
    if "tokenizer" not in skip:
        components["tokenizer"] = load_tokenizer(processor, AutoTokenizer)
    if "image_processor" not in skip:
        components["image_processor"] = Qwen2VLImageProcessorPil.from_pretrained(processor)
    return components


def _require_release(folder: Path) -> None:
    if not OmniGen2Pipeline.is_original(folder):
        raise FileNotFoundError(
            f"{folder} does not have the layout of the OmniGen2 release: a {INDEX_NAME} that names a processor."
        )


def _stored(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of every component with weights, which are what the configurations say."""
    stored = {name: component_tensors(folder / name) for name in WEIGHTED}
    problems = []
    for name in WEIGHTED:
        model = _empty_model(folder, name)
        wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        found = {n: t.shape for n, t in stored[name].items()}
        if name == "mllm":
            wanted, found = _by_qwen_names(model, wanted), _by_qwen_names(model, found)
        problems += [f"{name}: missing {n}" for n in sorted(set(wanted) - set(found))]
        problems += [f"{name}: unexpected {n}" for n in sorted(set(found) - set(wanted))]
        problems += [
            f"{name}: {n} is {found[n]} and must be {wanted[n]}"
            for n in sorted(set(wanted) & set(found))
            if found[n] != wanted[n]
        ]
    raise_problems(folder, problems)
    return stored


def _empty_model(folder: Path, name: str) -> torch.nn.Module:
    """A component on the meta device, as its configuration says."""
    with torch.device("meta"):
        if name == "mllm":
            transformers = importlib.import_module("transformers")
            config = transformers.Qwen2_5_VLConfig.from_pretrained(folder / name)
            return transformers.Qwen2_5_VLForConditionalGeneration(config)
        cls = {"transformer": OmniGen2Transformer2DModel, "vae": AutoencoderKL}[name]
        return cls.from_config(cls.load_config(folder / name))


def _by_qwen_names(model: torch.nn.Module, shapes: dict[str, tuple]) -> dict[str, tuple]:
    return {plain: shape for name, shape in shapes.items() for plain in qwen_names(model, [name])}


def _copy_weights(src: Path, dst: Path, stored: dict[str, dict[str, StoredTensor]]) -> None:
    """Copy the weights tensor by tensor, file by file, and the configurations beside them."""
    files: dict[Path, list[TensorCopy]] = {}
    for component, tensors in stored.items():
        for name, tensor in tensors.items():
            files.setdefault(dst / component / tensor.file.name, []).append(TensorCopy(name, tensor.shape, tensor))
    everything = [tensor for tensors in stored.values() for tensor in tensors.values()]
    write_weights(dst, files_fingerprint(everything), files)
    for component in stored:
        copy_files(src / component, dst / component, CONFIG_FILES)


def _scheduler_config(released: dict) -> dict:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": released.get("_diffusers_version", "0.33.1"),
        "num_train_timesteps": released.get("num_train_timesteps", 1000),
        "use_dynamic_shifting": released.get("dynamic_time_shift", True),
        "time_shift_type": "linear",
    }


def _write_released_transformer_config(src: Path, dst: Path) -> None:
    """As it was, if it still describes the transformer; else without our entry for `AutoModel`."""
    ours, kept = read_json(src / "transformer" / "config.json"), src / KEPT_FOLDER / "config.json"
    ours.pop("auto_map", None)
    if kept.is_file() and read_json(kept) == ours:
        copy_files(src / KEPT_FOLDER, dst / "transformer", ("config.json",))
    else:
        write_json(dst / "transformer" / "config.json", ours)


def _released_scheduler_config(ours: dict) -> dict:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": ours.get("_diffusers_version", "0.33.1"),
        "dynamic_time_shift": ours.get("use_dynamic_shifting", True),
        "num_train_timesteps": ours.get("num_train_timesteps", 1000),
    }


def _index() -> dict:
    import diffusers

    return {
        "_class_name": ["pipeline", "OmniGen2Pipeline"],
        "_diffusers_version": diffusers.__version__,
        "image_processor": ["transformers", "Qwen2VLImageProcessorPil"],
        "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
