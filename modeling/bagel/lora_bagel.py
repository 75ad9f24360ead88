"""LoRA on the pipeline: `load_lora_weights`, `save_lora_weights`, `set_adapters`, `fuse_lora`, ...

diffusers does the work; here is what it would get wrong for this model: pickled adapters are refused, folders written by
PEFT itself load (diffusers would load nothing and only warn), and alpha, rsLoRA and DoRA survive because the adapter's
configuration travels with the weights.
"""

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from safetensors.torch import load_file

# Regular expressions for LoraConfig(target_modules=...): all matrices of an expert's layers.
_MATRICES = r"(to_q|to_k|to_v|to_out|ff\.(gate_proj|up_proj|down_proj))"
LORA_TARGETS = {
    "gen": rf"layers\.\d+\.gen\.{_MATRICES}",
    "und": rf"layers\.\d+\.und\.{_MATRICES}",
    "both": rf"layers\.\d+\.(gen|und)\.{_MATRICES}",
}
_PEFT_PREFIX = "base_model.model."


class Echo4oLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """Adapters of the transformer. Put before `DiffusionPipeline` in the pipeline's bases."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """Adapter weights, named `transformer.*`, from a folder, file or Hub repository, or as given in a dict.

        Raises ValueError for pickled weights and for a PEFT folder whose configuration is missing.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which are not loaded.")
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict) and (Path(source) / "adapter_model.safetensors").is_file():
            state, metadata = _read_peft_folder(Path(source))
            return (state, metadata) if kwargs.get("return_lora_metadata") else state
        return super().lora_state_dict(source, **{**kwargs, "use_safetensors": True})


def _read_peft_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and configuration in diffusers' form from what `PeftModel.save_pretrained` writes."""
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise ValueError(
            f"{folder} holds adapter_model.safetensors without adapter_config.json: its alpha is unknown."
        )
    config = json.loads(config_file.read_text("utf-8"))
    state = load_file(folder / "adapter_model.safetensors")
    foreign = [name for name in state if not name.startswith(_PEFT_PREFIX)]
    if foreign:
        raise ValueError(f"{folder} is no PEFT adapter of this model: {foreign[0]!r} lacks {_PEFT_PREFIX!r}.")
    weights = {f"transformer.{name.removeprefix(_PEFT_PREFIX)}": tensor for name, tensor in state.items()}
    return weights, {f"transformer.{key}": value for key, value in config.items()}
