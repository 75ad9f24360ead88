"""The trained model: loading, freezing, LoRA adapters, and the module whose forward pass Accelerate wraps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import cast as cast_type

import torch
from safetensors import safe_open
from torch import nn

from echo4o.modeling.common.lora_files import find_adapter, read_adapter
from echo4o.modeling.common.weights import component_tensors
from echo4o.modeling.pipelines import pipeline_class
from echo4o.training.backbones import backbone_class, backbone_names
from echo4o.training.backbones.base import Backbone, LossTerm
from echo4o.training.recipe import FullTuning, LoraTuning, RecipeError, TrainingRecipe

ADAPTER = "default"


class TrainedModel(nn.Module):
    """The backbone's trained components behind one forward pass; attributes are named as the pipeline's components."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        for name in backbone.trained_components:
            setattr(self, name, getattr(backbone.pipeline, name))
        components = [getattr(self, name) for name in backbone.trained_components]
        self._no_split_modules = [cls for component in components for cls in component._no_split_modules]

    def forward(self, batch: Any) -> dict[str, LossTerm]:
        return self.backbone.losses(self, batch)


# --- loading --------------------------------------------------------------------------------------------------------


def load_backbone(recipe: TrainingRecipe, empty: bool = False) -> Backbone:
    """The pipeline that a recipe starts from, as its backbone.

    Args:
        empty: allocate the trained components without reading their weights, for processes that receive sharded
            weights from another process.

    Raises:
        RecipeError: the model cannot be loaded, or belongs to another backbone.
    """
    backbone = backbone_class(recipe.backbone)
    return backbone(load_pipeline(recipe, backbone, empty), recipe)


def load_pipeline(recipe: TrainingRecipe, backbone: type[Backbone] | None = None, empty: bool = False):
    """The pipeline that a recipe starts from, in the dtypes that it trains in. Arguments as in [`load_backbone`].

    Frozen weights under LoRA stay in 16 bit where the run computes in 16 bit. Trained weights are float32, because
    small steps vanish in 16 bit.
    """
    backbone = backbone or backbone_class(recipe.backbone)
    components: dict[str, nn.Module] = {}
    frozen = frozen_dtype(recipe)
    try:
        pipeline_type = pipeline_class(recipe.model)
        expected = backbone_names()[recipe.backbone]
        if pipeline_type.__name__ != expected:
            raise ValueError(f"it is a {pipeline_type.__name__}, and backbone: {recipe.backbone} trains a {expected}")
        if isinstance(recipe.tune, LoraTuning) and recipe.tune.quantize is not None:
            components["transformer"] = _load_nf4(recipe.model, backbone.component_classes["transformer"])
        elif empty:
            with torch.device("meta"):
                for name in backbone.trained_components:
                    cls: Any = backbone.component_classes[name]
                    components[name] = cls.from_config(cls.load_config(recipe.model, subfolder=name))
        for name in backbone.quantized_components(recipe):
            components[name] = _load_nf4_encoder(recipe.model, backbone.component_classes[name], name)
        dtype = {"default": torch.float32} | dict.fromkeys(backbone.trained_components, frozen)
        dtype |= dict.fromkeys(backbone.encoder_components, encoder_dtype(recipe))
        pipeline = pipeline_type.from_pretrained(recipe.model, dtype=dtype, **components)
        if empty:
            for name in backbone.trained_components:
                _allocate(getattr(pipeline, name), base_folder(recipe.model) / name)
        return pipeline
    except (OSError, ValueError, TypeError) as error:  # TypeError: a config.json with values of another type
        raise RecipeError(f"model: {recipe.model} cannot be loaded: {str(error).strip()}") from error


def empty_component(cls: Any, config: dict) -> nn.Module:
    """A component of a configuration, a diffusers model or one of transformers; on the meta device if the caller is."""
    if hasattr(cls, "from_config"):  # diffusers
        return cls.from_config(config)
    return cls._from_config(cls.config_class.from_dict(config))  # transformers 5


def _allocate(module: nn.Module, folder: Path) -> None:
    """Allocate an empty module and read its buffers, which other processes do not send.

    Parameters get addresses, by which Accelerate tells them apart, but no memory before the first write. Those in the
    class's `_encoding_parameters` are read as well: encoding rows needs them.
    """
    module.to_empty(device="cpu")
    stored = component_tensors(folder)
    needed = dict(module.named_buffers())
    needed |= {n: p for n, p in module.named_parameters() if n in getattr(type(module), "_encoding_parameters", ())}
    for name, tensor in needed.items():
        with safe_open(stored[name].file, "pt") as file, torch.no_grad():
            tensor.copy_(file.get_tensor(name))


def base_folder(model: str) -> Path:
    """The folder of the pipeline that a run starts from, downloaded from the Hub if necessary."""
    return Path(model) if Path(model).is_dir() else Path(pipeline_class(model).download(model))


def frozen_dtype(recipe: TrainingRecipe) -> torch.dtype:
    """The dtype in which the trained components are loaded, before any of their parameters is set to train."""
    small = recipe.tune.method == "lora" and recipe.mixed_precision == "bf16" and recipe.sharding == "none"
    return torch.bfloat16 if small else torch.float32


def encoder_dtype(recipe: TrainingRecipe) -> torch.dtype:
    """The dtype of the backbone's `encoder_components`."""
    return torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float32


def _load_nf4(model: str, cls: Any) -> nn.Module:
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig

    try:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(cls._keep_in_full_precision),
        )
        return cls.from_pretrained(model, subfolder="transformer", quantization_config=settings, dtype=torch.bfloat16)
    except (ImportError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"tune.quantize: nf4 needs a GPU and bitsandbytes (pip install bitsandbytes): {text}"
        ) from error


def _load_nf4_encoder(model: str, cls: Any, component: str) -> nn.Module:
    """A frozen transformers model in 4 bit."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        return cls.from_pretrained(
            base_folder(model) / component, quantization_config=settings, dtype=torch.bfloat16, use_safetensors=True
        )
    except (ImportError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"{component} in 4 bit needs a GPU and bitsandbytes (pip install bitsandbytes): {text}"
        ) from error


def cast(pipeline, dtype: torch.dtype) -> None:
    """Convert the weights of every component of the pipeline to one dtype."""
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            nn.Module.to(module, dtype)  # diffusers' own `to` warns about modules kept in float32 that do not exist


# --- trained parts ----------------------------------------------------------------------------------------------------


def part_of(name: str, component_classes: dict[str, type]) -> str:
    """The trainable part that a parameter `component.name` belongs to, by its model's `_trainable_parts`."""
    component, _, own = name.partition(".")
    parts: dict[str, str] = component_classes[component]._trainable_parts
    return next(part for part, pattern in parts.items() if re.match(pattern, own))


def part_names(backbone: type[Backbone]) -> list[str]:
    """Names of all parts that can train."""
    return [part for name in backbone.trained_components for part in backbone.component_classes[name]._trainable_parts]


def set_up(model: Any, recipe: TrainingRecipe, component_classes: dict[str, type]) -> None:
    """Set `requires_grad` of all parameters as the recipe defines, and add the LoRA adapter.

    Args:
        model: has the trained components as attributes, as [`TrainedModel`].
    """
    tune = recipe.tune
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            trains = isinstance(tune, FullTuning) and part_of(name, component_classes) in tune.parts
            parameter.requires_grad_(trains)
    if isinstance(tune, LoraTuning):
        add_lora(model.transformer, tune, recipe.seed)
    if recipe.gradient_checkpointing:
        for component in model.children():
            component.enable_gradient_checkpointing()


def lora_config(tune: LoraTuning, transformer_class: Any):
    """The recipe's settings as PEFT's configuration, with the targets that the model class names."""
    from peft import LoraConfig

    return LoraConfig(
        r=tune.rank,
        lora_alpha=cast_type(int, tune.alpha),  # PEFT computes with floats as well
        lora_dropout=tune.dropout,
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        init_lora_weights=tune.initial_weights(),
        target_modules=tune.target_modules(transformer_class._lora_targets),
        rank_pattern=dict(tune.rank_pattern),
        alpha_pattern={pattern: cast_type(int, alpha) for pattern, alpha in tune.alpha_pattern.items()},
    )


def add_lora(transformer: Any, tune: LoraTuning, seed: int) -> None:
    """Inject LoRA adapters, with the same initial values on every process for a given seed.

    Raises:
        RecipeError: the rank exceeds the matrices, or `init_adapter` does not fit.
    """
    for rank in (tune.rank, *tune.rank_pattern.values()):
        if rank > transformer.config.hidden_size:
            raise RecipeError(f"tune.rank={rank} exceeds the matrices: at most {transformer.config.hidden_size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(lora_config(tune, type(transformer)), adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _check_patterns(transformer, tune)
    if tune.init_adapter is not None:
        _load_initial(transformer, tune)


def _check_patterns(transformer: Any, tune: LoraTuning) -> None:
    """Raise RecipeError for a pattern that matches no adapted module."""
    modules = {name.partition(".lora_A")[0] for name, _ in transformer.named_modules() if ".lora_A" in name}
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(tune, setting):
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", module) for module in modules):
                raise RecipeError(f"tune.{setting}: {pattern!r} matches no adapted module, such as {min(modules)}.")


def _load_initial(transformer: Any, tune: LoraTuning) -> None:
    """Replace the adapter's initial values by those of `tune.init_adapter`."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        state, settings = read_adapter(find_adapter(str(tune.init_adapter)))
    except (OSError, ValueError) as error:
        raise RecipeError(f"tune.init_adapter: {error}") from error
    given = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    wrong = sorted(given.keys() ^ own.keys())
    wrong = wrong or [name for name in own if own[name].shape != given[name].shape]
    if wrong:
        raise RecipeError(
            f"tune.init_adapter: {tune.init_adapter} has other modules or ranks than the recipe, for example {wrong[0]}."
        )
    before = {name: (settings or {}).get(name) for name in ("lora_alpha", "use_rslora", "use_dora")}
    now = {"lora_alpha": tune.alpha, "use_rslora": tune.rslora, "use_dora": tune.dora}
    if settings is not None and before != now:
        raise RecipeError(f"tune.init_adapter: {tune.init_adapter} has {before}, and the recipe {now}.")
    set_peft_model_state_dict(transformer, {n: t.float() for n, t in given.items()}, adapter_name=ADAPTER)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names (without the prefixes of wrappers) and parameters that are trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield clean_name(name), parameter


def clean_name(name: str) -> str:
    """A parameter's name without the additions of DDP, activation checkpointing and torch.compile."""
    return re.sub(r"(^module\.|_checkpoint_wrapped_module\.|_orig_mod\.)", "", name)


def count_parameters(model: nn.Module, backbone: type[Backbone]) -> dict[str, dict[str, int]]:
    """Numbers of parameters by part: {part: {"trained": n, "frozen": n}}."""
    table = {part: {"trained": 0, "frozen": 0} for part in part_names(backbone)}
    for name, parameter in model.named_parameters():
        part = part_of(clean_name(name), backbone.component_classes)
        table[part]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return table
