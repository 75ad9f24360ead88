"""Write a trained adapter or pipeline folder. Raises if anything is missing.

`export_checkpoint` reads a checkpoint on disk and holds one file of weights in memory at a time.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict

from echo4o.common.files import replacing_folder, write_json
from echo4o.modeling.common import lora_files
from echo4o.modeling.common.adapter_presets import SamplingPreset
from echo4o.modeling.common.conversion import shard_files, write_index
from echo4o.modeling.common.lora_files import DIFFUSERS_FILE
from echo4o.modeling.common.weights import component_tensors, read_json
from echo4o.modeling.pipelines import pipeline_class
from echo4o.training.backbones import backbone_class
from echo4o.training.checkpoints import WEIGHTS, Checkpoint, quiet
from echo4o.training.model import ADAPTER, base_folder, cast, lora_config
from echo4o.training.recipe import LoraTuning, RecipeError, TrainingRecipe
from echo4o.training.recipe_files import load_recipe, read_recipe

SHARD_BYTES = 5_000_000_000


class ExportError(RuntimeError):
    """The trained tensors do not form a complete model."""


def check_keys(what: str, expected: Iterable[str], given: Iterable[str]) -> None:
    """Raise ExportError unless both contain the same names."""
    expected, given = set(expected), set(given)
    missing, extra = sorted(expected - given), sorted(given - expected)
    if missing or extra:
        lines = [f"{len(missing)} missing ({', '.join(missing[:3])})"] if missing else []
        lines += [f"{len(extra)} unexpected ({', '.join(extra[:3])})"] if extra else []
        raise ExportError(f"{what} would be incomplete: {' and '.join(lines)}.")


# --- adapters ------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    transformer,
    tune: LoraTuning,
    values: dict[str, torch.Tensor],
    dtype: torch.dtype,
    preset: SamplingPreset | None = None,
) -> Path:
    """Write `pytorch_lora_weights.safetensors` as diffusers reads it, its configuration in the file's metadata.

    Args:
        transformer: the model with the adapter injected; it may be on the meta device.
        values: trained tensors by their names in [`echo4o.training.model.TrainedModel`].
        preset: how to sample with the adapter.
    """
    from peft.utils import get_peft_model_state_dict

    own = {name.removeprefix("transformer."): value for name, value in values.items()}
    check_keys("The adapter", (n for n in transformer.state_dict() if "lora_" in n), own)
    layers = get_peft_model_state_dict(transformer, state_dict=own, adapter_name=ADAPTER)
    layers = {f"transformer.{name}": tensor.to(dtype).cpu().contiguous() for name, tensor in layers.items()}
    with replacing_folder(folder) as work:
        settings = lora_config(tune, type(transformer)).to_dict()
        lora_files.write_adapter(work / DIFFUSERS_FILE, layers, settings, preset)
    return folder


def to_original_names(adapter: Path, out: Path, transformer_class: Any) -> Path:
    """Write an adapter in PEFT's format with the module names of the original checkpoint.

    Servers that load the original layout apply it, and `load_lora_weights` reads it back.

    Args:
        adapter: as [`write_adapter`] wrote it.
        transformer_class: its `_original_names` translate module names.

    Raises:
        ExportError: a module has no name in the original layout.
    """
    state, settings = lora_files.read_adapter(adapter / DIFFUSERS_FILE)
    assert settings is not None
    translate = partial(original_name, names=getattr(transformer_class, "_original_names", {}))
    tensors, modules = {}, {}
    for name, tensor in state.items():
        module, lora, rest = name.removeprefix("transformer.").partition(".lora_")
        modules[module] = translate(module)
        tensors[f"base_model.model.{modules[module]}{lora}{rest}"] = tensor.contiguous()
    for option in ("rank_pattern", "alpha_pattern"):
        found = {m: _matching(settings.get(option) or {}, m) for m in modules}
        settings[option] = {modules[m]: value for m, value in found.items() if value is not None}
    settings |= {"target_modules": sorted(modules.values()), "peft_type": "LORA", "base_model_name_or_path": None}
    with replacing_folder(out) as work:
        save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(work / "adapter_config.json", settings)
    return out


def original_name(module: str, names: dict[str, str]) -> str:
    """The name of a module in the original layout. Raises ExportError if it has none."""
    for pattern, template in names.items():
        if match := re.fullmatch(pattern, module):
            return match.expand(template)
    raise ExportError(f"{module} has no name in the original layout; export the adapter without --to original.")


def _matching(patterns: dict[str, Any], module: str) -> Any:
    """The value of the first pattern that PEFT applies to a module; None if there is none."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module))


# --- pipeline folders ----------------------------------------------------------------------------------------------


def write_pipeline(
    folder: Path,
    base: Path,
    classes: dict[str, type],
    trained: dict[str, Callable],
    names: set[str],
    dtype: torch.dtype,
) -> Path:
    """Write a pipeline folder with the trained tensors; frozen ones and all other files come from `base`.

    Args:
        classes: component -> its class.
        trained: component -> a function that reads the named trained tensors: list of names -> {name: tensor}.
        names: of the trained tensors, as "component.name".

    Raises:
        ExportError: tensors are missing, unexpected or of another shape.
    """
    expected = set()
    with replacing_folder(folder) as work:
        shutil.copytree(base, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".cache", ".git"))
        for component, read_trained in trained.items():
            cls: Any = classes[component]
            for old in [*(work / component).glob("*.safetensors"), *(work / component).glob("*.index.json")]:
                old.unlink()
            with torch.device("meta"):
                shapes = {n: t for n, t in cls.from_config(cls.load_config(base / component)).state_dict().items()}
            expected |= {f"{component}.{name}" for name in shapes}
            trained_names = {n.removeprefix(f"{component}.") for n in names if n.startswith(f"{component}.")}
            _write_component(work / component, base / component, shapes, read_trained, trained_names, dtype)
        if unknown := names - expected:
            raise ExportError(
                f"The pipeline has no parameters for {len(unknown)} trained tensors: {sorted(unknown)[:3]}."
            )
    return folder


def _write_component(folder: Path, base: Path, shapes: dict, read_trained, trained_names: set[str], dtype) -> None:
    stored = component_tensors(base)
    check_keys(str(base), shapes, {*stored, *trained_names})
    sizes = {name: empty.numel() * dtype.itemsize for name, empty in shapes.items()}
    files = shard_files(sizes, lambda name: sizes[name], SHARD_BYTES)
    for file, group in files.items():
        tensors = read_trained([n for n in group if n in trained_names])
        for name in group:
            if name not in tensors:
                with safe_open(stored[name].file, "pt") as source:
                    tensors[name] = source.get_tensor(name)
            if tensors[name].shape != shapes[name].shape:
                raise ExportError(
                    f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(shapes[name].shape)}."
                )
        save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        write_index(folder, {name: file for file, group in files.items() for name in group}, sum(sizes.values()))


# --- from a checkpoint ---------------------------------------------------------------------------------------------


def export_checkpoint(checkpoint: Checkpoint, out: Path, weights: str = "auto", merge: bool = False) -> Path:
    """Export a checkpoint as an adapter (LoRA) or a pipeline folder.

    Args:
        weights: "ema", "raw", or "auto": the average if there is one.
        merge: LoRA: write a complete pipeline with the adapter fused into its weights.
    """
    recipe = read_recipe(checkpoint.state()["recipe"])
    if merge:
        _refuse_to_merge_few_steps(recipe)
    backbone = backbone_class(recipe.backbone)
    if weights == "ema" and recipe.ema is None:
        raise RecipeError(f"{checkpoint.folder} has no average: its recipe has no ema section. Use --weights raw.")
    section = "ema" if weights != "raw" and recipe.ema is not None else "model"
    reader = FileSystemReader(checkpoint.folder / WEIGHTS)
    held = {k.removeprefix(f"{section}."): v for k, v in reader.read_metadata().state_dict_metadata.items()}
    names = {k for k in held if k.partition(".")[0] in backbone.trained_components}
    dtype = getattr(torch, recipe.save_dtype)

    def read(wanted: Iterable[str]) -> dict[str, torch.Tensor]:
        wanted = list(wanted)
        tensors = {name: _empty_tensor(held[name]) for name in wanted}
        if tensors:
            with quiet():
                load_state_dict({f"{section}.{n}": t for n, t in tensors.items()}, storage_reader=reader, no_dist=True)
        return tensors

    base = base_folder(recipe.model)
    if not isinstance(recipe.tune, LoraTuning):
        if merge:
            raise RecipeError("--merge is for adapters; this run trained the weights themselves.")
        parts = {
            c: lambda w, c=c: {n: t for n, t in zip(w, read(f"{c}.{n}" for n in w).values())}
            for c in backbone.trained_components
        }
        return write_pipeline(out, base, backbone.component_classes, parts, names, dtype)
    with torch.device("meta"):
        cls: Any = backbone.component_classes["transformer"]
        skeleton = cls.from_config(cls.load_config(base / "transformer"))
        skeleton.add_adapter(lora_config(recipe.tune, cls), adapter_name=ADAPTER)
    if not merge:
        return write_adapter(out, skeleton, recipe.tune, read(names), torch.float32, few_step_preset(recipe))
    adapter = write_adapter(out.parent / f".{out.name}.adapter", skeleton, recipe.tune, read(names), torch.float32)
    try:
        return merge_adapter(str(base), adapter, out, dtype)
    finally:
        shutil.rmtree(adapter, ignore_errors=True)


def export_to_original(checkpoint: Checkpoint, out: Path, weights: str = "auto") -> Path:
    """Export the adapter of a checkpoint with the original module names; arguments as in [`export_checkpoint`]."""
    recipe = read_recipe(checkpoint.state()["recipe"])
    if not isinstance(recipe.tune, LoraTuning):
        raise RecipeError(
            "--to original is for adapters: export the pipeline, then use `echo4o convert --to original`."
        )
    transformer_class = backbone_class(recipe.backbone).component_classes["transformer"]
    adapter = export_checkpoint(checkpoint, out.parent / f".{out.name}.diffusers", weights)
    try:
        return to_original_names(adapter, out, transformer_class)
    finally:
        shutil.rmtree(adapter, ignore_errors=True)


def _empty_tensor(stored: Any) -> torch.Tensor:
    assert isinstance(stored, TensorStorageMetadata)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def load_adapter(pipeline, adapter: Path) -> None:
    """Load an adapter with its alpha into a pipeline."""
    pipeline.transformer.load_lora_adapter(
        str(adapter), prefix="transformer", weight_name=DIFFUSERS_FILE, use_safetensors=True, adapter_name=ADAPTER
    )


def merge_run(run: Path, out: Path) -> Path:
    """Write a pipeline folder with the adapter of a finished run fused into its weights."""
    recipe = load_recipe(run / "recipe.yaml")
    _refuse_to_merge_few_steps(recipe)
    return merge_adapter(recipe.model, run / "adapter", out, getattr(torch, recipe.save_dtype))


def _refuse_to_merge_few_steps(recipe: TrainingRecipe) -> None:
    if recipe.distill is not None:
        raise RecipeError(
            "--merge would lose the preset of a few-step adapter (number of updates, no guidance): use it as an adapter, "
            "with --lora or load_lora_weights."
        )


def few_step_preset(recipe: TrainingRecipe) -> SamplingPreset | None:
    """How to sample with the adapter of a recipe that distils; None for other recipes."""
    if recipe.distill is None:
        return None
    config = read_json(base_folder(recipe.model) / "scheduler" / "scheduler_config.json")
    dynamic = config.get("use_dynamic_shifting") or config.get("dynamic_time_shift")
    shift = None if dynamic else float(config.get("shift") or config.get("flow_shift") or 1.0)
    return SamplingPreset(recipe.distill.steps, shift=shift)


def merge_adapter(base: str, adapter: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write the pipeline `base` with an adapter fused into its weights (computed in float32)."""
    pipeline = pipeline_class(base).from_pretrained(base, dtype=torch.float32)
    load_adapter(pipeline, adapter)
    pipeline.transformer.fuse_lora()
    pipeline.transformer.unload_lora()
    cast(pipeline, dtype)
    with replacing_folder(out) as work:
        pipeline.save_pretrained(work)
    return out
