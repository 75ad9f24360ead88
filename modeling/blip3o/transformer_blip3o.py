"""BLIP3-o's diffusion head: predicts the velocity of EVA-CLIP image features from the language model's query states.

The layers are those of diffusers' Lumina-Next model. The model around them differs in four ways: the width of the
feed-forward layers is a configuration value (the rule behind it differs between versions of diffusers), there are no
masks (every image has the same number of tokens), it takes LoRA adapters and gradient checkpointing, and it holds the
learned queries, which train together with the head.
"""

import inspect
import json
import math
import numbers
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, LuminaFeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import (
    LuminaCombinedTimestepCaptionEmbedding,
    LuminaPatchEmbed,
    PixArtAlphaTextProjection,
    apply_rotary_emb,
    get_2d_rotary_pos_embed_lumina,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn

TIME_WIDTH = 1024  # largest width of the time embedding, as in diffusers


class UnmaskedLuminaAttnProcessor:
    """Lumina-Next's attention without masks: normalized queries and keys, 2-D rotary angles, shared key-value heads.

    Returns (B, L, heads, head_dim): the block adds self- and cross-attention before their common output projection.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        attention_mask=None,
        query_rotary_emb=None,
        key_rotary_emb=None,
    ):
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        value, dtype = attn.to_v(encoder_hidden_states), query.dtype
        head_dim = query.shape[-1] // attn.heads
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (query, key, value))  # (B, L, heads, head_dim)
        rotate: Any = apply_rotary_emb  # declared to return a tuple, which it does not for complex rotations
        if query_rotary_emb is not None:
            query = rotate(query, query_rotary_emb, use_real=False)
        if key_rotary_emb is not None:
            key = rotate(key, key_rotary_emb, use_real=False)
        if repeats := attn.heads // key.shape[2] - 1:
            key, value = (x.repeat_interleave(repeats + 1, dim=2) for x in (key, value))
        query, key = query.to(dtype), key.to(dtype)
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        ).to(dtype)


class Blip3oBlock(LuminaNextDiTBlock):
    """A Lumina-Next layer with feed-forward layers of a given width."""

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, ffn_dim: int, norm_eps: float, qk_norm: bool):
        no_multiplier: Any = None  # diffusers declares a number
        super().__init__(
            dim=hidden_size,
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            multiple_of=1,
            ffn_dim_multiplier=no_multiplier,
            norm_eps=norm_eps,
            qk_norm=qk_norm,
            cross_attention_dim=hidden_size,
        )
        self.feed_forward = LuminaFeedForward(dim=hidden_size, inner_dim=ffn_dim, multiple_of=1)
        for attention in (self.attn1, self.attn2):
            processor: Any = UnmaskedLuminaAttnProcessor()  # diffusers lists the known processors in a type
            attention.set_processor(processor)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - without masks
        self, hidden_states, encoder_hidden_states, image_rotary_emb, temb
    ):
        """(B, L, hidden), (B, K, hidden), (1, L, head_dim / 2) complex, (B, time width) -> (B, L, hidden)."""
        no_mask: Any = None
        return super().forward(
            hidden_states, no_mask, image_rotary_emb, encoder_hidden_states, no_mask, temb, cross_attention_kwargs={}
        )


class LearnedQueries(nn.Module):
    """Input embeddings of the query tokens; a module, so that offloading finds them where they are used."""

    def __init__(self, num_queries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, num_queries, width))

    def forward(self) -> torch.Tensor:
        """(1, num_queries, width)."""
        return self.weight


class Blip3oTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """The diffusion head with the learned queries of the language model. The defaults are the 8B release's sizes.

    Args:
        in_channels: width of the image features.
        sample_size: rows and columns of the image features.
        patch_size: features per token, per side.
        ffn_dim: inner width of the feed-forward layers.
        condition_dim: the language model's hidden size.
        num_queries: learned queries; each becomes one condition token.
    """

    config: Any  # pyright: ignore[reportIncompatibleVariableOverride] - a FrozenDict with the arguments as attributes

    _supports_gradient_checkpointing = True
    _auto_class = "AutoModel"  # diffusers.AutoModel loads the published folder of this component
    _gradient_checkpointing_func: Any
    _no_split_modules = ["Blip3oBlock"]
    _repeated_blocks = ["Blip3oBlock"]
    # Inputs, outputs and the time embedding: quantizing them changes results.
    _keep_in_full_precision = ["patch_embedder", "caption_projection", "time_caption_embed", "norm_out"]
    _skip_layerwise_casting_patterns = ["norm", "queries", *_keep_in_full_precision]
    _trainable_parts = {"queries": r"queries\.", "head": ""}
    _encoding_parameters = ("queries.weight",)  # encoding a prompt needs these of the model's parameters
    _lora_targets = {
        "attention": r"layers\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
        "all": r"layers\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|feed_forward\.linear_[123])",
    }

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1792,
        sample_size: int = 8,
        patch_size: int = 1,
        hidden_size: int = 1792,
        num_layers: int = 24,
        num_attention_heads: int = 28,
        num_kv_heads: int = 28,
        ffn_dim: int = 4864,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        condition_dim: int = 3584,
        num_queries: int = 64,
    ):
        super().__init__()
        _check_options(self)
        if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 4:
            raise ValueError(f"hidden_size={hidden_size}: the width of a head must be a multiple of 4.")
        if num_attention_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads={num_attention_heads} is not a multiple of num_kv_heads={num_kv_heads}."
            )
        time_width = min(hidden_size, TIME_WIDTH)
        self.queries = LearnedQueries(num_queries, condition_dim)
        self.caption_projection = PixArtAlphaTextProjection(condition_dim, hidden_size)
        self.patch_embedder = LuminaPatchEmbed(patch_size, in_channels, hidden_size, bias=True)
        self.time_caption_embed = LuminaCombinedTimestepCaptionEmbedding(time_width, cross_attention_dim=hidden_size)
        sizes = (hidden_size, num_attention_heads, num_kv_heads, ffn_dim, norm_eps, qk_norm)
        self.layers = nn.ModuleList(Blip3oBlock(*sizes) for _ in range(num_layers))
        self.norm_out = LuminaLayerNormContinuous(
            embedding_dim=hidden_size,
            conditioning_embedding_dim=time_width,
            elementwise_affine=False,
            eps=1e-6,
            bias=True,
            out_dim=patch_size**2 * in_channels,
        )
        self.gradient_checkpointing = False

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

    def load_lora_adapter(self, *args, **kwargs):
        """As in diffusers; injected layers take the mode (training or evaluation) of the model."""
        super().load_lora_adapter(*args, **kwargs)
        self.train(self.training)

    def add_adapter(self, adapter_config, adapter_name: str = "default") -> None:
        """As in diffusers; injected layers take the mode (training or evaluation) of the model."""
        _check_initialization(adapter_config)
        super().add_adapter(adapter_config, adapter_name)
        self.train(self.training)

    def rotary_angles(self, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns, head_dim / 2) complex rotations of the tokens: channel pairs turn by row and column in turn."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return get_2d_rotary_pos_embed_lumina(head_dim, rows, columns)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity (noise minus features) of noised image features.

        Args:
            hidden_states: (B, C, H, W) noised image features.
            timestep: (B,) in 0..1000; 1000 is pure noise.
            encoder_hidden_states: (B, K, condition_dim) states of the queries, all zero for the null condition; or a
                function from the learned queries (1, K, condition_dim) to them, which training uses: it runs inside
                this forward pass, where sharded parameters are gathered.

        Returns:
            (B, C, H, W).
        """
        if callable(encoder_hidden_states):
            encoder_hidden_states = encoder_hidden_states(self.queries())
        patch = self.config.patch_size
        rows, columns = hidden_states.shape[2] // patch, hidden_states.shape[3] // patch
        angles = self.rotary_angles(rows, columns).to(hidden_states.device)
        x, _, _, angles = self.patch_embedder(hidden_states, angles)
        condition = self.caption_projection(encoder_hidden_states)
        every_token = torch.ones(condition.shape[:2], device=condition.device)
        temb = self.time_caption_embed(timestep, condition, every_token)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, condition, angles, temb)
            else:
                x = layer(x, condition, angles, temb)
        x = self.norm_out(x, temb)  # (B, rows * columns, patch * patch * C)
        x = x.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, -1))
        sample = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    # --- costs: arithmetic and memory of a training step ------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return (self.config.sample_size // self.config.patch_size) ** 2

    def flops(self, images: int) -> float:
        """Floating point operations of the matrix products in the forward and backward pass of `images` images."""
        c, tokens, queries = self.config, self.num_tokens, self.config.num_queries
        kv = c.hidden_size // c.num_attention_heads * c.num_kv_heads
        image_weights = 3 * c.hidden_size**2 + 2 * c.hidden_size * kv + 3 * c.hidden_size * c.ffn_dim
        weights = c.num_layers * (image_weights * tokens + 2 * c.hidden_size * kv * queries)
        weights += c.condition_dim * c.hidden_size * queries + c.hidden_size**2 * queries
        weights += 2 * c.in_channels * c.patch_size**2 * c.hidden_size * tokens
        attention = c.num_layers * 2 * c.hidden_size * tokens * (tokens + queries)
        trained = any(p.requires_grad for p in self.parameters())
        return (2.0 * weights + 2.0 * attention) * images * (3 if trained else 1)

    def layer_activation_bytes(self, compute: int, residual: int) -> float:
        """Bytes that one layer keeps for one image. Arguments: bytes per value of matrix products and between layers."""
        c, tokens, queries = self.config, self.num_tokens, self.config.num_queries
        kv = c.hidden_size // c.num_attention_heads * c.num_kv_heads
        image = tokens * (5 * c.hidden_size * residual + (8 * c.hidden_size + 4 * kv + 5 * c.ffn_dim) * compute)
        return image + queries * (c.hidden_size * residual + (c.hidden_size + 4 * kv) * compute)

    def activation_bytes(self, images: int, compute: int, residual: int, checkpointing: bool = False) -> float:
        """Bytes kept between forward and backward pass; with checkpointing, all layers but their inputs are dropped."""
        c, tokens = self.config, self.num_tokens
        layer = tokens * c.hidden_size * residual if checkpointing else self.layer_activation_bytes(compute, residual)
        ends = tokens * (2 * c.in_channels * c.patch_size**2 + 2 * c.hidden_size) * compute
        ends += c.num_queries * (c.condition_dim + 3 * c.hidden_size) * compute
        return images * (c.num_layers * layer + ends)


def _check_options(model: ConfigMixin) -> None:
    """Raise ValueError for an option in config.json that is not of its default's type; numbers are positive."""
    config: Any = model.config
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        value, default = config.get(name), parameter.default
        if default is parameter.empty or isinstance(default, bool):
            continue
        kind = {int: numbers.Integral, float: numbers.Real}[type(default)]
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            wanted = {int: "a whole number above 0", float: "a number above 0"}[type(default)]
            raise ValueError(f"{name}={value!r} in the config.json of a {type(model).__name__} must be {wanted}.")


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


def _check_initialization(adapter_config) -> None:
    """Raise ValueError for an initialization that changes the base weights: unloading would leave them changed."""
    kind = getattr(adapter_config, "init_lora_weights", True)
    if isinstance(kind, str) and kind.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(f"init_lora_weights={kind!r} changes the base weights: use True, 'gaussian' or 'orthogonal'.")
