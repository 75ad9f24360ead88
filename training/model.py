"""The model that learns: loading it, choosing what of it learns, and the one forward pass behind which it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from echo4o.modeling.bagel.loading_bagel import component_tensors
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.training.objective import LossTerms, add_noise, loss_terms
from echo4o.training.recipe import Full, Lora, Recipe, RecipeError
from echo4o.training.samples import TrainingBatch

ADAPTER = "default"
MATRICES = r"(to_q|to_k|to_v|to_out|ff\.gate_proj|ff\.up_proj|ff\.down_proj)"


class TrainedModel(nn.Module):
    """The two models that learn, behind one forward pass."""

    _no_split_modules = ["BagelBlock", "SiglipEncoderLayer"]  # what FSDP2 shards as a unit

    def __init__(self, transformer: nn.Module, vision_model: nn.Module):
        super().__init__()
        self.transformer, self.vision_model = transformer, vision_model

    def forward(self, batch: TrainingBatch, time_shift: float) -> LossTerms:
        noised = None
        if batch.sequence.latents is not None:
            noised = add_noise(batch.sequence, batch.noise, batch.raw_time, time_shift)
        return loss_terms(self.transformer, self.vision_model, batch.sequence, noised)


def part_of(name: str) -> str:
    """The part (see `recipe.Full`) that a parameter of [`TrainedModel`] belongs to."""
    if name.startswith("vision_model."):
        return "vision"
    if re.match(r"transformer\.(embed_tokens|lm_head)\.", name):
        return "text"
    return "und" if ".und." in name else "gen"


def load_pipeline(recipe: Recipe, empty: bool = False) -> Echo4oPipeline:
    """The pipeline that a recipe starts from, in the dtypes that it trains in.

    Frozen weights under LoRA stay in 16 bit where the run computes in 16 bit; what learns is float32 in any case,
    because small steps vanish in 16-bit weights.

    Args:
        empty: the two models that learn hold no memory yet (processes that receive sharded weights from another).
    """
    parts = {}
    frozen = frozen_dtype(recipe)
    try:
        if recipe.tune.method == "lora" and recipe.tune.quantize is not None:
            parts["transformer"] = _quantized(recipe.model)
        elif empty:
            with torch.device("meta"):
                for name, cls in (("transformer", BagelTransformer2DModel), ("vision_model", BagelVisionModel)):
                    parts[name] = cls.from_config(cls.load_config(recipe.model, subfolder=name))
        dtype = {"default": torch.float32, "transformer": frozen, "vision_model": frozen}
        pipeline = Echo4oPipeline.from_pretrained(recipe.model, dtype=dtype, **parts)
        if empty:
            for name in ("transformer", "vision_model"):
                _allocate(getattr(pipeline, name), base_folder(recipe.model) / name)
        return pipeline
    except (OSError, ValueError, TypeError) as error:  # the last one: a config.json with values of another type
        raise RecipeError(f"model: {recipe.model} cannot be loaded: {str(error).strip()}") from error


def _allocate(module: nn.Module, folder: Path) -> None:
    """Give an empty module addresses (Accelerate tells parameters apart by them), but no memory until it is written
    to; its buffers are not sent by other processes and are read."""
    module.to_empty(device="cpu")
    stored = component_tensors(folder)
    for name, buffer in module.named_buffers():
        with safe_open(stored[name].file, "pt") as file:
            buffer.copy_(file.get_tensor(name))


def base_folder(model: str) -> Path:
    """The folder of the pipeline that a run starts from, fetched from the Hub if need be."""
    return Path(model) if Path(model).is_dir() else Path(Echo4oPipeline.download(model))


def frozen_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of the transformer's and the vision model's weights before any of them is set to learn."""
    small = recipe.tune.method == "lora" and recipe.mixed_precision == "bf16" and recipe.sharding == "none"
    return torch.bfloat16 if small else torch.float32


def _quantized(model: str) -> BagelTransformer2DModel:
    from diffusers import BitsAndBytesConfig

    try:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["proj_in", "proj_out", "time_embed", "lm_head"],
        )
        return BagelTransformer2DModel.from_pretrained(
            model, subfolder="transformer", quantization_config=settings, dtype=torch.bfloat16
        )
    except (ImportError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"tune.quantize: nf4 needs a GPU and bitsandbytes (pip install bitsandbytes): {text}"
        ) from error


def set_up(model: TrainedModel, recipe: Recipe) -> None:
    """Freeze and unfreeze as the recipe says; add the adapter."""
    tune = recipe.tune
    for name, parameter in model.named_parameters():
        learns = isinstance(tune, Full) and part_of(name) in tune.parts
        if parameter.is_floating_point():
            parameter.requires_grad_(learns)
    if isinstance(tune, Lora):
        add_lora(model.transformer, tune, recipe.seed)
    if recipe.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
        model.vision_model.enable_gradient_checkpointing()


def lora_config(tune: Lora):
    """The recipe's settings as PEFT's."""
    from peft import LoraConfig

    return LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        target_modules=rf".*\.({'|'.join(tune.experts)})\.{MATRICES}",
    )


def add_lora(transformer: nn.Module, tune: Lora, seed: int) -> None:
    """Put adapters into the experts' matrices, the same on every process and in every run of this seed."""
    if tune.rank > transformer.config.hidden_size:
        raise RecipeError(f"tune.rank={tune.rank} exceeds the matrices: at most {transformer.config.hidden_size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(lora_config(tune), adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names, free of any wrapper's additions, and parameters of what learns."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield clean_name(name), parameter


def clean_name(name: str) -> str:
    """A parameter's name without what DDP, activation checkpointing and torch.compile put into it."""
    return re.sub(r"(^module\.|_checkpoint_wrapped_module\.|_orig_mod\.)", "", name)


def summary(model: nn.Module) -> dict[str, dict[str, int]]:
    """Numbers of parameters by part: {part: {"learning": n, "frozen": n}}."""
    table = {part: {"learning": 0, "frozen": 0} for part in ("gen", "und", "text", "vision")}
    for name, parameter in model.named_parameters():
        table[part_of(clean_name(name))]["learning" if parameter.requires_grad else "frozen"] += parameter.numel()
    return table


def cast(pipeline: Echo4oPipeline, dtype: torch.dtype) -> None:
    """Bring the pipeline's weights to one dtype."""
    for module in (pipeline.transformer, pipeline.vision_model, pipeline.vae):
        nn.Module.to(module, dtype)  # diffusers' own `to` warns about modules kept in float32 that do not exist
