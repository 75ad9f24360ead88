"""Memory that a pipeline needs to generate images, computed before it is loaded: `echo4o info MODEL --plan --gpu 24GB`.

Weights are counted from configurations and safetensors headers, tensor by tensor. Caches and activations come from the
backbone's `call_memory`, those of the VAE from a dry run on the meta device.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from echo4o.common.hub_names import is_repository_name
from echo4o.modeling.common.publishing import INDEX_NAME
from echo4o.modeling.common.weights import DTYPES, read_json
from echo4o.modeling.pipelines import pipeline_class
from echo4o.planning.assumptions import NF4_BYTES, RESERVE, USABLE
from echo4o.planning.dry_run import vae_bytes
from echo4o.training.backbones import backbone_class, backbone_of
from echo4o.training.backbones.base import Backbone, CallMemory, ImageCall
from echo4o.training.model import empty_component

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass
class StoredPipeline:
    """A pipeline's components on the meta device, and its stored tensors without their values."""

    name: str
    backbone: type[Backbone]
    components: dict[str, Any]
    tensors: dict[str, Tensors]  # by component
    index: dict  # model_index.json; empty for the release

    def nbytes(self, component: str) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors[component].values())


def read_stored(model: str, backbone: str = "bagel") -> StoredPipeline:
    """Read configurations and headers of a pipeline folder, a Hub repository, or "release".

    Args:
        model: "release" means the released checkpoint's sizes in bfloat16; "release:NAME" those of another backbone.
        backbone: the backbone of "release"; other models name their own.

    Raises:
        ValueError, OSError: `model` is none of these.
    """
    if model == "release" or model.startswith("release:"):
        return _release(backbone_class(model.partition(":")[2] or backbone), model)
    if Path(model).is_dir():
        return _in_folder(Path(model))
    return _on_hub(model)


def _in_folder(folder: Path) -> StoredPipeline:
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {INDEX_NAME}; convert an original checkpoint with `echo4o convert SRC DST` first, "
            "or plan for its sizes with the name `release`"
        )
    backbone, cls = backbone_class(backbone_of(str(folder))), pipeline_class(folder)
    headers = cls.stored_weights(folder)
    headers = {name: headers[name] for name in backbone.component_classes if name in headers}
    components = _empty(backbone, {name: read_json(folder / name / "config.json") for name in headers})
    _check_loads(folder, cls, components, headers)
    tensors = {c: {n: (DTYPES[t.dtype], t.shape) for n, t in header.items()} for c, header in headers.items()}
    return StoredPipeline(str(folder), backbone, components, tensors, read_json(folder / INDEX_NAME))


def _check_loads(folder: Path, cls: Any, components: dict[str, Any], headers: dict[str, dict]) -> None:
    """Raise the errors that loading raises, apart from those in the values of weights."""
    for name, model in components.items():
        if "quantization_config" not in model.config:  # quantizers store additional tensors
            cls.check_names(name, model, headers[name])
    cls.from_pretrained(folder, **components)  # reads the components without weights, and checks that all fit


def _release(backbone: type[Backbone], name: str) -> StoredPipeline:
    models = _empty(backbone, backbone.release_configs)
    tensors = {c: {n: (torch.bfloat16, tuple(t.shape)) for n, t in own_tensors(m)} for c, m in models.items()}
    return StoredPipeline(name, backbone, models, tensors, {})


def _empty(backbone: type[Backbone], configs: dict[str, dict]) -> dict[str, nn.Module]:
    classes: dict[str, Any] = backbone.component_classes
    with torch.device("meta"):
        return {name: empty_component(classes[name], config) for name, config in configs.items()}


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of a model, tied ones once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def _on_hub(repo: str) -> StoredPipeline:
    from huggingface_hub import HfApi, hf_hub_download

    if not is_repository_name(repo):
        raise FileNotFoundError(f"there is no folder {repo}, and it is not a Hub repository (owner/name)")
    api = HfApi()
    files = api.list_repo_files(repo)
    if INDEX_NAME not in files:
        raise FileNotFoundError(f"the repository {repo} is not a pipeline: it has no {INDEX_NAME}")
    backbone = backbone_class(backbone_of(repo))
    configs, tensors = {}, {}
    for name in backbone.component_classes:
        weights = [f for f in files if re.fullmatch(rf"{name}/[^./]+\.safetensors", f)]
        if not weights or f"{name}/config.json" not in files:
            raise FileNotFoundError(f"the repository {repo} lacks the weights or the configuration of its {name}")
        configs[name] = read_json(hf_hub_download(repo, f"{name}/config.json"))
        headers = [api.parse_safetensors_file_metadata(repo, file).tensors for file in weights]
        tensors[name] = {n: (DTYPES[t.dtype], tuple(t.shape)) for header in headers for n, t in header.items()}
    index = read_json(hf_hub_download(repo, INDEX_NAME))
    return StoredPipeline(repo, backbone, _empty(backbone, configs), tensors, index)


# --- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A way to place a pipeline on a GPU."""

    name: str
    load: str = ""  # argument of from_pretrained, as code
    then: str = 'pipe.to("cuda")'  # code after loading
    matrix_bytes: float | None = None  # of the layers' matrices, per value; None: as loaded
    offload: str = ""  # "model", "blocks", "leaves"
    exact: bool = True  # whether images equal those of the plain pipeline
    tested: str = "on CPU"


_QUANT = 'quantization_config=PipelineQuantizationConfig(quant_mapping={{"transformer": {config}}})'
_NF4 = _QUANT.format(
    config='BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)'
)
_INT8 = _QUANT.format(config="TorchAoConfig(Int8WeightOnlyConfig())")
_BLOCKS = 'pipe.enable_group_offload("cuda", num_blocks_per_group=1, use_stream=True)'
_LEAVES = 'pipe.enable_group_offload("cuda", offload_type="leaf_level", use_stream=True)'
_FP8 = 'pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16); pipe.to("cuda")'
OPTIONS = (
    Option("all on the GPU"),
    Option("model offload", then="pipe.enable_model_cpu_offload()", offload="model"),
    Option("group offload, blocks", then=_BLOCKS, offload="blocks"),
    Option("group offload, leaves", then=_LEAVES, offload="leaves"),
    Option("fp8 layerwise", then=_FP8, matrix_bytes=1, exact=False),
    Option("int8 (torchao)", load=_INT8, matrix_bytes=1, exact=False),
    Option("nf4 (bitsandbytes)", load=_NF4, matrix_bytes=NF4_BYTES, exact=False, tested="no: needs a GPU"),
    Option("nf4 + model offload", load=_NF4, then="pipe.enable_model_cpu_offload()", matrix_bytes=NF4_BYTES, offload="model", exact=False, tested="no: needs a GPU"),
)  # fmt: skip


@dataclass(frozen=True)
class OptionMemory:
    """Memory of one option, in bytes."""

    option: Option
    dtype: str
    peak: float  # on the GPU
    phase: str  # in which the peak is reached
    host: float
    fits: bool

    def python(self, model: str) -> str:
        """The lines that load and place the pipeline this way."""
        arguments = [repr(model), f'dtype="{self.dtype}"', *([self.option.load] if self.option.load else [])]
        return f"pipe = echo4o.load_pipeline({', '.join(arguments)}); {self.option.then}"


@dataclass
class GenerationMemoryPlan:
    """The plan that `echo4o info --plan` prints; sizes are in bytes."""

    model: str
    gpu: float
    call: ImageCall
    memory: CallMemory
    weights: dict[str, dict]  # component -> stored bytes, parameters, dtypes
    encode: float  # one reference
    decode: float  # one image
    rows: list[OptionMemory] = field(default_factory=list)

    @property
    def recommended(self) -> OptionMemory | None:
        """The first option that fits; exact ones come first."""
        return next((row for row in self.rows if row.fits), None)

    def as_dict(self) -> dict:
        best = self.recommended
        rows = [
            {"option": r.option.name, "dtype": r.dtype, "peak": round(r.peak), "at": r.phase, "host": round(r.host)}
            | {"fits": r.fits, "exact": r.option.exact, "tested": r.option.tested}
            for r in self.rows
        ]
        return {
            "model": self.model,
            "gpu": round(self.gpu),
            "usable": round(USABLE * self.gpu),
            "image": {
                "height": self.memory.height,
                "width": self.memory.width,
                "batch": self.call.batch,
                "references": self.call.references,
                "branches": self.memory.branches,
            },
            "weights": self.weights,
            "caches": round(self.memory.caches),
            "activations": {
                "update": round(self.memory.update),
                "encode": round(self.encode),
                "decode": round(self.decode),
            },
            "reserve": round(RESERVE),
            "options": rows,
            "recommended": best.python(self.model) if best else None,
        }


def matrices(tensors: Tensors) -> dict[str, int]:
    """Number of values by name of the tensors that 8 and 4 bits replace: the matrices of the transformer's layers."""
    return {n: math.prod(shape) for n, (_, shape) in tensors.items() if n.startswith("layers.") and len(shape) == 2}


def make_plan(stored: StoredPipeline, gpu: float, call: ImageCall) -> GenerationMemoryPlan:
    """Weights, caches and activations of a call, and which options fit on a GPU of `gpu` bytes.

    Raises ValueError for a call that the model does not support.
    """
    dtypes = [dtype for dtype, _ in stored.tensors["transformer"].values()]
    dtype = max(set(dtypes), key=dtypes.count)
    # float32 is narrowed to save memory, float8 widened because it cannot compute
    narrow = torch.bfloat16 if dtype == torch.float32 or dtype.itemsize == 1 else dtype
    memory = stored.backbone.call_memory(stored.components, stored.index, call, narrow.itemsize)
    weights = {}
    for name, tensors in stored.tensors.items():
        names = sorted({str(d).removeprefix("torch.") for d, _ in tensors.values()})
        buffers = {n for n, _ in stored.components[name].named_buffers()}  # BAGEL's position table, for example
        values = sum(math.prod(s) for n, (_, s) in tensors.items() if n not in buffers)
        weights[name] = {"bytes": stored.nbytes(name), "parameters": values, "dtypes": names}
    side, vae = memory.reference_side, stored.components["vae"]
    plan = GenerationMemoryPlan(
        stored.name,
        gpu,
        call,
        memory,
        weights,
        encode=vae_bytes(vae, side, side, narrow, decode=False) if side else 0,
        decode=vae_bytes(vae, memory.height, memory.width, narrow, decode=True),
    )
    for option in OPTIONS:
        peak, phase = _peak(stored, plan, option, narrow)
        host = sum(_weights(stored, option, narrow).values()) if option.offload else 0.0
        fits = peak + RESERVE <= USABLE * gpu
        plan.rows.append(OptionMemory(option, str(narrow).removeprefix("torch."), peak + RESERVE, phase, host, fits))
    return plan


def _weights(stored: StoredPipeline, option: Option, dtype: torch.dtype) -> dict[str, float]:
    """Bytes by component, loaded as `dtype` with the option's matrices."""
    sizes = {c: float(sum(math.prod(s) for _, s in t.values()) * dtype.itemsize) for c, t in stored.tensors.items()}
    if option.matrix_bytes is not None:
        smaller = sum(matrices(stored.tensors["transformer"]).values())
        sizes["transformer"] -= smaller * (dtype.itemsize - option.matrix_bytes)
    return sizes


def _peak(stored: StoredPipeline, plan: GenerationMemoryPlan, option: Option, dtype: torch.dtype) -> tuple[float, str]:
    """The peak on the GPU without the reserve, and the phase in which it is reached."""
    sizes = _weights(stored, option, dtype)
    update = plan.memory.update
    if option.matrix_bytes == 1 and "fp8" in option.name:  # one matrix at a time is widened to compute
        update += max(matrices(stored.tensors["transformer"]).values()) * dtype.itemsize
    resident = {"update": sum(sizes.values()), "vae": sum(sizes.values())}
    updating = stored.backbone.updated_by
    if option.offload == "model":  # a VAE that encoded references stays until the transformer is done
        vae_too = sizes["vae"] if plan.call.references else 0
        resident = {"update": sizes[updating] + vae_too, "vae": sizes["vae"]}
    if option.offload in ("blocks", "leaves"):  # what computes, and what comes next
        tensors = {n: math.prod(s) * dtype.itemsize for n, (_, s) in stored.tensors[updating].items()}
        layers = stored.components[updating].config.get("num_layers", 1)  # a UNet moves as a whole
        inside = sum(size for n, size in tensors.items() if n.startswith("layers."))
        blocks = sum(tensors.values()) - inside + inside * min(2, layers) / layers
        leaves = 2.0 * max(tensors.values())
        resident = {"update": blocks if option.offload == "blocks" else leaves, "vae": sizes["vae"]}
    phases = {f"reading prompts ({name})": _reading(stored, name, sizes, option, dtype) for name in _encoders(stored)}
    phases |= {
        "encoding references": resident["vae"] + plan.encode,
        "an update": resident["update"] + plan.memory.caches + update,
        "decoding": resident["vae"] + plan.memory.caches + plan.decode,
    }
    phase = max(phases, key=lambda name: phases[name])
    return phases[phase], phase


def _encoders(stored: StoredPipeline) -> tuple[str, ...]:
    return stored.backbone.encoder_components


def _reading(stored: StoredPipeline, name: str, sizes: dict[str, float], option: Option, dtype: torch.dtype) -> float:
    """Bytes on the GPU while a component reads prompts; its activations are small."""
    if option.offload == "model":
        return sizes[name]
    if option.offload in ("blocks", "leaves"):
        return 2.0 * max(math.prod(shape) for _, shape in stored.tensors[name].values()) * dtype.itemsize
    return sum(sizes.values())


def as_json(plan: GenerationMemoryPlan) -> str:
    return json.dumps(plan.as_dict(), indent=2)


def as_text(plan: GenerationMemoryPlan) -> str:
    """The plan as tables."""
    size = f"{plan.memory.height}x{plan.memory.width}"
    branches = f"{plan.call.references} references, {plan.memory.branches} branches"
    lines = [f"{plan.model}: {plan.call.batch} x {size}, {branches}", ""]
    lines += [f"{'stored weights':<26}{'GB':>8}{'parameters':>17}"]
    for name, facts in plan.weights.items():
        lines.append(
            f"  {name:<24}{facts['bytes'] / 1e9:>8.2f}{facts['parameters']:>17,}  {'+'.join(facts['dtypes'])}"
        )
    parts = {
        "KV caches": plan.memory.caches,
        "activations of an update": plan.memory.update,
        "encoding a reference": plan.encode,
        "decoding an image": plan.decode,
        "reserve (assumed)": RESERVE,
    }
    lines += ["", f"{'beside them':<26}{'GB':>8}"]
    lines += [f"  {name:<24}{size / 1e9:>8.2f}" for name, size in parts.items()]
    lines += ["", f"{'option':<24}{'peak GB':>9}{'host GB':>9}  fits  {'at':<20} same image  ran here"]
    for row in plan.rows:
        fits = "yes" if row.fits else "no"
        exact = "yes" if row.option.exact else "no"
        host = f"{row.host / 1e9:.2f}" if row.host else "-"
        lines.append(
            f"{row.option.name:<24}{row.peak / 1e9:>9.2f}{host:>9}  {fits:<4}  {row.phase:<20} {exact:<12}  {row.option.tested}"
        )
    lines.append(f"a GPU of {plan.gpu / 1e9:.1f} GB, of which {USABLE:.0%} are counted on")
    best = plan.recommended
    lines += [
        "",
        best.python(plan.model)
        if best
        else "nothing fits: use a smaller image (--height, --width), fewer references or a larger GPU",
    ]
    return "\n".join(lines)
