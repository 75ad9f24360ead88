"""OmniGen2's diffusion transformer (arXiv 2506.18871): text, reference images and the image to generate in one sequence.

The tokens of all rows of a batch are packed one after another, without padding. Everything that works token by token
runs once on dense (tokens, hidden) tensors; attention runs row by row. Before the joint layers, three refiners work on
each text, each reference and each target alone.

Time runs from t = 0 (noise) to t = 1 (data), and the model predicts the velocity data - noise.

Shapes: T tokens, H heads, K key/value heads, D head size, C latent channels, N targets, R rows.
"""

import copy
import inspect
import json
import math
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn

MAX_REFERENCES = 5  # rows of image_index_embedding
TIME_EMBEDDING = 1024  # largest width of the time embedding
QK_NORM_EPS = 1e-5  # of the norms of queries and keys, whatever norm_eps is


@dataclass
class OmniGen2TransformerOutput(BaseOutput):
    """Result of a forward pass.

    Args:
        sample: the velocity of every row: (R, C, h, w), or a list of (C, h, w) if sizes differ.
    """

    sample: torch.Tensor | list[torch.Tensor]


class Reference(NamedTuple):
    """A reference image.

    Args:
        latent: (C, h, w), scaled as the VAE's configuration says.
        index: position of the reference among those of its row, from 0.
        target: index of the target whose time modulates the reference.
    """

    latent: torch.Tensor
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.index
    target: int


class Row(NamedTuple):
    """What attends to each other: a text, references and a target, as indices into the lists of each kind.

    Rows may share texts, references and targets, for example the guidance branches of one image.
    """

    text: int
    references: tuple[int, ...]
    target: int


class TokenCounts(NamedTuple):
    """Tokens of each text, reference, target and row of a batch, for costs."""

    texts: list[int]
    references: list[int]
    targets: list[int]
    rows: list[int]


class Layout(NamedTuple):
    """Where the tokens of a batch are, and their rotary angles. It does not depend on weights or times."""

    text_lengths: list[int]
    reference_lengths: list[int]
    target_grids: list[tuple[int, int]]  # patches
    row_lengths: list[int]
    row_targets: list[int]
    text_angles: tuple[torch.Tensor, torch.Tensor]
    reference_angles: tuple[torch.Tensor, torch.Tensor]
    target_angles: tuple[torch.Tensor, torch.Tensor]
    joint_angles: tuple[torch.Tensor, torch.Tensor]
    joint_index: torch.Tensor  # (T,) into the texts, references and targets, joined in this order
    output_index: torch.Tensor  # (T',) target tokens of all rows in the joint sequence
    reference_time: torch.Tensor  # (T_ref,) target of each reference token
    target_time: torch.Tensor  # (T_target,)
    joint_time: torch.Tensor  # (T,)
    output_time: torch.Tensor  # (T',)

    @property
    def target_lengths(self) -> list[int]:
        return [height * width for height, width in self.target_grids]

    @property
    def counts(self) -> TokenCounts:
        return TokenCounts(self.text_lengths, self.reference_lengths, self.target_lengths, self.row_lengths)


class Condition(NamedTuple):
    """What stays the same while a batch is sampled; see [`OmniGen2Transformer2DModel.prepare`]."""

    text: torch.Tensor  # (T_text, hidden) refined texts
    references: torch.Tensor  # (T_ref, hidden) embedded references; their refiner depends on the time
    layout: Layout


def patchify(latent: torch.Tensor, patch: int) -> torch.Tensor:
    """(C, h*p, w*p) -> (h*w, p*p*C)."""
    channels, height, width = latent.shape
    blocks = latent.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch: int) -> torch.Tensor:
    """Inverse of [`patchify`]; `grid` is (h, w)."""
    blocks = tokens.reshape(*grid, patch, patch, -1)
    return blocks.permute(4, 0, 2, 1, 3).reshape(-1, grid[0] * patch, grid[1] * patch)


def rotary_angles(
    positions: torch.Tensor, axes: Sequence[int], theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each (T, 1, D/2) float32, of position ids (T, axes); computed in float64."""
    parts = []
    for axis, dim in enumerate(axes):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        parts.append(positions[:, axis, None].double() * frequencies)
    angles = torch.cat(parts, dim=-1)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of (T, heads, D): channels 2i and 2i+1 are one complex number. Computed in float32.

    Without gradients, `x` may be overwritten.
    """
    pairs, (cos, sin) = x.float().unflatten(-1, (-1, 2)), angles
    if torch.compiler.is_compiling():  # which generates no code for complex numbers
        real, imaginary = pairs.unbind(-1)
        rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:  # one multiplication; ten times as fast on a CPU
        points, turns = torch.view_as_complex(pairs.contiguous()), torch.complex(cos, sin)
        rotated = torch.view_as_real(points * turns if torch.is_grad_enabled() else points.mul_(turns))
    return rotated.flatten(-2).to(x.dtype)


def text_positions(length: int) -> torch.Tensor:
    """(length, 3): token i is at (i, i, i)."""
    return torch.arange(length)[:, None].expand(-1, 3)


def image_positions(start: int, grid: tuple[int, int]) -> torch.Tensor:
    """(h*w, 3): the patch at (row, column) is at (start, row, column)."""
    height, width = grid
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(row, start), row, column], dim=-1).reshape(-1, 3)


def row_positions(text: int, references: Sequence[tuple[int, int]], target: tuple[int, int]) -> torch.Tensor:
    """Position ids (T, 3) of a row: `text` tokens, then references and the target by their grids in patches."""
    parts, start = [text_positions(text)], text
    for grid in references:
        parts.append(image_positions(start, grid))
        start += max(grid)
    return torch.cat([*parts, image_positions(start, target)])


class ScaledRMSNorm(nn.RMSNorm):
    """RMS norm, times a scale."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) -> (..., D).

        Args:
            scale: (1, D) or one row per token.
        """
        weight = self.weight
        is_float32 = x.dtype == torch.float32 and weight.dtype == torch.float32
        if torch.is_grad_enabled() or x.device.type != "cpu" or not is_float32:
            normalized = super().forward(x)
            return normalized if scale is None else normalized * scale
        # torch's RMS norm takes five passes over memory on a CPU; this takes three, and the scale adds none.
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return torch.mul(x, mean.add_(self.eps).rsqrt_()).mul_(weight if scale is None else weight * scale)


class OmniGen2FeedForward(nn.Module):
    """SwiGLU: linear_2(silu(linear_1(x)) * linear_3(x))."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.linear_2 = nn.Linear(inner_size, hidden_size, bias=False)
        self.linear_3 = nn.Linear(hidden_size, inner_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.linear_1(x), self.linear_3(x)
        if torch.is_grad_enabled():
            return self.linear_2(nn.functional.silu(gate) * x)
        return self.linear_2(nn.functional.silu(gate, inplace=True).mul_(x))


class OmniGen2AttnProcessor:
    """Attention within each row; rows of equal length share one call."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, query, key, value, lengths: list[int]) -> torch.Tensor:
        """Queries (T, H, D), keys and values (T, K, D) of rows with these lengths -> (T, H, D)."""
        if query.shape[0] == 0:  # nothing to compute, but keys and values stay in the graph like any others
            return query + key.sum() + value.sum()
        if len(set(lengths)) == 1:
            rows = [x.unflatten(0, (len(lengths), lengths[0])) for x in (query, key, value)]
            return self._attend(*rows).flatten(0, 1)
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*(x[None] for x in part))[0] for part in parts])

    def _attend(self, query, key, value):
        return dispatch_attention_fn(
            query,
            key,
            value,
            enable_gqa=query.shape[-2] != key.shape[-2],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class OmniGen2Attention(nn.Module, AttentionModuleMixin):
    """Grouped-query attention with normalized, rotated queries and keys: [`project`], [`forward`], then `to_out`."""

    processor: Any
    to_out: Any  # nn.ModuleList with one linear layer, as in diffusers' attention

    _default_processor_cls = OmniGen2AttnProcessor
    _available_processors = [OmniGen2AttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.head_dim = head_dim = hidden_size // num_heads
        self.to_q = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.norm_q = ScaledRMSNorm(head_dim, eps=QK_NORM_EPS)
        self.norm_k = ScaledRMSNorm(head_dim, eps=QK_NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(num_heads * head_dim, hidden_size, bias=False)])
        processor: Any = OmniGen2AttnProcessor()  # diffusers lists the known processors in a type
        self.set_processor(processor)

    def project(self, x: torch.Tensor, angles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, hidden) -> queries (T, H, D), keys and values (T, K, D)."""
        query = rotate(self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim))), angles)
        key = rotate(self.norm_k(self.to_k(x).unflatten(-1, (-1, self.head_dim))), angles)
        return query, key, self.to_v(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, query, key, value, lengths: list[int]) -> torch.Tensor:
        return self.processor(self, query, key, value, lengths)


class Modulation(NamedTuple):
    """What the time embedding makes of a block: (T, hidden), or (1, hidden) if all tokens have one time."""

    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    forward_scale: torch.Tensor
    forward_gate: torch.Tensor


class OmniGen2ModulatedNorm(nn.Module):
    """RMS norm, and the scales and gates that a block takes from the time embedding."""

    def __init__(self, hidden_size: int, time_size: int, eps: float):
        super().__init__()
        self.linear = nn.Linear(time_size, 4 * hidden_size)
        self.norm = ScaledRMSNorm(hidden_size, eps=eps)


class OmniGen2TransformerBlock(nn.Module):
    """Attention and feed-forward with norms before and after each.

    With `time_size`, the time embedding scales the inputs and gates the outputs of both; without it, nothing does.
    Without gradients, the results of norms and of the inner projections are overwritten: hooks must copy what they keep.
    """

    norm1: Any  # ScaledRMSNorm or OmniGen2ModulatedNorm

    def __init__(
        self, hidden_size: int, inner_size: int, num_heads: int, num_kv_heads: int, eps: float, time_size: int | None
    ):
        super().__init__()
        self.attn = OmniGen2Attention(hidden_size, num_heads, num_kv_heads)
        self.feed_forward = OmniGen2FeedForward(hidden_size, inner_size)
        self.is_modulated = time_size is not None
        if time_size is None:
            self.norm1 = ScaledRMSNorm(hidden_size, eps=eps)
        else:
            self.norm1 = OmniGen2ModulatedNorm(hidden_size, time_size, eps)
        self.ffn_norm1 = ScaledRMSNorm(hidden_size, eps=eps)
        self.norm2 = ScaledRMSNorm(hidden_size, eps=eps)
        self.ffn_norm2 = ScaledRMSNorm(hidden_size, eps=eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        lengths: list[int],
        temb: torch.Tensor | None = None,
        token_time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, hidden) -> (T, hidden).

        Args:
            lengths: tokens of each row.
            temb: (N, time) embeddings of the times.
            token_time: (T,) index of each token's time; None: one time for all.
        """
        modulation = self._modulation(temb, token_time) if self.is_modulated else None
        query, key, value = self.before_attention(hidden_states, angles, modulation)
        attended = self.attn(query, key, value, lengths)
        return self.after_attention(hidden_states, attended, modulation)

    def before_attention(self, x, angles, modulation: Modulation | None):
        """Queries, keys and values of (T, hidden)."""
        if modulation is None:
            return self.attn.project(self.norm1(x), angles)
        return self.attn.project(self.norm1.norm(x, modulation.attention_scale), angles)

    def after_attention(self, x, attended, modulation: Modulation | None):
        """The rest of the block: (T, hidden), (T, H, D) -> (T, hidden)."""
        attended = self.norm2(self.attn.to_out[0](attended.flatten(1)))
        if modulation is None:
            x = x + attended
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        x = _gated_sum(x, modulation.attention_gate, attended)
        forwarded = self.feed_forward(self.ffn_norm1(x, modulation.forward_scale))
        return _gated_sum(x, modulation.forward_gate, self.ffn_norm2(forwarded))

    def _modulation(self, temb, token_time) -> Modulation:
        scale, gate, forward_scale, forward_gate = self.norm1.linear(nn.functional.silu(temb)).chunk(4, dim=-1)
        values = (1 + scale, gate.tanh(), 1 + forward_scale, forward_gate.tanh())
        return Modulation(*values) if token_time is None else Modulation(*(value[token_time] for value in values))

    def compile(self, *args, **kwargs) -> None:
        """Compile everything but attention, whose calls differ in number and size from batch to batch."""
        self.before_attention = torch.compile(type(self).before_attention.__get__(self), *args, **kwargs)
        self.after_attention = torch.compile(type(self).after_attention.__get__(self), *args, **kwargs)

    def __getstate__(self):
        """Copies are not compiled: the compiled halves are bound to this module."""
        halves = ("before_attention", "after_attention")
        return {name: value for name, value in super().__getstate__().items() if name not in halves}

    # --- costs ---

    def tuning(self) -> str:
        """How this block trains: "full" (its own weights), "lora" (adapters beside them) or "frozen"."""
        if self.feed_forward.linear_1.weight.requires_grad:
            return "full"
        return "lora" if any(p.requires_grad for p in self.parameters()) else "frozen"

    def matrix_weights(self) -> int:
        """Weights of the matrices that every token passes."""
        attention = [self.attn.to_q, self.attn.to_k, self.attn.to_v, self.attn.to_out[0]]
        matrices = [*attention, self.feed_forward.linear_1, self.feed_forward.linear_2, self.feed_forward.linear_3]
        return sum(m.in_features * m.out_features for m in matrices)

    def activation_bytes(self, compute: int, residual: int, rank: int = 0) -> float:
        """Bytes that the block keeps per token for the backward pass.

        Args:
            compute: bytes per value of the inputs of matrix products and attention.
            residual: bytes per value of the stream between blocks.
            rank: of the adapters, where there are some.
        """
        h, k, f = self.attn.to_q.in_features, self.attn.to_k.out_features, self.feed_forward.linear_1.out_features
        tuning = self.tuning()
        if tuning == "frozen":
            return 0.0
        kept = residual * 4 * h + 4 * 8  # inputs of the four norms, and their scales
        kept += 4 * 2 * (h + k)  # queries and keys before their norms, and in float32 for the rotation
        kept += (2 * h + 2 * k) * compute + 4 * h // self.attn.head_dim  # attention: inputs, result, log-sums
        kept += 3 * f * compute  # both inner projections and the activation
        if self.is_modulated:
            kept += residual * 8 * h  # scales, gates, and what they multiply
        if tuning == "full":
            kept += (2 * h + f) * compute + residual * 4 * h  # inputs of matrix products; normalized values
        if tuning == "lora":
            kept += h * compute + 4 * rank * compute
        return kept


def _gated_sum(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + gate * y; without gradients, `y` may be overwritten."""
    if torch.is_grad_enabled() or not x.dtype == gate.dtype == y.dtype:
        return torch.addcmul(x, gate, y)
    return torch.addcmul(x, gate, y, out=y)


class OmniGen2TimeCaptionEmbed(nn.Module):
    """Embeds times and text features."""

    def __init__(self, hidden_size: int, text_feat_dim: int, time_size: int, timestep_scale: float, eps: float):
        super().__init__()
        scale: Any = timestep_scale  # diffusers declares an integer
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=scale)
        self.timestep_embedder = TimestepEmbedding(256, time_size)
        self.caption_embedder = nn.Sequential(
            nn.RMSNorm(text_feat_dim, eps=eps), nn.Linear(text_feat_dim, hidden_size)
        )

    def embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """(N,) in [0, 1] -> (N, time).

        The original rounds t to the model's dtype before it multiplies by `timestep_scale`; so does this.
        """
        dtype = self.timestep_embedder.linear_1.weight.dtype
        return self.timestep_embedder(self.time_proj(timestep.to(dtype)).to(dtype))


class OmniGen2OutputNorm(nn.Module):
    """Layer norm scaled by the time embedding, and the projection to latent patches."""

    def __init__(self, hidden_size: int, time_size: int, out_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear_1 = nn.Linear(time_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, out_size)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, token_time: torch.Tensor | None = None) -> torch.Tensor:
        """(T, hidden) -> (T, p*p*C); arguments as in [`OmniGen2TransformerBlock.forward`]."""
        scale = 1 + self.linear_1(nn.functional.silu(temb))
        return self.linear_2(self.norm(x) * (scale if token_time is None else scale[token_time]))


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin, CacheMixin):
    """OmniGen2's transformer. The defaults are the release's configuration.

    Args:
        patch_size: side of a token in latent pixels.
        in_channels, out_channels: latent channels; None: as many out as in.
        hidden_size, num_layers, num_refiner_layers, num_attention_heads, num_kv_heads: sizes.
        multiple_of, ffn_dim_multiplier: the feed-forward's inner size is 4 * hidden_size, times the multiplier if
            there is one, rounded up to a multiple.
        norm_eps: of all norms but those of queries and keys.
        axes_dim_rope: channels of a head that each position axis rotates.
        axes_lens: sizes of the original's position tables. Positions are computed here, so that nothing bounds them.
        text_feat_dim: width of the text features.
        timestep_scale: factor of the times before their embedding.
    """

    config: Any  # pyright: ignore[reportIncompatibleVariableOverride] - a FrozenDict with the arguments as attributes
    context_refiner: Any  # these four: nn.ModuleList of OmniGen2TransformerBlock
    noise_refiner: Any
    ref_image_refiner: Any
    layers: Any

    _supports_gradient_checkpointing = True
    _auto_class = "AutoModel"  # diffusers.AutoModel loads the published folder of this component
    _gradient_checkpointing_func: Any
    _no_split_modules = ["OmniGen2TransformerBlock"]
    _repeated_blocks = ["OmniGen2TransformerBlock"]
    # Quantizing the input and output projections or the embeddings changes results.
    _keep_in_full_precision = [
        "x_embedder",
        "ref_image_patch_embedder",
        "time_caption_embed",
        "norm_out",
        "image_index_embedding",
    ]
    _skip_layerwise_casting_patterns = ["norm", *_keep_in_full_precision]
    # Regular expressions for LoraConfig(target_modules=...). "attention" is what the original adapts.
    _lora_targets = {
        "attention": r".*\.attn\.(to_q|to_k|to_v|to_out\.0)",
        "all": r".*\.(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_[123])",
    }
    # Part -> regular expression that its parameters' names begin with; the first match counts.
    _trainable_parts = {
        "refiners": r"(context_refiner|noise_refiner|ref_image_refiner)\.",
        "layers": r"layers\.",
        "embeddings": "",
    }

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, ...] = (40, 40, 40),
        axes_lens: tuple[int, ...] = (1024, 1664, 1664),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ):
        super().__init__()
        _check_options(self)
        head_dim = hidden_size // num_attention_heads
        if head_dim * num_attention_heads != hidden_size or sum(axes_dim_rope) != head_dim:
            raise ValueError(
                f"axes_dim_rope={list(axes_dim_rope)} must sum up to hidden_size / num_attention_heads = "
                f"{hidden_size} / {num_attention_heads}."
            )
        if num_attention_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads={num_attention_heads} must be a multiple of {num_kv_heads=}.")
        inner = int(4 * hidden_size * (1 if ffn_dim_multiplier is None else ffn_dim_multiplier))
        inner = multiple_of * math.ceil(inner / multiple_of)
        time_size = min(hidden_size, TIME_EMBEDDING)
        token_channels = patch_size**2 * in_channels
        sizes = (hidden_size, inner, num_attention_heads, num_kv_heads, norm_eps)

        def blocks(count: int, time: int | None) -> nn.ModuleList:
            return nn.ModuleList(OmniGen2TransformerBlock(*sizes, time) for _ in range(count))

        self.x_embedder = nn.Linear(token_channels, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(token_channels, hidden_size)
        self.image_index_embedding = nn.Parameter(torch.randn(MAX_REFERENCES, hidden_size))
        self.time_caption_embed = OmniGen2TimeCaptionEmbed(
            hidden_size, text_feat_dim, time_size, timestep_scale, norm_eps
        )
        self.context_refiner = blocks(num_refiner_layers, None)
        self.noise_refiner = blocks(num_refiner_layers, time_size)
        self.ref_image_refiner = blocks(num_refiner_layers, time_size)
        self.layers = blocks(num_layers, time_size)
        self.norm_out = OmniGen2OutputNorm(
            hidden_size, time_size, patch_size**2 * (in_channels if out_channels is None else out_channels)
        )
        self.gradient_checkpointing = False

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, without a warning about `auto_map`, by which `AutoModel` finds this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, except that a folder loads in the dtype it is stored in unless `dtype` says otherwise."""
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
        _check_initialization(adapter_config)
        _save_requires_grad(self)
        super().add_adapter(adapter_config, adapter_name)
        self.train(self.training)

    def unload_lora(self) -> None:
        """As in diffusers, but parameters require gradients again as before the first adapter."""
        super().unload_lora()
        _restore_requires_grad(self)

    def enable_cache(self, config) -> None:
        """As in diffusers, for its `FirstBlockCacheConfig`. Raises ValueError for another configuration."""
        if not isinstance(config, FirstBlockCacheConfig):
            raise ValueError(f"{type(config).__name__} is not supported: use FirstBlockCacheConfig.")
        _describe_block()
        super().enable_cache(config)

    # --- what does not depend on the time ---

    def layout(
        self,
        text_lengths: Sequence[int],
        references: Sequence[tuple[tuple[int, int], int]],
        target_sizes: Sequence[tuple[int, int]],
        rows: Sequence[Row],
    ) -> Layout:
        """Where every token is.

        Args:
            references: latent size (h, w) and target index of each reference.
            target_sizes: latent sizes (h, w).

        Raises:
            ValueError: a size that is not a multiple of the patch size.
        """
        device, axes = self.x_embedder.weight.device, self.config.axes_dim_rope
        reference_grids = [self._grid(size) for size, _ in references]
        target_grids = [self._grid(size) for size in target_sizes]
        lengths = [*text_lengths, *(h * w for h, w in reference_grids), *(h * w for h, w in target_grids)]
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        num_texts, num_references = len(text_lengths), len(reference_grids)
        joint, positions, outputs, row_lengths, total = [], [], [], [], 0
        for row in rows:
            target = num_texts + num_references + row.target
            parts = [row.text, *(num_texts + r for r in row.references), target]
            joint += [torch.arange(ends[part], ends[part + 1]) for part in parts]
            grids = [reference_grids[r] for r in row.references]
            positions.append(row_positions(text_lengths[row.text], grids, target_grids[row.target]))
            row_lengths.append(sum(lengths[part] for part in parts))
            total += row_lengths[-1]
            outputs.append(torch.arange(total - lengths[target], total))

        def angles(parts: list[torch.Tensor]):
            return rotary_angles(torch.cat([torch.zeros(0, 3), *parts]).to(device), axes)

        def times(parts: list[tuple[int, int]]) -> torch.Tensor:
            """(tokens,) from (number of tokens, target index) pairs."""
            values, counts = zip(*parts) if parts else ((), ())
            return torch.repeat_interleave(
                torch.tensor(counts, dtype=torch.long), torch.tensor(values, dtype=torch.long)
            ).to(device)

        target_lengths = lengths[num_texts + num_references :]
        return Layout(
            text_lengths=list(text_lengths),
            reference_lengths=lengths[num_texts : num_texts + num_references],
            target_grids=target_grids,
            row_lengths=row_lengths,
            row_targets=[row.target for row in rows],
            text_angles=angles([text_positions(length) for length in text_lengths]),
            # Attention depends on differences of positions. Within one image the first axis is constant, so that the
            # refiners' results are the same for every row that the image is in.
            reference_angles=angles([image_positions(0, grid) for grid in reference_grids]),
            target_angles=angles([image_positions(0, grid) for grid in target_grids]),
            joint_angles=angles(positions),
            joint_index=torch.cat(joint).to(device),
            output_index=torch.cat(outputs).to(device),
            reference_time=times([(h * w, target) for (h, w), (_, target) in zip(reference_grids, references)]),
            target_time=times([(length, index) for index, length in enumerate(target_lengths)]),
            joint_time=times([(length, row.target) for length, row in zip(row_lengths, rows)]),
            output_time=times([(target_lengths[row.target], row.target) for row in rows]),
        )

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        patch = self.config.patch_size
        if size[0] % patch or size[1] % patch or min(size) < patch:
            raise ValueError(f"Latents of {size[0]} x {size[1]} pixels: both sides must be multiples of {patch}.")
        return size[0] // patch, size[1] // patch

    def prepare(
        self,
        texts: Sequence[torch.Tensor],
        references: Sequence[tuple],
        target_sizes: Sequence[tuple[int, int]],
        rows: Sequence[tuple] | None = None,
    ) -> Condition:
        """Compute what all updates of a batch share: refined texts, embedded references, positions.

        Args:
            texts: text features, each (tokens, text_feat_dim).
            references: [`Reference`]s of all rows, or tuples of their fields.
            target_sizes: latent size (h, w) of each target.
            rows: [`Row`]s, or tuples of their fields. None: one row per target, with the text and the references of
                the same index.

        Raises:
            ValueError: more references in a row than the model has embeddings for.
        """
        references = [Reference(*reference) for reference in references]
        if rows is None:
            owned = [tuple(i for i, r in enumerate(references) if r.target == t) for t in range(len(target_sizes))]
            all_rows = [Row(index, own, index) for index, own in enumerate(owned)]
        else:
            all_rows = [Row(*row) for row in rows]
        most = max((reference.index + 1 for reference in references), default=0)
        if most > MAX_REFERENCES:
            raise ValueError(f"A row has {most} references; the model takes at most {MAX_REFERENCES}.")
        sizes = [(_size(reference.latent), reference.target) for reference in references]
        layout = self.layout([len(text) for text in texts], sizes, target_sizes, all_rows)
        embedded = self._embed_references(references, layout)
        text = self.time_caption_embed.caption_embedder(torch.cat(list(texts)).to(self.x_embedder.weight.dtype))
        for block in self.context_refiner:
            text = self._run(block, text, layout.text_angles, layout.text_lengths)
        return Condition(text, embedded, layout)

    def with_rows(self, condition: Condition, references: Sequence[tuple], rows: Sequence[tuple]) -> Condition:
        """The same texts and references in other rows, for example without guidance branches. Nothing is recomputed."""
        layout, patch = condition.layout, self.config.patch_size
        sizes = [(height * patch, width * patch) for height, width in layout.target_grids]
        reference_sizes = [(_size(latent), target) for latent, _, target in references]
        rows = [Row(*row) for row in rows]
        return condition._replace(layout=self.layout(layout.text_lengths, reference_sizes, sizes, rows))

    def _embed_references(self, references: Sequence[Reference], layout: Layout) -> torch.Tensor:
        """(T_ref, hidden)."""
        weight, patch = self.ref_image_patch_embedder.weight, self.config.patch_size
        empty = weight.new_zeros(0, weight.shape[1])
        tokens = torch.cat([empty, *(patchify(r.latent, patch).to(weight) for r in references)])
        counts = torch.tensor(layout.reference_lengths, dtype=torch.long)
        index = torch.repeat_interleave(torch.tensor([r.index for r in references], dtype=torch.long), counts)
        return self.ref_image_patch_embedder(tokens) + self.image_index_embedding[index.to(weight.device)]

    def _run(self, block, hidden_states, angles, lengths, temb=None, token_time=None) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states, angles, lengths, temb, token_time)
        return block(hidden_states, angles, lengths, temb, token_time)

    # --- the forward pass ---

    def forward(
        self,
        hidden_states: torch.Tensor | Sequence[torch.Tensor] | None,
        timestep: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        ref_image_hidden_states: Sequence[Sequence[torch.Tensor] | None] | None = None,
        condition: Condition | None = None,
        prepare: dict | None = None,
        return_dict: bool = True,
    ) -> OmniGen2TransformerOutput | tuple | Condition:
        """Predict velocities.

        Args:
            hidden_states: noisy targets: (N, C, h, w), or a list of (C, h, w).
            timestep: (N,) or (1,) in [0, 1]: 0 is noise, 1 is data.
            encoder_hidden_states: text features: (N, L, text_feat_dim) with a mask, or a list of (L, text_feat_dim).
            encoder_attention_mask: (N, L), 1 for the tokens of a text, which come first. None: all of them.
            ref_image_hidden_states: per row its reference latents, each (C, h, w), or None.
            condition: what [`prepare`] made, instead of the three arguments before.
            prepare: arguments of [`prepare`], whose result is returned; the others are None then. Through `forward`,
                because offloading moves weights to the device when `forward` is called.
        """
        if prepare is not None:
            return self.prepare(**prepare)
        if hidden_states is None or timestep is None:
            raise ValueError("The transformer needs hidden_states and timestep.")
        targets = list(hidden_states)
        if condition is None:
            texts = _unpadded(encoder_hidden_states, encoder_attention_mask)
            references = [
                Reference(latent, index, row)
                for row, latents in enumerate(ref_image_hidden_states or ())
                for index, latent in enumerate(latents or ())
            ]
            condition = self.prepare(texts, references, [_size(latent) for latent in targets])
        layout, patch = condition.layout, self.config.patch_size
        temb = self.time_caption_embed.embed_time(timestep.reshape(-1))
        is_shared = len(temb) == 1

        def time(index: torch.Tensor) -> torch.Tensor | None:
            return None if is_shared else index

        target = self.x_embedder(torch.cat([patchify(x, patch) for x in targets]).to(self.x_embedder.weight.dtype))
        for block in self.noise_refiner:
            target = self._run(
                block, target, layout.target_angles, layout.target_lengths, temb, time(layout.target_time)
            )
        references = condition.references
        if len(references) or torch.is_grad_enabled():
            for block in self.ref_image_refiner:
                references = self._run(
                    block,
                    references,
                    layout.reference_angles,
                    layout.reference_lengths,
                    temb,
                    time(layout.reference_time),
                )
        joint = torch.cat([condition.text, references, target])[layout.joint_index]
        for block in self.layers:
            joint = self._run(block, joint, layout.joint_angles, layout.row_lengths, temb, time(layout.joint_time))
        output = self.norm_out(joint[layout.output_index], temb, time(layout.output_time))
        lengths, grids = layout.target_lengths, layout.target_grids
        parts = output.split([lengths[target] for target in layout.row_targets])
        sample = [unpatchify(part, grids[target], patch) for part, target in zip(parts, layout.row_targets)]
        if len({x.shape for x in sample}) == 1:
            sample = torch.stack(sample)
        return OmniGen2TransformerOutput(sample=sample) if return_dict else (sample,)

    # --- costs: arithmetic and memory ---

    def _stacks(self, counts: TokenCounts) -> tuple[tuple[Any, list[int]], ...]:
        """Every stack of blocks with the lengths of the rows that it attends over."""
        return (
            (self.context_refiner, counts.texts),
            (self.noise_refiner, counts.targets),
            (self.ref_image_refiner, counts.references),
            (self.layers, counts.rows),
        )

    def forward_flops(self, counts: TokenCounts, is_prepared: bool = False) -> float:
        """Floating point operations of the matrix products of one forward pass.

        `is_prepared`: without the part that [`prepare`] computes once.
        """
        total = 0.0
        for blocks, lengths in self._stacks(counts):
            if not (is_prepared and blocks is self.context_refiner):
                for block in blocks:
                    total += 2.0 * block.matrix_weights() * sum(lengths) + self._attention_flops(lengths)
        tokens = 2 * sum(counts.targets) + (0 if is_prepared else sum(counts.references))
        return total + 2.0 * self.x_embedder.weight.numel() * tokens

    def _attention_flops(self, lengths: Sequence[int]) -> float:
        return 4.0 * self.config.hidden_size * sum(n * n for n in lengths)

    def flops(self, counts: TokenCounts) -> float:
        """Floating point operations of the matrix products in one forward and backward pass, without recomputation.

        Counts what gradients need: no weight gradients of frozen weights; those of adapters are too small to count.
        """
        total = 0.0
        for blocks, lengths in self._stacks(counts):
            for block in blocks:
                passes = 3 if block.tuning() == "full" else 2
                total += 2.0 * block.matrix_weights() * sum(lengths) * passes + 3 * self._attention_flops(lengths)
        return total

    def layer_activation_bytes(self, tokens: int, *, compute: int = 4, residual: int = 4, rank: int = 0) -> float:
        """Bytes that one joint layer keeps for the backward pass of `tokens` tokens; 0 when nothing trains."""
        return tokens * self.layers[0].activation_bytes(compute, residual, rank)

    def activation_bytes(
        self,
        text: int,
        references: int,
        targets: int,
        *,
        compute: int = 4,
        residual: int = 4,
        rank: int = 0,
        checkpointing: bool = False,
    ) -> float:
        """Bytes kept between forward and backward pass for so many tokens of each kind.

        With `checkpointing`, only the blocks' inputs are counted: the layer that is computed again adds
        [`layer_activation_bytes`].
        """
        per_token = self.layers[0].activation_bytes(compute, residual, rank)
        if per_token == 0:
            return 0.0
        hidden, tokens = self.config.hidden_size, text + references + targets
        if checkpointing:
            per_token = residual * hidden
        kept = (self.config.num_layers + self.config.num_refiner_layers) * tokens * per_token
        kept += 2 * tokens * 2 * 4 * sum(self.config.axes_dim_rope) // 2  # rotary angles, refiners and layers
        return kept + tokens * hidden * residual + targets * hidden * (4 + residual)  # joining; the output's norm

    def update_bytes(self, tokens: int, itemsize: int) -> float:
        """Peak activations of one update over `tokens` tokens of all rows: inside the feed-forward of a layer."""
        hidden, inner = self.config.hidden_size, self.layers[0].feed_forward.linear_1.out_features
        keys = self.layers[0].attn.to_k.out_features
        return tokens * (5 * hidden + 2 * keys + 3 * inner) * itemsize

    def backward_workspace_bytes(self, tokens: int, compute: int) -> float:
        """Gradients alive at once inside the widest operation: those of a feed-forward's three inner tensors."""
        return 3.0 * tokens * self.layers[0].feed_forward.linear_1.out_features * compute


def _size(latent: torch.Tensor) -> tuple[int, int]:
    """(h, w) of a latent (C, h, w)."""
    return latent.shape[-2], latent.shape[-1]


def _unpadded(features, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The features of every row without its padding."""
    if features is None:
        raise ValueError("The transformer needs encoder_hidden_states, or a condition.")
    if mask is None:
        return list(features)
    lengths = mask.sum(dim=1).tolist()
    if any(not bool(row[:length].all()) for row, length in zip(mask, lengths, strict=True)):
        raise ValueError("encoder_attention_mask has a 0 before a 1: texts are padded on the right.")
    return [row[:length] for row, length in zip(features, lengths, strict=True)]


def _describe_block() -> None:
    """Register the output of a block for diffusers' FirstBlockCache, which has no public function for it."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError as error:
        raise ValueError(f"FirstBlockCache is not supported with this version of diffusers: {error}.") from error
    no_index: Any = None  # a block returns no second tensor
    TransformerBlockRegistry.register(OmniGen2TransformerBlock, TransformerBlockMetadata(0, no_index))


def _check_options(model: ConfigMixin) -> None:
    """Raise ValueError for an option in config.json that is not of its default's type; numbers are positive."""
    config: Any = model.config
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        value, default = config.get(name), parameter.default
        if default is parameter.empty or (default is None and value is None):
            continue
        if isinstance(default, tuple):
            fits = isinstance(value, (list, tuple)) and all(isinstance(v, int) and v > 0 for v in value)
            wanted = "a list of whole numbers above 0"
        else:
            kind: Any = (
                numbers.Real if isinstance(default, float) or name == "ffn_dim_multiplier" else numbers.Integral
            )
            fits = isinstance(value, kind) and not isinstance(value, bool) and value > 0
            wanted = "a number above 0" if kind is numbers.Real else "a whole number above 0"
        if not fits:
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
    """A quantization configuration that leaves the modules `names` alone, unless it says itself which to leave."""
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
