"""What a pipeline needs to draw, before anything of it is loaded: `echo4o info MODEL --plan --gpu 24GB`.

Weights are counted from configurations and safetensors headers, tensor by tensor. KV caches follow from the sequence.
Activations of the transformer come from a formula (a test compares it with what is allocated), those of the VAE from a
dry run on the meta device. What the CUDA context and fragments take is training's assumption.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from echo4o.common.hub_names import is_repository_name
from echo4o.modeling.bagel.loading_bagel import INDEX_NAME
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.modeling.bagel.weights_bagel import DTYPES, component_tensors, read_json
from echo4o.training.plan import NF4_BYTES, RELEASE_VAE, RESERVE, USABLE

CLASSES = {"transformer": BagelTransformer2DModel, "vision_model": BagelVisionModel, "vae": AutoencoderKL}
TEXT_TOKENS = 128  # of a prompt
MAX_REFERENCES = inspect.signature(Echo4oPipeline.__init__).parameters["max_references"].default
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A pipeline's configurations and tensors by component, without their values."""

    name: str
    configs: dict[str, dict]
    tensors: dict[str, Tensors]
    max_references: int = MAX_REFERENCES

    def nbytes(self, component: str) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors[component].values())


def read_stored(model: str) -> Stored:
    """Read a pipeline folder, a Hub repository, or "release", the released BAGEL's sizes in bfloat16.

    Only configurations and headers are read. Raises ValueError and OSError for anything else.
    """
    if model == "release":
        return _release()
    if Path(model).is_dir():
        folder = Path(model)
        if not (folder / INDEX_NAME).is_file():
            raise FileNotFoundError(
                f"{model} has no {INDEX_NAME}; convert an original checkpoint with `echo4o convert SRC DST` first, "
                "or plan for its sizes with the name `release`"
            )
        configs = {name: read_json(folder / name / "config.json") for name in CLASSES}
        headers = {name: component_tensors(folder / name) for name in CLASSES}
        tensors = {c: {n: (DTYPES[t.dtype], t.shape) for n, t in header.items()} for c, header in headers.items()}
        return Stored(model, configs, tensors, _max_references(folder / INDEX_NAME))
    return _on_hub(model)


def _release() -> Stored:
    configs = {"transformer": {}, "vision_model": {}, "vae": RELEASE_VAE}
    with torch.device("meta"):
        models = {name: cls.from_config(configs[name]) for name, cls in CLASSES.items()}
    tensors = {c: {n: (torch.bfloat16, tuple(t.shape)) for n, t in m.state_dict().items()} for c, m in models.items()}
    return Stored("release", {name: dict(m.config) for name, m in models.items()}, tensors)


def _on_hub(repo: str) -> Stored:
    from huggingface_hub import HfApi, hf_hub_download

    if not is_repository_name(repo):
        raise FileNotFoundError(f"there is no folder {repo}, and it is not a Hub repository (owner/name)")
    api = HfApi()
    files = api.list_repo_files(repo)
    if INDEX_NAME not in files:
        raise FileNotFoundError(f"the repository {repo} is no pipeline: it has no {INDEX_NAME}")
    configs, tensors = {}, {}
    for name in CLASSES:
        weights = [f for f in files if re.fullmatch(rf"{name}/[^./]+\.safetensors", f)]
        if not weights or f"{name}/config.json" not in files:
            raise FileNotFoundError(f"the repository {repo} lacks the weights or the configuration of its {name}")
        configs[name] = read_json(hf_hub_download(repo, f"{name}/config.json"))
        headers = [api.parse_safetensors_file_metadata(repo, file).tensors for file in weights]
        tensors[name] = {n: (DTYPES[t.dtype], tuple(t.shape)) for header in headers for n, t in header.items()}
    return Stored(repo, configs, tensors, _max_references(hf_hub_download(repo, INDEX_NAME)))


def _max_references(index: str | Path) -> int:
    return read_json(index).get("max_references", MAX_REFERENCES)


# --- what drawing needs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """What is drawn: `batch` prompts of one picture each, with `references` of the largest size; 3 branches with
    references, 2 without."""

    height: int
    width: int
    batch: int = 1
    references: int = 1

    @property
    def branches(self) -> int:
        return 3 if self.references else 2


def drawing(stored: Stored, height: int | None, width: int | None, batch: int, references: int) -> Drawing:
    """Checked against the model's tables; None is the largest size. Raises ValueError."""
    if references > stored.max_references:
        raise ValueError(f"--references {references}: the model takes {stored.max_references} for a prompt at most")
    stride, largest = _stride(stored), _stride(stored) * stored.configs["transformer"]["max_latent_size"]
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < stride or value % stride or value > largest):
            raise ValueError(f"--{name} {value}: sizes are multiples of {stride} from {stride} to {largest}")
    return Drawing(height or largest, width or largest, batch, references)


def _stride(stored: Stored) -> int:
    factor = 2 ** (len(stored.configs["vae"]["block_out_channels"]) - 1)
    return factor * stored.configs["transformer"]["latent_patch_size"]


def cache_bytes(stored: Stored, what: Drawing, itemsize: int, text_tokens: int = TEXT_TOKENS) -> int:
    """KV caches of all prompts: the condition's, whose start is the text-free branch's, and the image-free branch's.

    Each holds its context and room for the picture; text and pictures bring two markers each.
    """
    t, v, stride = stored.configs["transformer"], stored.configs["vision_model"], _stride(stored)
    picture = what.height * what.width // stride**2 + 2
    reference = t["max_latent_size"] ** 2 + 2 + v["max_patches_per_side"] ** 2 + 2
    text = text_tokens + 2
    tokens = text + what.references * reference + picture
    tokens += text + picture if what.references else 0
    width = t["hidden_size"] // t["num_attention_heads"] * t["num_key_value_heads"]
    return what.batch * tokens * 2 * t["num_layers"] * width * itemsize


def step_bytes(stored: Stored, what: Drawing, itemsize: int) -> int:
    """Most that one update allocates: inside the MLP of a layer, for the tokens of all rows.

    Per token: the layer's input, queries, the attention's result, their sum and its norm (hidden each), keys and
    values, and the MLP's gate, value and product (intermediate each).
    """
    t, stride = stored.configs["transformer"], _stride(stored)
    h = t["hidden_size"]
    k = h // t["num_attention_heads"] * t["num_key_value_heads"]
    tokens = what.batch * what.branches * (what.height * what.width // stride**2)
    return tokens * (5 * h + 2 * k + 3 * t["intermediate_size"]) * itemsize


class _Fused(TorchFunctionMode):
    """Attention allocates its result alone, as fused kernels do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """Most bytes of new tensors alive at once inside the block, on any device, the meta device too."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and storage._cdata not in before:
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _is(value) -> bool:
    return isinstance(value, torch.Tensor)


def vae_bytes(stored: Stored, height: int, width: int, dtype: torch.dtype, decode: bool) -> int:
    """Most that the VAE allocates for one picture without tiles, from a dry run."""
    config = {k: v for k, v in stored.configs["vae"].items() if not k.startswith("_")}
    with torch.device("meta"), torch.no_grad():
        # diffusers' own `to` warns of modules that do not exist
        vae = torch.nn.Module.to(AutoencoderKL.from_config(config), dtype)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        with PeakBytes() as peak, _Fused():
            if decode:
                vae.decode(torch.empty(1, vae.config.latent_channels, height // factor, width // factor, dtype=dtype))
            else:
                vae.encode(torch.empty(1, 3, height, width, dtype=dtype))
    return peak.peak


# --- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A way to run. `code` follows `pipe = ` and the load; `exact`: the picture is that of the plain pipeline."""

    name: str
    load: str = ""
    then: str = 'pipe.to("cuda")'
    matrix_bytes: float | None = None  # of the layers' matrices, per value; None: as loaded
    offload: str = ""  # "model", "blocks", "leaves"
    exact: bool = True
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
class Row:
    """What one option needs, in bytes."""

    option: Option
    dtype: str
    peak: float
    phase: str
    host: float
    fits: bool

    def python(self, model: str) -> str:
        arguments = [repr(model), f'dtype="{self.dtype}"', *([self.option.load] if self.option.load else [])]
        return f"pipe = Echo4oPipeline.from_pretrained({', '.join(arguments)}); {self.option.then}"


@dataclass
class MemoryPlan:
    """Everything that `echo4o info --plan` prints; bytes."""

    model: str
    gpu: float
    drawing: Drawing
    weights: dict[str, dict]  # component -> stored bytes, parameters, dtypes
    caches: float
    step: float
    encode: float
    decode: float
    rows: list[Row] = field(default_factory=list)

    @property
    def recommended(self) -> Row | None:
        """The first option that fits; those that change no number come first."""
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
            "drawing": vars(self.drawing) | {"branches": self.drawing.branches},
            "weights": self.weights,
            "caches": round(self.caches),
            "activations": {"update": round(self.step), "encode": round(self.encode), "decode": round(self.decode)},
            "reserve": round(RESERVE),
            "options": rows,
            "recommended": best.python(self.model) if best else None,
        }


def matrices(tensors: Tensors) -> dict[str, int]:
    """Values by name of what 8 and 4 bits replace: the matrices of the transformer's layers."""
    return {n: math.prod(shape) for n, (_, shape) in tensors.items() if n.startswith("layers.") and len(shape) == 2}


def make_plan(stored: Stored, gpu: float, what: Drawing) -> MemoryPlan:
    """Weights, caches and activations, and which options fit on a GPU of `gpu` bytes."""
    dtypes = [dtype for dtype, _ in stored.tensors["transformer"].values()]
    dtype = max(set(dtypes), key=dtypes.count)
    weights = {}
    for name, tensors in stored.tensors.items():
        kinds = sorted({str(d).removeprefix("torch.") for d, _ in tensors.values()})
        values = sum(math.prod(s) for n, (_, s) in tensors.items() if n != "pos_embed")
        weights[name] = {"bytes": stored.nbytes(name), "parameters": values, "dtypes": kinds}
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    largest = _stride(stored) * stored.configs["transformer"]["max_latent_size"]
    plan = MemoryPlan(
        stored.name,
        gpu,
        what,
        weights,
        cache_bytes(stored, what, narrow.itemsize),
        step_bytes(stored, what, narrow.itemsize),
        vae_bytes(stored, largest, largest, narrow, decode=False) if what.references else 0,
        vae_bytes(stored, what.height, what.width, narrow, decode=True),
    )
    for option in OPTIONS:
        peak, phase = _peak(stored, plan, option, narrow)
        host = sum(_weights(stored, option, narrow).values()) if option.offload else 0.0
        fits = peak + RESERVE <= USABLE * gpu
        plan.rows.append(Row(option, str(narrow).removeprefix("torch."), peak + RESERVE, phase, host, fits))
    return plan


def _weights(stored: Stored, option: Option, dtype: torch.dtype) -> dict[str, float]:
    """Bytes by component, loaded as `dtype` with the option's matrices."""
    sizes = {c: float(sum(math.prod(s) for _, s in t.values()) * dtype.itemsize) for c, t in stored.tensors.items()}
    if option.matrix_bytes is not None:
        smaller = sum(matrices(stored.tensors["transformer"]).values())
        sizes["transformer"] -= smaller * (dtype.itemsize - option.matrix_bytes)
    return sizes


def _peak(stored: Stored, plan: MemoryPlan, option: Option, dtype: torch.dtype) -> tuple[float, str]:
    """Most bytes on the GPU without the reserve, and when."""
    w = _weights(stored, option, dtype)
    transformer, vision, vae = w["transformer"], w["vision_model"], w["vae"]
    step = plan.step
    if option.matrix_bytes == 1 and "fp8" in option.name:  # one matrix at a time is widened to compute
        step += max(matrices(stored.tensors["transformer"]).values()) * dtype.itemsize
    stays = {"transformer": transformer + vision + vae, "vae": transformer + vision + vae}
    if option.offload == "model":  # a VAE that has encoded references stays until the transformer is done
        stays = {"transformer": transformer + (vae if plan.drawing.references else 0), "vae": vae}
    if option.offload in ("blocks", "leaves"):  # what computes, and what comes next
        tensors = stored.tensors["transformer"]
        sizes = {n: math.prod(shape) * dtype.itemsize for n, (_, shape) in tensors.items()}
        layers = stored.configs["transformer"]["num_layers"]
        inside = sum(size for n, size in sizes.items() if n.startswith("layers."))
        blocks = sum(sizes.values()) - inside + inside * min(2, layers) / layers
        stays = {"transformer": blocks if option.offload == "blocks" else 2 * max(sizes.values()), "vae": vae}
    phases = {
        "encoding references": stays["vae"] + plan.encode,
        "an update": stays["transformer"] + plan.caches + step,
        "decoding": stays["vae"] + plan.caches + plan.decode,
    }
    when = max(phases, key=phases.get)
    return phases[when], when


def as_json(plan: MemoryPlan) -> str:
    return json.dumps(plan.as_dict(), indent=2)


def as_text(plan: MemoryPlan) -> str:
    """The plan as tables."""
    what = plan.drawing
    lines = [
        f"{plan.model}: {what.batch} x {what.height}x{what.width}, {what.references} references, {what.branches} branches",
        "",
    ]
    lines += [f"{'stored weights':<26}{'GB':>8}{'parameters':>17}"]
    for name, facts in plan.weights.items():
        lines.append(
            f"  {name:<24}{facts['bytes'] / 1e9:>8.2f}{facts['parameters']:>17,}  {'+'.join(facts['dtypes'])}"
        )
    parts = {
        "KV caches": plan.caches,
        "activations of an update": plan.step,
        "encoding a reference": plan.encode,
        "decoding a picture": plan.decode,
        "reserve (assumed)": RESERVE,
    }
    lines += ["", f"{'beside them':<26}{'GB':>8}"]
    lines += [f"  {name:<24}{size / 1e9:>8.2f}" for name, size in parts.items()]
    lines += ["", f"{'option':<24}{'peak GB':>9}{'host GB':>9}  fits  {'at':<20} same picture  ran here"]
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
        else "nothing fits: a smaller picture (--height, --width), fewer references, a larger GPU",
    ]
    return "\n".join(lines)
