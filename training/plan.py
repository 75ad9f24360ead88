"""What a recipe will need before anything is allocated: memory per GPU, in the host and on disk, and whether it fits.

Weights, gradients, optimizer states and averages are counted, tensor by tensor, on the model that the recipe sets up on
the meta device. Activations come from the formulas in costs.py. What the CUDA context and fragmentation take is a
reserve that nobody measured here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from echo4o.common.hub_names import is_repository_name
from echo4o.common.sizes import parse_bytes
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.training import costs
from echo4o.training.model import TrainedModel, clean_name, frozen_dtype, part_of, set_up
from echo4o.training.recipe import Recipe, RecipeError, load_recipe, shipped_names, shipped_recipe

# Sizes of BAGEL's own checkpoint answer for a model that cannot be read, as on a machine that will not train it.
RESERVE = 1.5e9  # CUDA context, cuBLAS workspaces
USABLE = 0.95  # of the GPU's memory; the rest goes to fragments
HOST_PER_PROCESS = 3e9  # Python with torch, diffusers, datasets and a CUDA context
EXPORT_SHARD = 5e9
TEXT_TOKENS = 128
NF4_BYTES = 0.5 + 4 / 64  # four bits, and a float32 scale for 64 of them
UNQUANTIZED = ("proj_in", "proj_out", "time_embed", "lm_head")


@dataclass(frozen=True)
class Plan:
    """Bytes. Everything but `host` (per node), `checkpoint` and `export` is per GPU."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    gathered: float  # sharded weights while a layer computes, and weights cast to 16 bit
    workspace: float  # inside operations; encoding pictures, where that takes more than a step
    host: float
    checkpoint: float
    disk: float  # all checkpoints that are kept, the one being written, and the result
    gpu: float
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Most memory of one GPU."""
        held = self.weights + self.gradients + self.optimizer + self.ema
        return held + self.activations + self.gathered + self.workspace + RESERVE

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.gpu


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Skeleton:
    """The recipe's model without its values, set up to learn, and the sizes of pictures that it reads."""

    model: TrainedModel
    vae: AutoencoderKL
    picture: int  # longest side in pixels for the VAE
    view: int  # longest side for the vision tower


def skeleton(recipe: Recipe) -> Skeleton:
    """Build the recipe's model on the meta device; only configurations are read."""
    classes = {"transformer": BagelTransformer2DModel, "vision_model": BagelVisionModel, "vae": AutoencoderKL}
    with torch.device("meta"):
        parts = {name: _empty(cls, recipe.model, name) for name, cls in classes.items()}
        model = TrainedModel(parts["transformer"], parts["vision_model"])
        set_up(model, recipe)
    index = Path(recipe.model) / "model_index.json"
    limits = json.loads(index.read_text("utf-8")) if index.is_file() else {}
    t, v = model.transformer.config, model.vision_model.config
    stride = t.latent_patch_size * 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    own = [(limits.get(f"{name}_image_limits") or {}).get("max_size") for name in ("vae", "vision")]
    return Skeleton(
        model, parts["vae"], own[0] or t.max_latent_size * stride, own[1] or v.max_patches_per_side * v.patch_size
    )


RELEASE_VAE = {  # the FLUX VAE's sizes
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def _empty(cls, model: str, component: str):
    config = _config(cls, model, component)
    try:
        return cls.from_config(config)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model: the config.json of {model}/{component} makes no model: {error}") from error


def _config(cls, model: str, component: str) -> dict:
    if model == "release":  # BAGEL's sizes are the defaults of our classes
        return RELEASE_VAE if component == "vae" else {}
    try:
        if not Path(model).is_dir() and not is_repository_name(model):
            raise OSError("there is no such folder, and a Hub repository is called owner/name")
        return dict(cls.load_config(model, subfolder=component))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model: {model} has no configuration of its {component} to plan with ({str(error).strip().splitlines()[0]}). "
            "For the sizes of the released BAGEL: --set model=release"
        ) from error


def _share(parameter: torch.Tensor, ways: int) -> int:
    """Values of a tensor that the fullest of `ways` processes holds: FSDP2 splits the first dimension."""
    if ways == 1 or parameter.ndim == 0:
        return parameter.numel()
    return math.ceil(parameter.shape[0] / ways) * (parameter.numel() // max(1, parameter.shape[0]))


def stored_bytes(recipe: Recipe, built: Skeleton, ways: int = 1) -> float:
    """Weights and fixed tables of all components on one GPU; the VAE is whole and in float32 everywhere."""
    frozen, total = frozen_dtype(recipe).itemsize, 0.0
    nf4 = recipe.tune.method == "lora" and recipe.tune.quantize is not None
    for name, parameter in built.model.named_parameters():
        size = 4 if parameter.requires_grad else frozen
        if nf4 and not parameter.requires_grad and _is_quantized(name, parameter):
            size = NF4_BYTES
        total += _share(parameter, ways) * size
    total += sum(buffer.numel() * frozen for buffer in built.model.buffers())
    return total + sum(t.numel() * 4 for t in built.vae.state_dict().values())


def _is_quantized(name: str, parameter: torch.Tensor) -> bool:
    """bitsandbytes replaces the transformer's linear layers, but for those that training/model.py exempts."""
    skipped = any(part in name for part in UNQUANTIZED) or "embed" in name
    return name.startswith("transformer.") and parameter.ndim == 2 and not skipped


def learning_values(built: Skeleton, ways: int = 1) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, tensor and number of values per GPU of what learns."""
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad:
            yield clean_name(name), parameter, _share(parameter, ways)


def optimizer_bytes(recipe: Recipe, built: Skeleton, ways: int = 1) -> float:
    """AdamW holds two float32 values per parameter and a counter per tensor; Muon holds one value."""
    total = 0.0
    for name, parameter, values in learning_values(built, ways):
        muon = recipe.optimizer.name == "muon" and parameter.ndim == 2 and ".layers." in f".{name}"
        total += 4 * values if muon else 8 * values + 4
    return total


# --- a step ---------------------------------------------------------------------------------------------------------


def learning_of(built: Skeleton, recipe: Recipe) -> dict[str, costs.Learning]:
    """How each expert and the vision tower learn."""
    if recipe.tune.method == "lora":
        return {e: "lora" if e in recipe.tune.experts else "frozen" for e in ("gen", "und")} | {"vision": "frozen"}
    learns = {part_of(name) for name, _, _ in learning_values(built)}
    return {part: "full" if part in learns else "frozen" for part in ("gen", "und", "vision")}


def precision_of(recipe: Recipe) -> costs.Precision:
    """LoRA's frozen 16-bit weights and FSDP2's casts keep the whole stream narrow; plain autocast does not."""
    if recipe.mixed_precision == "no":
        return costs.Precision(4, 4)
    narrow = recipe.sharding == "fsdp2" or frozen_dtype(recipe).itemsize == 2
    return costs.Precision(2, 2 if narrow else 4)


def load_of(recipe: Recipe, built: Skeleton, num_gpus: int, references: int = 1) -> costs.Load:
    """One forward pass of one GPU: a full pack, or a micro-batch of pictures of the largest size with references."""
    t, v = built.model.transformer.config, built.model.vision_model.config
    stride = t.latent_patch_size * 2 ** (len(built.vae.config.block_out_channels) - 1)
    latents, patches = (built.picture // stride) ** 2, (built.view // v.patch_size) ** 2
    gen, seen = latents * (1 + references), patches * references
    und = seen + TEXT_TOKENS + 2 + 2 * (1 + 2 * references)
    samples: float = recipe.micro_batch_size or math.ceil((recipe.batch_size or 0) / num_gpus)
    if recipe.packing:
        samples = recipe.packing.tokens / (gen + und)
        gen, seen = round(gen * samples), round(seen * samples)
        return costs.Load(gen, recipe.packing.tokens - gen, seen, 0, ())
    return costs.Load(gen * samples, und * samples, seen * samples, 0, (gen + und,) * samples)


def activation_bytes(recipe: Recipe, built: Skeleton, load: costs.Load) -> float:
    """The most that is kept between forward and backward pass, the layer that is computed again included."""
    learning, precision, checkpointing = (
        learning_of(built, recipe),
        precision_of(recipe),
        recipe.gradient_checkpointing,
    )
    kept = costs.transformer_bytes(
        built.model.transformer.config,
        load,
        {part: learning[part] for part in ("gen", "und")},
        precision,
        checkpointing=checkpointing,
        **_layer_options(recipe),
    )
    if learning["vision"] == "full":
        kept += costs.vision_bytes(built.model.vision_model.config, load.patches, precision, checkpointing)
    return kept + (recomputed_bytes(recipe, built, load) if checkpointing else 0)


def recomputed_bytes(recipe: Recipe, built: Skeleton, load: costs.Load) -> float:
    """With gradient checkpointing: what the one layer keeps that is computed again."""
    learning, precision = learning_of(built, recipe), precision_of(recipe)
    experts = {part: learning[part] for part in ("gen", "und")}
    t, v = built.model.transformer.config, built.model.vision_model.config
    kept = costs.layer_bytes(t, load, experts, precision, **_layer_options(recipe))
    seen = load.patches * costs.vision_layer_bytes(v, precision) if learning["vision"] == "full" else 0
    return max(kept if set(experts.values()) != {"frozen"} else 0, seen)


def _layer_options(recipe: Recipe) -> dict:
    rank = recipe.tune.rank if recipe.tune.method == "lora" else 0
    return {"rank": rank, "stored_masks": recipe.device == "cpu"}


def gathered_bytes(recipe: Recipe, built: Skeleton, ways: int) -> float:
    """FSDP2: two layers and what is in no layer, whole and in 16 bit, with one layer's gradients; autocast: casts."""
    compute = precision_of(recipe).compute
    block = sum(p.numel() for p in built.model.transformer.layers[0].parameters())
    if ways > 1:
        outside = sum(p.numel() for n, p in built.model.named_parameters() if ".layers." not in n)
        return (2 * block + outside) * compute + block * (compute + 4)
    if recipe.mixed_precision == "bf16":
        return sum(2.0 * values for _, p, values in learning_values(built) if p.ndim == 2)
    return 0.0


def workspace_bytes(recipe: Recipe, built: Skeleton, load: costs.Load) -> float:
    t = built.model.transformer.config
    work = costs.backward_workspace(t, load.tokens, precision_of(recipe))
    if recipe.optimizer.name == "muon":  # equal matrices are updated as one stack
        shapes: dict[torch.Size, int] = {}
        for name, p, _ in learning_values(built):
            if p.ndim == 2 and ".layers." in f".{name}":
                shapes[p.shape] = shapes.get(p.shape, 0) + p.numel()
        work = max(work, 3 * 4 * max(shapes.values(), default=0))
    return work


def encoding_bytes(built: Skeleton) -> float:
    """Encoding one picture of the largest size: about four tensors of the VAE's first level, in float32."""
    return 4.0 * 4 * built.vae.config.block_out_channels[0] * built.picture**2


# --- the plan -------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, gpu_bytes: float, num_gpus: int = 1, built: Skeleton | None = None) -> Plan:
    """What the recipe needs on `num_gpus` GPUs of `gpu_bytes` each. Nothing is allocated."""
    built = built or skeleton(recipe)
    ways = num_gpus if recipe.sharding == "fsdp2" else 1
    learning = sum(values for _, _, values in learning_values(built, ways))
    whole = sum(values for _, _, values in learning_values(built))
    load = load_of(recipe, built, num_gpus)
    activations, work = activation_bytes(recipe, built, load), workspace_bytes(recipe, built, load)
    ema = 4.0 * learning if recipe.ema else 0.0
    checkpoint = 4.0 * whole * (2 if recipe.ema else 1) + optimizer_bytes(recipe, built)
    result = 4.0 * whole if recipe.tune.method == "lora" else _pipeline_bytes(recipe, built)
    keep = recipe.checkpoints.keep + 1 if recipe.checkpoints else (1 if recipe.sharding == "fsdp2" else 0)
    return Plan(
        weights=stored_bytes(recipe, built, ways),
        gradients=4.0 * learning,
        optimizer=optimizer_bytes(recipe, built, ways),
        ema=ema,
        activations=activations,
        gathered=gathered_bytes(recipe, built, ways),
        workspace=max(work, encoding_bytes(built) - activations),
        host=_host_bytes(recipe, built, num_gpus),
        checkpoint=checkpoint,
        disk=keep * checkpoint + result,
        gpu=gpu_bytes,
        notes=_notes(recipe, load, num_gpus),
    )


def _pipeline_bytes(recipe: Recipe, built: Skeleton) -> float:
    size = getattr(torch, recipe.save_dtype).itemsize
    modules = (built.model.transformer, built.model.vision_model, built.vae)
    return float(sum(t.numel() for m in modules for t in m.state_dict().values()) * size)


def _host_bytes(recipe: Recipe, built: Skeleton, num_gpus: int) -> float:
    """Per node of up to 8 GPUs. Weights pass through the host once per process; sharded, through the first alone."""
    processes = min(num_gpus, 8)
    loading = stored_bytes(recipe, built) * (1 if recipe.sharding == "fsdp2" else processes)
    export = EXPORT_SHARD if recipe.tune.method == "full" else 0.0
    return max(loading, export) + processes * (HOST_PER_PROCESS + recipe.cache_mb * 1e6)


def _notes(recipe: Recipe, load: costs.Load, num_gpus: int) -> list[str]:
    notes = [f"activations: one pass over {load.tokens:,} tokens ({load.gen:,} VAE, {load.patches:,} ViT), no answers"]
    if recipe.processes not in (None, num_gpus):
        notes.append(f"the recipe refuses any number of processes but {recipe.processes}: set processes={num_gpus}")
    if recipe.packing and recipe.packing.packs_per_step % num_gpus:
        notes.append(f"packing.packs_per_step={recipe.packing.packs_per_step} does not divide by {num_gpus} GPUs")
    if recipe.tune.method == "lora" and recipe.tune.quantize:
        notes.append("4-bit sizes are arithmetic; no bitsandbytes model was measured here")
    return notes


# --- advice ---------------------------------------------------------------------------------------------------------


def nearest(recipe: Recipe, gpu_bytes: float, num_gpus: int) -> str | None:
    """The smallest change to this recipe, else the shipped recipe closest to it, that fits; as arguments of `train`."""
    for changes in ({"gradient_checkpointing": True}, *_smaller(recipe)):
        if all(getattr(recipe, key) == value for key, value in changes.items()):
            continue
        if plan(recipe.model_copy(update=changes), gpu_bytes, num_gpus).fits:
            return " ".join(f"--set {text}" for text in _as_settings(changes))
    best: tuple[int, str] | None = None
    for name in (n for n in shipped_names() if not n.startswith("quickstart")):
        other = load_recipe(shipped_recipe(name))
        other = other.model_copy(update={"model": recipe.model, "processes": num_gpus})
        if num_gpus == 1 and other.sharding == "fsdp2":
            continue
        built = skeleton(other)
        if plan(other, gpu_bytes, num_gpus, built).fits:
            learning = sum(values for _, _, values in learning_values(built))
            same = other.tune.method == recipe.tune.method
            best = max(best or (0, ""), (learning + same * 10**15, name))
    if best is None:
        return None
    other = load_recipe(shipped_recipe(best[1]))
    packs = other.packing.packs_per_step if other.packing else 0
    fix = [f"--set processes={num_gpus}"] if other.processes != num_gpus else []
    fix += [f"--set packing.packs_per_step={-(-packs // num_gpus) * num_gpus}"] if packs % num_gpus else []
    return " ".join([best[1], *fix])


def _smaller(recipe: Recipe) -> list[dict]:
    """Gradient checkpointing with passes of half and a quarter of the size."""
    if recipe.packing:
        sizes = [recipe.packing.model_copy(update={"tokens": recipe.packing.tokens // n}) for n in (2, 4)]
        return [{"gradient_checkpointing": True, "packing": size} for size in sizes]
    micro = recipe.micro_batch_size or recipe.batch_size
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


def as_text(made: Plan, num_gpus: int) -> str:
    """The plan as a table."""
    lines = [f"{'per GPU':<30}{'GB':>9}"]
    lines += [f"  {title:<28}{getattr(made, name) / 1e9:>9.2f}" for name, title in ROWS]
    lines += [f"  {'reserve (assumed)':<28}{RESERVE / 1e9:>9.2f}"]
    lines += [
        f"  {'together':<28}{made.total / 1e9:>9.2f}   of {USABLE * made.gpu / 1e9:.1f} usable of {made.gpu / 1e9:.1f}"
    ]
    lines += [f"{'host memory, per node':<30}{made.host / 1e9:>9.2f}"]
    lines += [f"{'disk, per checkpoint':<30}{made.checkpoint / 1e9:>9.2f}"]
    lines += [f"{'disk, the whole run':<30}{made.disk / 1e9:>9.2f}"]
    lines += [f"  {note}" for note in made.notes]
    verdict = "fits" if made.fits else "does NOT fit"
    return "\n".join([*lines, f"{verdict} on {num_gpus} GPU{'s' if num_gpus > 1 else ''} of {made.gpu / 1e9:.1f} GB"])


def print_plan(recipe: Recipe, gpu: str, num_gpus: int = 1) -> bool:
    """Print the plan and, where it does not fit, the nearest recipe that does; whether it fits.

    Raises ValueError for an unreadable size or model.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus={num_gpus} must be at least 1.")
    if recipe.sharding == "fsdp2" and num_gpus == 1:
        raise ValueError("sharding: fsdp2 needs several GPUs: say --num-gpus.")
    gpu_bytes = parse_bytes(gpu)
    made = plan(recipe, gpu_bytes, num_gpus)
    print(as_text(made, num_gpus))
    if not made.fits:
        other = nearest(recipe, gpu_bytes, num_gpus)
        print(f"nearest that fits: {other}" if other else "no shipped recipe fits: use more or larger GPUs")
    return made.fits
