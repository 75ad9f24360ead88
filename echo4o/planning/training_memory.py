"""Memory that a training recipe needs per GPU, in the host and on disk, computed without allocating it.

Weights, gradients, optimizer states and averages are counted tensor by tensor on the model that the recipe sets up on
the meta device. Activations come from the model's own `activation_bytes`, through its backbone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from echo4o.common.hub_names import is_repository_name
from echo4o.common.sizes import parse_bytes
from echo4o.planning.assumptions import NF4_BYTES, RESERVE, USABLE
from echo4o.training.backbones import backbone_class
from echo4o.training.backbones.base import Backbone, Precision, StepMemory
from echo4o.training.model import clean_name, empty_component, encoder_dtype, frozen_dtype, set_up
from echo4o.training.recipe import LoraTuning, RecipeError, TrainingRecipe
from echo4o.training.recipe_files import bundled_names, bundled_recipe, load_recipe

HOST_PER_PROCESS = 3e9  # bytes: Python with torch, diffusers, datasets and a CUDA context; assumed
EXPORT_SHARD = 5e9  # bytes


@dataclass(frozen=True)
class TrainingMemoryPlan:
    """Bytes. Everything is per GPU except `host` (per node), `checkpoint` and `disk`."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    gathered: float  # sharded weights while a layer computes, and weights cast to 16 bit
    workspace: float  # inside operations; encoding images, where that takes more than a step
    host: float
    checkpoint: float
    disk: float  # the kept checkpoints, the best one, the one being written, and the result
    gpu: float
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Peak memory of one GPU."""
        held = self.weights + self.gradients + self.optimizer + self.ema
        return held + self.activations + self.gathered + self.workspace + RESERVE

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.gpu


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Skeleton:
    """The recipe's model on the meta device, set up to train."""

    backbone: type[Backbone]
    components: dict[str, nn.Module]
    index: dict  # the checkpoint's model_index.json; empty for the release

    @property
    def trained(self) -> nn.Module:
        """The trained components, named as in [`echo4o.training.model.TrainedModel`]."""
        return nn.ModuleDict({name: self.components[name] for name in self.backbone.trained_components})

    @property
    def frozen(self) -> list[nn.Module]:
        return [m for name, m in self.components.items() if name not in self.backbone.trained_components]


def skeleton(recipe: TrainingRecipe) -> Skeleton:
    """Build the recipe's model on the meta device; only configurations are read."""
    backbone = backbone_class(recipe.backbone)
    file = Path(recipe.model) / "model_index.json"
    index = json.loads(file.read_text("utf-8-sig")) if file.is_file() else {}
    with torch.device("meta"):
        components = {name: _empty(backbone, recipe.model, name) for name in backbone.component_classes}
        built = Skeleton(backbone, components, index)
        set_up(built.trained, recipe, backbone.component_classes)
    return built


def _empty(backbone: type[Backbone], model: str, component: str) -> nn.Module:
    cls: Any = backbone.component_classes[component]
    config = backbone.release_configs[component] if model == "release" else _config(cls, model, component)
    try:
        return empty_component(cls, config)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model: {model}/{component}/config.json does not describe a model: {error}") from error


def _config(cls: Any, model: str, component: str) -> dict:
    try:
        if not Path(model).is_dir() and not is_repository_name(model):
            raise OSError("there is no such folder, and a Hub repository is called owner/name")
        if hasattr(cls, "load_config"):  # diffusers
            return dict(cls.load_config(model, subfolder=component))
        return cls.config_class.from_pretrained(model, subfolder=component).to_dict()  # transformers 5
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model: {model} has no configuration of its {component} to plan with ({str(error).strip().splitlines()[0]}). "
            "For the sizes of the release: --set model=release"
        ) from error


def _share(parameter: torch.Tensor, ways: int) -> int:
    """Values of a tensor on the process that holds most of it: FSDP2 splits the first dimension `ways` times."""
    if ways == 1 or parameter.ndim == 0:
        return parameter.numel()
    return math.ceil(parameter.shape[0] / ways) * (parameter.numel() // max(1, parameter.shape[0]))


def stored_bytes(recipe: TrainingRecipe, built: Skeleton, ways: int = 1) -> float:
    """Weights and buffers of all components on one GPU. Frozen components are whole everywhere, and in float32 unless
    they are the backbone's encoders."""
    frozen, total = frozen_dtype(recipe).itemsize, 0.0
    quantized = isinstance(recipe.tune, LoraTuning) and recipe.tune.quantize is not None
    for name, parameter in built.trained.named_parameters():
        size = 4 if parameter.requires_grad else frozen
        if quantized and not parameter.requires_grad and _is_quantized(built, name, parameter):
            size = NF4_BYTES
        total += _share(parameter, ways) * size
    total += sum(buffer.numel() * frozen for buffer in built.trained.buffers())
    for name, module in built.components.items():
        if name in built.backbone.trained_components:
            continue
        if name in built.backbone.idle_components(recipe):
            continue
        itemsize = encoder_dtype(recipe).itemsize if name in built.backbone.encoder_components else 4
        in_4_bit = name in built.backbone.quantized_components(recipe)
        tensors = {id(t): (n, t) for n, t in module.state_dict(keep_vars=True).items()}  # tied ones once
        for key, tensor in tensors.values():
            small = in_4_bit and tensor.ndim == 2 and "embed" not in key and "lm_head" not in key
            total += tensor.numel() * (NF4_BYTES if small else itemsize)
    return total


def _is_quantized(built: Skeleton, name: str, parameter: torch.Tensor) -> bool:
    """bitsandbytes replaces the transformer's linear layers except those that the model keeps in full precision."""
    kept = built.backbone.component_classes["transformer"]._keep_in_full_precision
    skipped = any(part in name for part in kept) or "embed" in name
    return name.startswith("transformer.") and parameter.ndim == 2 and not skipped


def trained_values(built: Skeleton, ways: int = 1) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, tensor and number of values per GPU of everything that trains."""
    for name, parameter in built.trained.named_parameters():
        if parameter.requires_grad:
            yield clean_name(name), parameter, _share(parameter, ways)


def optimizer_bytes(recipe: TrainingRecipe, built: Skeleton, ways: int = 1) -> float:
    """AdamW holds two float32 values per parameter and a counter per tensor; Muon holds one value."""
    total = 0.0
    for name, parameter, values in trained_values(built, ways):
        muon = recipe.optimizer.name == "muon" and parameter.ndim == 2 and ".layers." in f".{name}"
        total += 4 * values if muon else 8 * values + 4
    return total


# --- a step ---------------------------------------------------------------------------------------------------------


def precision_of(recipe: TrainingRecipe) -> Precision:
    """Bytes per value: LoRA's frozen 16-bit weights and FSDP2's casts keep the whole stream narrow, autocast does not."""
    if recipe.mixed_precision == "no":
        return Precision(4, 4)
    narrow = recipe.sharding == "fsdp2" or frozen_dtype(recipe).itemsize == 2
    return Precision(2, 2 if narrow else 4)


def step_memory(recipe: TrainingRecipe, built: Skeleton, num_processes: int) -> StepMemory:
    """Activations and workspace of one forward and backward pass."""
    return built.backbone.step_memory(recipe, built.components, built.index, num_processes, precision_of(recipe))


def gathered_bytes(recipe: TrainingRecipe, built: Skeleton, ways: int) -> float:
    """FSDP2: two layers and everything outside the layers, gathered and cast, and one layer's gradients; autocast: casts."""
    compute = precision_of(recipe).compute
    transformer: Any = built.components["transformer"]
    block = sum(p.numel() for p in transformer.layers[0].parameters())
    if ways > 1:
        outside = sum(p.numel() for n, p in built.trained.named_parameters() if ".layers." not in n)
        return (2 * block + outside) * compute + block * (compute + 4)
    if recipe.mixed_precision == "bf16":
        return sum(2.0 * values for _, p, values in trained_values(built) if p.ndim == 2)
    return 0.0


def optimizer_workspace_bytes(recipe: TrainingRecipe, built: Skeleton) -> float:
    """Muon updates matrices of one shape as one stack, with three copies of it."""
    shapes: dict[torch.Size, int] = {}
    for name, p, _ in trained_values(built):
        if p.ndim == 2 and ".layers." in f".{name}":
            shapes[p.shape] = shapes.get(p.shape, 0) + p.numel()
    return 3.0 * 4 * max(shapes.values(), default=0) if recipe.optimizer.name == "muon" else 0.0


# --- the plan -------------------------------------------------------------------------------------------------------


def plan(
    recipe: TrainingRecipe, gpu_bytes: float, num_gpus: int = 1, built: Skeleton | None = None
) -> TrainingMemoryPlan:
    """Memory of the recipe on `num_gpus` GPUs of `gpu_bytes` each. Nothing is allocated."""
    built = built or skeleton(recipe)
    ways = num_gpus if recipe.sharding == "fsdp2" else 1
    trained = sum(values for _, _, values in trained_values(built, ways))
    whole = sum(values for _, _, values in trained_values(built))
    step = step_memory(recipe, built, num_gpus)
    work = max(step.workspace, optimizer_workspace_bytes(recipe, built))
    checkpoint = 4.0 * whole * (2 if recipe.ema else 1) + optimizer_bytes(recipe, built)
    result = 4.0 * whole if recipe.tune.method == "lora" else _pipeline_bytes(recipe, built)
    keep = 1 if recipe.sharding == "fsdp2" else 0
    if recipe.checkpoints:  # with the one being written, and the best validated one if it is older than the last ones
        keep = recipe.checkpoints.keep + 1 + recipe.checkpoints.keep_best
    return TrainingMemoryPlan(
        weights=stored_bytes(recipe, built, ways),
        gradients=4.0 * trained,
        optimizer=optimizer_bytes(recipe, built, ways),
        ema=4.0 * trained if recipe.ema else 0.0,
        activations=step.activations,
        gathered=gathered_bytes(recipe, built, ways),
        workspace=max(work, step.encoding - step.activations),
        host=_host_bytes(recipe, built, num_gpus),
        checkpoint=checkpoint,
        disk=keep * checkpoint + result,
        gpu=gpu_bytes,
        notes=_notes(recipe, step, num_gpus),
    )


def _pipeline_bytes(recipe: TrainingRecipe, built: Skeleton) -> float:
    size = getattr(torch, recipe.save_dtype).itemsize
    return float(sum(t.numel() for m in built.components.values() for t in m.state_dict().values()) * size)


def _host_bytes(recipe: TrainingRecipe, built: Skeleton, num_gpus: int) -> float:
    """Per node of up to 8 GPUs. Weights pass through the host once per process; sharded, through the first alone."""
    processes = min(num_gpus, 8)
    loading = stored_bytes(recipe, built) * (1 if recipe.sharding == "fsdp2" else processes)
    export = EXPORT_SHARD if recipe.tune.method == "full" else 0.0
    return max(loading, export) + processes * (HOST_PER_PROCESS + recipe.cache_mb * 1e6)


def _notes(recipe: TrainingRecipe, step: StepMemory, num_gpus: int) -> list[str]:
    notes = [step.description]
    if recipe.processes not in (None, num_gpus):
        notes.append(f"the recipe is for {recipe.processes} processes: set processes={num_gpus}")
    if recipe.packing and recipe.packing.packs_per_step % num_gpus:
        notes.append(f"packing.packs_per_step={recipe.packing.packs_per_step} is not divisible by {num_gpus} GPUs")
    if isinstance(recipe.tune, LoraTuning) and recipe.tune.quantize:
        notes.append("4-bit sizes are computed; no bitsandbytes model was measured here")
    return notes


# --- advice ---------------------------------------------------------------------------------------------------------


def nearest(recipe: TrainingRecipe, gpu_bytes: float, num_gpus: int) -> str | None:
    """Arguments of `train` that fit: the smallest change to this recipe, else the most similar bundled recipe."""
    for changes in ({"gradient_checkpointing": True}, *_smaller(recipe)):
        if all(getattr(recipe, key) == value for key, value in changes.items()):
            continue
        if plan(recipe.model_copy(update=changes), gpu_bytes, num_gpus).fits:
            return " ".join(f"--set {text}" for text in _as_settings(changes))
    best: tuple[int, str] | None = None
    for name in _recipe_names(recipe):
        other = load_recipe(bundled_recipe(name))
        other = other.model_copy(update={"model": recipe.model, "processes": num_gpus})
        if num_gpus == 1 and other.sharding == "fsdp2":
            continue
        built = skeleton(other)
        if plan(other, gpu_bytes, num_gpus, built).fits:
            trained = sum(values for _, _, values in trained_values(built))
            same = other.tune.method == recipe.tune.method
            best = max(best or (0, ""), (trained + same * 10**15, name))
    if best is None:
        return None
    other = load_recipe(bundled_recipe(best[1]))
    packs = other.packing.packs_per_step if other.packing else 0
    fix = [f"--set processes={num_gpus}"] if other.processes != num_gpus else []
    fix += [f"--set packing.packs_per_step={-(-packs // num_gpus) * num_gpus}"] if packs % num_gpus else []
    return " ".join([best[1], *fix])


def _recipe_names(recipe: TrainingRecipe) -> list[str]:
    """Bundled recipes of the same backbone that learn the same (from images or from a teacher), without the quickstart's."""

    def serves(other: TrainingRecipe) -> bool:
        return other.backbone == recipe.backbone and (other.distill is None) == (recipe.distill is None)

    names = [name for name in bundled_names() if not name.startswith("quickstart")]
    return [name for name in names if serves(load_recipe(bundled_recipe(name)))]


def _smaller(recipe: TrainingRecipe) -> list[dict]:
    """Gradient checkpointing, with passes of half and a quarter of the size."""
    if recipe.packing:
        sizes = [recipe.packing.model_copy(update={"tokens": recipe.packing.tokens // n}) for n in (2, 4)]
        return [{"gradient_checkpointing": True, "packing": size} for size in sizes]
    micro = recipe.micro_batch_size or recipe.batch_size
    assert micro is not None
    sizes = [micro // n for n in (2, 4) if micro % n == 0]
    return [{"gradient_checkpointing": True, "micro_batch_size": size} for size in sizes]


def _as_settings(changes: dict) -> list[str]:
    texts = []
    for key, value in changes.items():
        if key == "packing":
            texts.append(f"packing.tokens={value.tokens}")
        else:
            texts.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return texts


ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer states"),
    ("ema", "moving average"),
    ("activations", "activations"),
    ("gathered", "gathered and cast weights"),
    ("workspace", "workspace"),
)


def as_text(memory: TrainingMemoryPlan, num_gpus: int) -> str:
    """The plan as a table."""
    lines = [f"{'per GPU':<30}{'GB':>9}"]
    lines += [f"  {title:<28}{getattr(memory, name) / 1e9:>9.2f}" for name, title in ROWS]
    lines += [f"  {'reserve (assumed)':<28}{RESERVE / 1e9:>9.2f}"]
    lines += [
        f"  {'together':<28}{memory.total / 1e9:>9.2f}   of {USABLE * memory.gpu / 1e9:.1f} usable of {memory.gpu / 1e9:.1f}"
    ]
    lines += [f"{'host memory, per node':<30}{memory.host / 1e9:>9.2f}"]
    lines += [f"{'disk, per checkpoint':<30}{memory.checkpoint / 1e9:>9.2f}"]
    lines += [f"{'disk, the whole run':<30}{memory.disk / 1e9:>9.2f}"]
    lines += [f"  {note}" for note in memory.notes]
    verdict = "fits" if memory.fits else "does NOT fit"
    return "\n".join(
        [*lines, f"{verdict} on {num_gpus} GPU{'s' if num_gpus > 1 else ''} of {memory.gpu / 1e9:.1f} GB"]
    )


def print_plan(recipe: TrainingRecipe, gpu: str, num_gpus: int = 1) -> bool:
    """Print the plan and, if it does not fit, the nearest recipe that does. Returns whether it fits.

    Raises:
        ValueError: an unreadable size or model.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus={num_gpus} must be at least 1.")
    if recipe.sharding == "fsdp2" and num_gpus == 1:
        raise ValueError("sharding: fsdp2 needs several GPUs: set --num-gpus.")
    gpu_bytes = parse_bytes(gpu)
    memory = plan(recipe, gpu_bytes, num_gpus)
    print(as_text(memory, num_gpus))
    if not memory.fits:
        other = nearest(recipe, gpu_bytes, num_gpus)
        print(f"nearest that fits: {other}" if other else "no bundled recipe fits: use more or larger GPUs")
    return memory.fits
