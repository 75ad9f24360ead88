"""BAGEL's vision model: SigLIP over packed patches, a connector to the language model's width, and a position table.

Images of different sizes are packed without padding. Token-wise layers run once over the patches of all images;
attention runs per image.
"""

import copy
import inspect
import json
import math
import numbers
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer


@dataclass
class BagelVisionOutput(BaseOutput):
    """Features of V patches.

    Args:
        embeds: (V, output_size) input of the language model: connector output plus position embedding.
        last_hidden_state: (V, hidden_size) SigLIP's output after its last norm.
        connected: (V, output_size) connector output without position embedding.
    """

    embeds: torch.Tensor
    last_hidden_state: torch.Tensor | None = None  # the defaults let accelerate rebuild an output on another device
    connected: torch.Tensor | None = None


class PackedSiglipAttention(SiglipAttention):
    """SigLIP's attention over packed images, of which each attends to itself only."""

    def forward(self, hidden_states, attention_mask=None, *, lengths: list[int], **kwargs):
        """(1, V, hidden) -> (1, V, hidden); `lengths`: number of patches of each image."""
        projected = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)  # (1, heads, V, head_dim)
        images = zip(*(x.split(lengths, dim=2) for x in heads), strict=True)
        attended = [nn.functional.scaled_dot_product_attention(q, k, v) for q, k, v in images]
        return self.out_proj(torch.cat(attended, dim=2).transpose(1, 2).flatten(2)), None


class BagelConnector(nn.Module):
    """Two-layer MLP from SigLIP's width to the language model's."""

    def __init__(self, in_size: int, out_size: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(in_size, out_size)
        self.activation = ACT2FN[activation]
        self.fc2 = nn.Linear(out_size, out_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class BagelVisionModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """SigLIP without its pooling head, connector and position table. The defaults are the sizes of the release.

    Args:
        num_layers: number of layers; the release omits the last of the 27 layers of SigLIP so400m.
        max_patches_per_side: entries per side of the two position tables (SigLIP's own and the language model's).
        output_size: the language model's hidden size.
    """

    config: Any  # pyright: ignore[reportIncompatibleVariableOverride] - a FrozenDict with the arguments as attributes

    _supports_gradient_checkpointing = True
    _auto_class = "AutoModel"  # diffusers.AutoModel loads a published folder of this component
    _gradient_checkpointing_func: Any
    _no_split_modules = ["SiglipEncoderLayer"]
    _repeated_blocks = ["SiglipEncoderLayer"]
    # Quantizing the patch embedding or the connector changes results.
    _keep_in_full_precision = ["patch_embed", "connector"]
    _skip_layerwise_casting_patterns = ["norm", "pos_embed", "position_embedding", *_keep_in_full_precision]
    _trainable_parts = {"vision": ""}

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_layers: int = 26,
        num_attention_heads: int = 16,
        patch_size: int = 14,
        num_channels: int = 3,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        max_patches_per_side: int = 70,
        connector_act: str = "gelu_pytorch_tanh",
        output_size: int = 3584,
    ):
        super().__init__()
        _check_options(self)
        siglip = SiglipVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=num_attention_heads,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
        )
        self.patch_embed = nn.Linear(patch_size**2 * num_channels, hidden_size)
        self.position_embedding = nn.Embedding(max_patches_per_side**2, hidden_size)
        self.layers = nn.ModuleList(SiglipEncoderLayer(siglip) for _ in range(num_layers))
        for layer in self.layers:
            layer.self_attn = PackedSiglipAttention(siglip)
        self.post_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.connector = BagelConnector(hidden_size, output_size, connector_act)
        table = get_2d_sincos_pos_embed(output_size, max_patches_per_side, output_type="pt").float()
        self.register_buffer("pos_embed", table.reshape(max_patches_per_side**2, output_size))
        self.gradient_checkpointing = False

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, without a warning about `auto_map`, by which `AutoModel` finds this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, but weights keep their stored dtype unless `dtype` is given."""
        dtype = _read_dtype(kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"])
        kwargs["dtype"] = dtype or _stored_dtype(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _exempting(kwargs["quantization_config"], cls._keep_in_full_precision)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def load_lora_adapter(self, *args, **kwargs):
        """As in diffusers; injected layers take the mode (training or evaluation) of the model."""
        _save_requires_grad(self)
        super().load_lora_adapter(*args, **kwargs)
        self.train(self.training)

    def add_adapter(self, adapter_config, adapter_name: str = "default") -> None:
        """As in diffusers; injected layers take the mode (training or evaluation) of the model."""
        _save_requires_grad(self)
        super().add_adapter(adapter_config, adapter_name)
        self.train(self.training)

    def unload_lora(self) -> None:
        """As in diffusers, but parameters require gradients again as before the first adapter."""
        super().unload_lora()
        _restore_requires_grad(self)

    def forward(
        self, patches: torch.Tensor, position_ids: torch.Tensor, lengths: list[int], return_dict: bool = True
    ) -> BagelVisionOutput | tuple:
        """Encode packed images.

        Args:
            patches: (V, patch_size**2 * 3) pixels in [-1, 1], each patch flattened as (row, column, channel).
            position_ids: (V,) indices into the position tables.
            lengths: number of patches of each image; their sum is V.
            return_dict: False returns the output as a tuple, `embeds` first.
        """
        assert sum(lengths) == patches.shape[0], (lengths, tuple(patches.shape))
        dtype = self.position_embedding.weight.dtype
        x = self.patch_embed(patches.to(dtype)) + self.position_embedding(position_ids)
        x = x[None]  # (1, V, hidden): SigLIP's layers expect a batch dimension
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(lambda x, layer=layer: layer(x, None, lengths=lengths), x)
            else:
                x = layer(x, None, lengths=lengths)
        x = self.post_layernorm(x)[0]
        connected = self.connector(x)
        embeds = connected + self.pos_embed[position_ids].to(connected.dtype)
        output = BagelVisionOutput(embeds=embeds, last_hidden_state=x, connected=connected)
        return output if return_dict else output.to_tuple()

    # --- costs: arithmetic and memory of a training step ------------------------------------------------------------

    def trains(self) -> bool:
        """Whether the weights of this model train."""
        return self.patch_embed.weight.requires_grad

    def flops(self, lengths: list[int]) -> float:
        """Floating point operations of the matrix products in one forward pass, and in the backward pass if it trains.

        `lengths`: patches of each image.
        """
        config, passes = self.config, 3 if self.trains() else 1
        weights = config.num_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
        weights += config.hidden_size * config.output_size + config.output_size**2
        width = config.num_layers * config.hidden_size
        return (2 * weights * sum(lengths) + 4 * width * sum(n * n for n in lengths)) * passes

    def layer_activation_bytes(self, compute: int, residual: int) -> float:
        """Bytes that one layer keeps per patch. Arguments: bytes per value of matrix products and between layers."""
        width, inputs = self.config.hidden_size, 4 if compute < 4 else 2  # inputs of q, k, v and MLP, cast or shared
        return 2 * width * residual + (inputs + 5) * width * compute + 2 * self.config.intermediate_size * compute

    def activation_bytes(self, patches: int, compute: int, residual: int, checkpointing: bool = False) -> float:
        """Bytes kept between the forward and backward pass if the model trains.

        With `checkpointing`, only the layers' inputs are counted: a layer that is computed again adds
        `layer_activation_bytes`.
        """
        config, width, out = self.config, self.config.hidden_size, self.config.output_size
        layer = width * residual if checkpointing else self.layer_activation_bytes(compute, residual)
        kept = config.num_layers * layer + width * residual + (width + 2 * out) * compute
        return patches * (kept + config.patch_size**2 * config.num_channels * compute)


def _check_options(model: ConfigMixin) -> None:
    """Raise ValueError for an option in config.json that has another type than its default or is not positive."""
    config: Any = model.config
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        value, default = config.get(name), parameter.default
        if default is parameter.empty:
            continue
        kind = {int: numbers.Integral, float: numbers.Real, str: str}[type(default)]
        is_valid = isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, str) or value > 0)
        if not is_valid:
            wanted = {int: "a whole number above 0", float: "a number above 0", str: "a string"}[type(default)]
            raise ValueError(f"{name}={value!r} in the config.json of a {type(model).__name__} must be {wanted}.")


def _save_requires_grad(model: nn.Module) -> None:
    """Store `requires_grad` of every parameter before the first adapter, because PEFT freezes the model."""
    if not getattr(model, "peft_config", None):
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.__dict__["_requires_grad_before_adapters"] = flags


def _restore_requires_grad(model: nn.Module) -> None:
    """Restore `requires_grad` of every parameter after the last adapter was removed."""
    before = model.__dict__.pop("_requires_grad_before_adapters", {})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def _exempting(config, names: list[str]):
    """A copy of a quantization configuration that excludes the modules `names`, unless it excludes others."""
    config = copy.copy(config)
    for option in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(config, option, names) is None:
            setattr(config, option, list(names))
    return config


def _read_dtype(dtype: Any) -> Any:
    """A dtype from a dtype or its name; None and "auto" mean the stored dtype and give None."""
    if isinstance(dtype, str):
        return None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), dtype)
    return dtype


def _stored_files(name, subfolder: str | None = None, variant: str | None = None, **hub) -> list[Path]:
    """The safetensors files that diffusers loads a model from; those of a Hub repository are downloaded.

    Empty if there are none: diffusers then raises the error.
    """

    def find(file: str) -> Path | None:
        if Path(name).is_dir():
            path = Path(name, subfolder or "", file)
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(str(name), file, subfolder=subfolder, **hub))
        except (OSError, ValueError, EntryNotFoundError):
            return None

    if Path(name).is_file():
        return [Path(name)]
    stem, suffix = "diffusion_pytorch_model", f".{variant}" if variant else ""
    for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}.safetensors{suffix}.index.json"):
        if (file := find(index)) is not None:
            shards = json.loads(file.read_text("utf-8-sig")).get("weight_map", {}).values()
            return [path for shard in sorted(set(shards)) if (path := find(shard)) is not None]
    file = find(f"{stem}{suffix}.safetensors")
    return [] if file is None else [file]


def _stored_dtype(name, **options) -> torch.dtype | None:
    """The floating dtype of most bytes of a model's files; None if they have no floating tensors.

    Integers (quantized weights) do not count. Float8 weights give bfloat16, because float8 is not used to compute.

    Args:
        name: a folder or a repository of the Hub.
        options: `subfolder`, `variant` and those of the Hub, as for `from_pretrained`.
    """
    floating = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floating |= dict.fromkeys(("F8_E4M3", "F8_E5M2"), torch.float8_e4m3fn)
    known = ("subfolder", "variant", "cache_dir", "force_download", "token", "revision", "local_files_only")
    sizes: Counter[torch.dtype] = Counter()
    for file in _stored_files(name, **{key: options[key] for key in known if options.get(key) is not None}):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                part = tensors.get_slice(key)
                if (dtype := floating.get(part.get_dtype())) is not None:
                    sizes[dtype] += math.prod(part.get_shape()) * dtype.itemsize
    most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return torch.bfloat16 if most == torch.float8_e4m3fn else most
