"""EVA-CLIP's vision tower, whose features BLIP3-o generates: a vision transformer with norms after each sublayer.

Only training targets and `reconstruct` need it; generation from text does not.
"""

import inspect
import json
import math
import numbers
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

NORM_EPS = 1e-6


class EvaClipAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EvaClipMlp(nn.Module):
    """Two-layer MLP with the exact GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EvaClipBlock(nn.Module):
    """Residual attention and MLP, each normalized before it is added."""

    def __init__(self, hidden_size: int, head_dim: int, intermediate_size: int):
        super().__init__()
        self.attn = EvaClipAttention(hidden_size, head_dim)
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp = EvaClipMlp(hidden_size, intermediate_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class EvaClipPatchEmbed(nn.Module):
    """Patches of an image to tokens."""

    def __init__(self, hidden_size: int, patch_size: int, num_channels: int):
        super().__init__()
        self.proj = nn.Conv2d(num_channels, hidden_size, patch_size, patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class EvaClipVisionModel(ModelMixin, ConfigMixin):
    """EVA-CLIP's vision tower without its final norm and head. The defaults are EVA-CLIP-E-plus at 448 pixels.

    Args:
        image_size: pixels per side; images are resized and cropped to it.
        head_dim: width of an attention head.
        pooling_stride: side of the squares of patches whose mean is one image feature.
    """

    config: Any  # pyright: ignore[reportIncompatibleVariableOverride] - a FrozenDict with the arguments as attributes

    _auto_class = "AutoModel"  # diffusers.AutoModel loads the published folder of this component
    _no_split_modules = ["EvaClipBlock"]
    _repeated_blocks = ["EvaClipBlock"]
    _keep_in_full_precision = ["patch_embed"]
    _skip_layerwise_casting_patterns = ["norm", "pos_embed", "cls_token", *_keep_in_full_precision]

    @register_to_config
    def __init__(
        self,
        image_size: int = 448,
        patch_size: int = 14,
        num_channels: int = 3,
        hidden_size: int = 1792,
        num_layers: int = 64,
        head_dim: int = 112,
        intermediate_size: int = 15360,
        pooling_stride: int = 4,
    ):
        super().__init__()
        _check_options(self)
        side = image_size // patch_size
        if hidden_size % head_dim or image_size % patch_size or side % pooling_stride:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of head_dim={head_dim}, and image_size={image_size} one "
                f"of patch_size x pooling_stride = {patch_size * pooling_stride}."
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2 + 1, hidden_size))
        self.patch_embed = EvaClipPatchEmbed(hidden_size, patch_size, num_channels)
        self.blocks = nn.ModuleList(EvaClipBlock(hidden_size, head_dim, intermediate_size) for _ in range(num_layers))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, without a warning about `auto_map`, by which `AutoModel` finds this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, except that a folder loads in the dtype it is stored in unless `dtype` is given."""
        dtype = _read_dtype(kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"])
        kwargs["dtype"] = dtype or _stored_dtype(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def features_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size // self.config.pooling_stride

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, image_size, image_size) normalized pixels -> (B, patches, hidden_size), row by row.

        Output of the last block, without the class token and without a final norm.
        """
        x = self.patch_embed(pixel_values.to(self.pos_embed.dtype))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, patches, hidden_size) -> image features (B, hidden_size, rows, columns): means over squares of patches."""
        side = self.config.image_size // self.config.patch_size
        grid = hidden_states.transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(grid, self.config.pooling_stride)

    def flops(self, images: int) -> float:
        """Floating point operations of the matrix products of a forward pass."""
        c, tokens = self.config, (self.config.image_size // self.config.patch_size) ** 2 + 1
        weights = c.num_layers * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size)
        return images * (2.0 * weights * tokens + 4.0 * c.num_layers * c.hidden_size * tokens**2)


def _check_options(model: ConfigMixin) -> None:
    """Raise ValueError for an option in config.json that is not a whole number above 0."""
    config: Any = model.config
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        value = config.get(name)
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if parameter.default is not parameter.empty and not (is_whole and int(value) > 0):
            raise ValueError(
                f"{name}={value!r} in the config.json of a {type(model).__name__} must be a whole number above 0."
            )


def _read_dtype(dtype: Any) -> Any:
    """A dtype from a dtype or its name; None and "auto" mean the stored dtype and give None."""
    if isinstance(dtype, str):
        return None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), dtype)
    return dtype


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
