"""BAGEL's mixture of transformers: two experts over one interleaved sequence (Echo-4o, arXiv 2508.09987, section 3).

Tokens are in two streams. The understanding expert `und` processes text, ViT tokens and the start and end tokens of
images; the generation expert `gen` processes VAE latent tokens. Projections, norms and MLPs run once per stream on
dense (tokens, hidden) tensors. The streams are joined only for attention, row by row: a row is a sample in training,
and one guidance branch of an image with its cached context in inference.

The Hub fetches a component's file alone, so that everything the model needs is in this file.

Shapes: U und tokens, G gen tokens, V ViT tokens, H heads, K key/value heads, D head size, C channels of a latent token.
"""

import copy
import functools
import inspect
import json
import math
import numbers
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass
class BagelTransformerOutput(BaseOutput):
    """Output of a forward pass over a packed sequence.

    Args:
        sample: (G, C) velocity (noise - data) of every latent token; meaningful for noised ones only.
        logits: (n, vocabulary) of the und tokens in `logit_index`, or None.
        und_states, gen_states: (U, hidden), (G, hidden) after the final norms.
    """

    sample: torch.Tensor
    logits: torch.Tensor | None = None
    und_states: torch.Tensor | None = None  # the defaults let accelerate rebuild an output on another device
    gen_states: torch.Tensor | None = None


# --- key and value cache ---------------------------------------------------------------------------------------------


class BagelKVCache:
    """Keys and values of a context, shared by all rows that continue it.

    Each layer has one buffer, laid out as `[scratch | context ...]`. Segments are appended at the end. A noised image
    writes its keys directly before the context, so that the image and *any prefix* of the context are one contiguous
    slice (attention without a mask does not depend on order). The guidance branches and images of a prompt use the
    buffer one after the other, without copies.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.capacity = self.scratch = 0
        self.length = 0  # tokens of context
        self.position = 0  # rotary position of the next segment
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers

    def first(self, length: int) -> "Context":
        """The first `length` tokens as the context of a row."""
        return Context(self, length)

    def whole(self) -> "Context":
        """All tokens as the context of a row."""
        return Context(self, self.length)

    def reserve(self, capacity: int, scratch: int = 0) -> None:
        """Make room for a context of `capacity` tokens and a noised image of `scratch` tokens.

        After the first write, this copies the context to larger buffers.
        """
        capacity, scratch = max(capacity, self.capacity), max(scratch, self.scratch)
        if (capacity, scratch) == (self.capacity, self.scratch):
            return
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    larger = buffer.new_empty(scratch + capacity, *buffer.shape[1:])
                    larger[scratch : scratch + self.length] = buffer[self.scratch : self.scratch + self.length]
                    buffers[layer] = larger
        self.capacity, self.scratch = capacity, scratch

    def keys(self, layer: int) -> torch.Tensor:
        """The layer's keys after rotation, in the order they were appended: (length, K, D)."""
        keys = self._keys[layer]
        assert keys is not None, "the cache is empty"
        return keys[self.scratch : self.scratch + self.length]

    def values(self, layer: int) -> torch.Tensor:
        """The layer's values: (length, K, D)."""
        values = self._values[layer]
        assert values is not None, "the cache is empty"
        return values[self.scratch : self.scratch + self.length]

    def copy_from(self, start: int) -> list[torch.Tensor]:
        """Copies of all tokens but the first `start`: keys and values of every layer in turn; empty if there are none."""
        layers = range(self.num_layers) if self.length > start else ()
        return [x[start:].clone() for layer in layers for x in (self.keys(layer), self.values(layer))]

    def extend(self, states: list[torch.Tensor], position: int) -> None:
        """Append tokens copied by [`copy_from`]. `position` is the rotary position of the next segment."""
        write = self.scratch + self.length
        for layer in range(self.num_layers):
            self.update(layer, states[2 * layer], states[2 * layer + 1], write, slice(0))
        self.length, self.position = self.length + len(states[0]), position

    def truncate(self, length: int, position: int) -> None:
        """Remove all tokens but the first `length`."""
        assert length <= self.length, (length, self.length)
        self.length, self.position = length, position

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, write: int, read: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (n, K, D) from buffer row `write` on; return the keys and values of the rows `read`."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (self.scratch + self.capacity, *key.shape[1:])
            keys, values = key.new_empty(shape), value.new_empty(shape)
            self._keys[layer], self._values[layer] = keys, values
        keys[write : write + key.shape[0]] = key
        values[write : write + value.shape[0]] = value
        return keys[read], values[read]


class Context(NamedTuple):
    """The tokens that a row attends to before its own: the first `length` tokens of `cache`."""

    cache: BagelKVCache
    length: int


# --- attention masks and plans ---------------------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """One attention call for the next `und` and `gen` tokens of the streams.

    In training, `prefix`, `follows` and `hidden` name the other tokens that the call attends to; in inference, `cache`.
    """

    und: int
    gen: int
    mask: torch.Tensor | None = None
    causal: bool = False
    prefix: int = 0  # length of the sample's frozen prefix; all tokens of the call attend to it
    follows: bool = False  # also attends to every earlier, non-hidden call of its sample
    hidden: bool = False  # later calls do not attend to this one
    cache: BagelKVCache | None = (
        None  # stores new keys from buffer row `write` on; the call attends to the rows `read`
    )
    write: int = 0
    read: slice = slice(0, 0)


def may_attend(sequence, q_segment, q_position, k_segment, k_position):
    """Whether queries may attend to keys, elementwise over broadcast (segment, position) pairs -> bool.

    A token attends to its own segment (in a text, up to its own position) and to every earlier segment of its sample
    that is not hidden. Only tokens of a hidden segment (a noised image) attend to it. All masks derive from this rule.
    """
    sample, causal, hidden = sequence.segment_sample, sequence.segment_causal, sequence.segment_hidden
    own = (q_segment == k_segment) & (~causal[q_segment] | (k_position <= q_position))
    earlier = (k_segment < q_segment) & (sample[k_segment] == sample[q_segment]) & ~hidden[k_segment]
    return own | earlier


def prefix_length(spans) -> int:
    """Number of a sample's segments before its first VAE segment. They use the und expert only."""
    return next((i for i, span in enumerate(spans) if span.gen.stop > span.gen.start), len(spans))


# Tokens. Longer samples use one attention call per segment, which is faster than one masked call.
LONG_SAMPLE = 512


def training_plan(sequence, part: str = "whole") -> list[AttentionCall]:
    """One masked call per sample, over its und tokens followed by its gen tokens; in long samples, one per segment.

    `part` is the "whole" sample, its "prefix" (the segments before the first VAE segment) or the "rest" after it.
    """
    plan = []
    for spans in sequence.spans:
        cut = prefix_length(spans)
        kept = {"whole": spans, "prefix": spans[:cut], "rest": spans[cut:]}[part]
        before = sum(span.und.stop - span.und.start for span in spans[:cut]) if part == "rest" else 0
        if not kept:
            plan.append(AttentionCall(0, 0, prefix=before))
            continue
        und, gen = slice(kept[0].und.start, kept[-1].und.stop), slice(kept[0].gen.start, kept[-1].gen.stop)
        segments = sequence.und_segment[[span.und.start for span in kept]]
        if und.stop - und.start + gen.stop - gen.start >= LONG_SAMPLE and len(segments.unique()) == len(kept):
            plan += _segment_calls(kept, before, sequence.input_ids.device)
            continue
        mask = None
        if len(kept) > 1 or kept[0].causal:
            segment = torch.cat([sequence.und_segment[und], sequence.gen_segment[gen]])
            position = torch.cat([sequence.und_position[und], sequence.gen_position[gen]])
            mask = may_attend(sequence, segment[:, None], position[:, None], segment[None], position[None])  # (S, S)
            mask = nn.functional.pad(mask, (before, 0), value=True)  # (S, before + S)
        plan.append(AttentionCall(und.stop - und.start, gen.stop - gen.start, mask, prefix=before))
    return plan


def _segment_calls(spans, before: int, device) -> list[AttentionCall]:
    """One call per segment of a sample without joined segments. Only those of texts are masked."""
    calls, seen = [], before
    for span in spans:
        und, gen = span.und.stop - span.und.start, span.gen.stop - span.gen.start
        n, mask = und + gen, None
        if span.causal:
            mask = torch.ones(n, seen + n, dtype=torch.bool, device=device).tril(seen)
        prefix = 0 if calls else before
        calls.append(AttentionCall(und, gen, mask, prefix=prefix, follows=bool(calls), hidden=span.hidden))
        seen += 0 if span.hidden else n
    return calls


class FlexPlan(NamedTuple):
    """One FlexAttention call for all samples of a training batch; it skips the blocks that are masked completely."""

    block_mask: BlockMask


def flex_plan(sequence, queries: list, keys: list) -> FlexPlan:
    """The plan for query and key tokens, given as lists of (segment, position) tensors in the order of joining."""
    q_segment, q_position = (torch.cat(parts) for parts in zip(*queries, strict=True))
    k_segment, k_position = (torch.cat(parts) for parts in zip(*keys, strict=True))

    def mask_mod(batch, head, q, k):
        return may_attend(sequence, q_segment[q], q_position[q], k_segment[k], k_position[k])

    sizes = (len(q_segment), len(k_segment))
    return FlexPlan(create_block_mask(mask_mod, None, None, *sizes, device=q_segment.device))


@functools.cache
def _flex_attention(device_type: str):
    """FlexAttention, compiled on CUDA. On CPU it is only used for comparisons and not compiled."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


class InferencePlan(NamedTuple):
    """Attention plan that all updates over the same rows share; made by [`BagelTransformer2DModel.plan`]."""

    calls: list[AttentionCall]
    angles: tuple  # rotary angles of the und and of the gen stream


def inference_plan(sequence, contexts: list[Context]) -> list[AttentionCall]:
    """One call per segment with the context of its row, causal in texts. Clean segments extend the context."""
    plan = []
    for spans, (cache, length) in zip(sequence.spans, contexts, strict=True):
        assert length <= cache.length, (length, cache.length)
        for span in spans:
            und, gen = span.und.stop - span.und.start, span.gen.stop - span.gen.start
            n = und + gen
            if span.hidden:
                assert n <= cache.scratch, (n, cache.scratch)
                write, read = cache.scratch - n, slice(cache.scratch - n, cache.scratch + length)
            else:
                assert length + n <= cache.capacity, (length, n, cache.capacity)
                write, read = cache.scratch + length, slice(cache.scratch, cache.scratch + length + n)
            mask, causal = None, False
            if span.causal and n > 1:
                if length > 0:
                    mask = torch.ones(n, length + n, dtype=torch.bool, device=sequence.input_ids.device).tril(length)
                else:
                    causal = True  # an expression would be a symbol, which attention refuses, under torch.compile
            plan.append(AttentionCall(und, gen, mask, causal, cache=cache, write=write, read=read))
            length += 0 if span.hidden else n
    return plan


def _advance_caches(sequence, contexts: list[Context]) -> None:
    """Add the appended clean segments to the lengths of their caches."""
    for spans, (cache, length) in zip(sequence.spans, contexts, strict=True):
        for span in spans:
            if not span.hidden:
                length += (span.und.stop - span.und.start) + (span.gen.stop - span.gen.start)
                cache.length = length


class FrozenPrefix(NamedTuple):
    """With a frozen und expert: the tokens before the samples' first VAE segments, which need no backward pass."""

    hidden: torch.Tensor  # (P, hidden)
    angles: tuple[torch.Tensor, torch.Tensor]
    plan: list[AttentionCall] | FlexPlan


def _split_prefix(sequence) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Indices of und tokens before the samples' first VAE segments (None if there are none), and of the others."""
    before_ids: list[int] = []
    rest_ids: list[int] = []
    for spans in sequence.spans:
        cut = prefix_length(spans)
        before_ids += [i for span in spans[:cut] for i in range(span.und.start, span.und.stop)]
        rest_ids += [i for span in spans[cut:] for i in range(span.und.start, span.und.stop)]
    device = sequence.input_ids.device
    before, rest = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (before_ids, rest_ids))
    return (before if len(before) else None), rest


# --- layers ----------------------------------------------------------------------------------------------------------


def rotary_angles(position: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """Cosines and signed sines for [`rotate`]: each (tokens, 1, D)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angles = position.float()[:, None, None] / theta**exponent  # (tokens, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary embeddings to (tokens, heads, D), in the half-split convention of Qwen2."""
    cos, signed_sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), signed_sin)


class BagelFeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class BagelExpert(nn.Module):
    """The token-wise part of a layer for one of the two streams: [`qkv`] before attention and [`finish`] after it."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, eps: float):
        super().__init__()
        self.head_dim = head_dim = hidden_size // num_heads
        self.norm1 = nn.RMSNorm(hidden_size, eps=eps)
        self.to_q = nn.Linear(hidden_size, num_heads * head_dim)
        self.to_k = nn.Linear(hidden_size, num_kv_heads * head_dim)
        self.to_v = nn.Linear(hidden_size, num_kv_heads * head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=eps)
        self.norm_k = nn.RMSNorm(head_dim, eps=eps)
        self.to_out = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.norm2 = nn.RMSNorm(hidden_size, eps=eps)
        self.ff = BagelFeedForward(hidden_size, intermediate_size)

    def qkv(self, x: torch.Tensor, angles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, hidden) -> queries (tokens, H, D), keys and values (tokens, K, D)."""
        x = self.norm1(x)
        query = rotate(self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim))), angles)
        key = rotate(self.norm_k(self.to_k(x).unflatten(-1, (-1, self.head_dim))), angles)
        return query, key, self.to_v(x).unflatten(-1, (-1, self.head_dim))

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer after attention: (tokens, hidden), (tokens, H, D) -> (tokens, hidden)."""
        x = x + self.to_out(attended.flatten(1))
        return x + self.ff(self.norm2(x))

    def compile(self, *args, **kwargs) -> None:
        """Compile both halves; `compile_repeated_blocks` calls this method for every expert.

        Attention between them is not compiled: the number and the sizes of its calls vary, whereas the compiled parts
        vary in the number of tokens only.
        """
        self.qkv = torch.compile(type(self).qkv.__get__(self), *args, **kwargs)
        self.finish = torch.compile(type(self).finish.__get__(self), *args, **kwargs)

    def tuning(self) -> str:
        """How this expert trains: "full" (its weights), "lora" (an adapter) or "frozen"."""
        if self.to_q.weight.requires_grad:
            return "full"
        return "lora" if any(p.requires_grad for p in self.parameters()) else "frozen"

    def activation_bytes(self, compute: int, rank: int = 0) -> float:
        """Bytes that one layer keeps per token of this expert for the backward pass, including attention.

        Args:
            compute: bytes per value in matrix products and attention; below 4 means autocast.
            rank: of the adapter, if there is one.
        """
        tuning, f = self.tuning(), self.ff.gate_proj.out_features
        h, k = self.to_q.in_features, self.to_k.out_features
        heads, kv = self.to_q.out_features // self.head_dim, k // self.head_dim
        cast = compute < 4  # autocast and PEFT cast the inputs of matrix products one by one
        # Norms compute in float32 and keep their inputs in it; a fused CUDA kernel may keep less.
        kept = 4.0 * (2 * h + 2)  # inputs of both norms and their scales
        kept += 4 * (h + k + heads + kv)  # queries and keys before their norms, the norms' scales
        kept += (h + 2 * k) * compute + 4 * heads + h * compute  # attention: queries, keys, values, log-sums, result
        kept += 3 * f * compute  # gate, its activation, up
        if tuning == "full":
            kept += 4 * (3 * h + k)  # normalised values, for the gradients of the norms' weights
            kept += (5 if cast else 2) * h * compute  # inputs of q, k, v and of gate, up
            kept += (h + f) * compute  # inputs of out and down
        if tuning == "lora":
            kept += ((5 if cast else 2) * h + h + f) * compute + 7 * rank * compute
        return kept

    def __getstate__(self):
        """The state without the compiled halves, which are bound to this module: copies are not compiled."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("qkv", "finish")}


def _join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Concatenate tokens. An empty `second` without gradient is skipped, which saves a copy."""
    if second.shape[0] == 0 and not second.requires_grad:
        return first
    return torch.cat([first, second])  # (S, heads, D)


class BagelAttnProcessor:
    """Attention over both streams: one call per entry of the plan, with und tokens before gen tokens.

    `set_attention_backend` sets the kernel of unmasked calls, that is of all denoising updates. Masked and causal calls
    (texts) always use PyTorch's own attention: in diffusers 0.42, flex ignores `is_causal`, flash kernels do not accept
    masks, and xformers adds a boolean mask as 0 and 1.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, und, gen, plan, prefix=None):
        if isinstance(plan, FlexPlan):
            return self._flex(und, gen, plan, prefix)
        # One split per stream, because its backward pass is one concatenation. The backward pass of a slice per call
        # would fill and add a gradient of the whole stream each time.
        und_parts = zip(*(x.split([call.und for call in plan]) for x in und), strict=True)
        gen_parts = zip(*(x.split([call.gen for call in plan]) for x in gen), strict=True)
        prefixes: Any = [None] * len(plan)
        if prefix:
            prefixes = zip(*(x.split([call.prefix for call in plan]) for x in prefix), strict=True)
        attended: list[Any] = []
        earlier: list[Any] = []  # (keys, values) that following calls of the sample attend to
        for call, und_part, gen_part, before in zip(plan, und_parts, gen_parts, prefixes, strict=True):
            query, *own = map(_join, und_part, gen_part)
            if not call.follows:
                earlier = [] if before is None else [before]
            key, value = (torch.cat(parts) if earlier else parts[0] for parts in zip(*earlier, own, strict=True))
            if not call.hidden:
                earlier.append(own)
            if call.cache is not None:
                key, value = call.cache.update(attn.layer_index, key, value, call.write, call.read)
            if query.shape[0] == 0:  # no queries: keys and values still need a (zero) gradient
                empty = query + key.sum() + value.sum()
                attended.append((empty, empty))
                continue
            is_unmasked = call.mask is None and not call.causal
            out = dispatch_attention_fn(
                query[None],
                key[None],
                value[None],
                attn_mask=None if call.mask is None else call.mask[None, None],
                is_causal=call.causal,
                enable_gqa=query.shape[1] != key.shape[1],
                backend=self._attention_backend if is_unmasked else AttentionBackendName.NATIVE,
                parallel_config=self._parallel_config,
            )[0]  # (S, H, D)
            attended.append(out.split([call.und, call.gen]))
        # Also for a single call: torch.compile would compile again for a view instead of a copy.
        return tuple(torch.cat(parts) for parts in zip(*attended, strict=True))

    @staticmethod
    def _flex(und, gen, plan, prefix):
        query, key, value = map(_join, und, gen)
        if prefix:
            key, value = _join(prefix[0], key), _join(prefix[1], value)
        attend: Any = _flex_attention(query.device.type)
        heads = [x.transpose(0, 1)[None] for x in (query, key, value)]  # (1, heads, S, D)
        out = attend(*heads, block_mask=plan.block_mask, enable_gqa=query.shape[1] != key.shape[1])
        return out[0].transpose(0, 1).split([und[0].shape[0], gen[0].shape[0]])


class BagelAttention(nn.Module, AttentionModuleMixin):
    """Attention over both streams. It has no weights: the experts project."""

    _default_processor_cls = BagelAttnProcessor
    _available_processors = [BagelAttnProcessor]
    _supports_qkv_fusion = False
    processor: Any

    def __init__(self, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        processor: Any = BagelAttnProcessor()  # diffusers lists the known processors in a type
        self.set_processor(processor)

    def forward(self, und, gen, plan, prefix=None):
        return self.processor(self, und, gen, plan, prefix)


class BagelBlock(nn.Module):
    """One layer: the experts `und` and `gen`, and the attention over the tokens of both."""

    def __init__(self, layer_index: int, *sizes):
        super().__init__()
        self.und = BagelExpert(*sizes)
        self.gen = BagelExpert(*sizes)
        self.attn = BagelAttention(layer_index)

    def forward(self, hidden_states, encoder_hidden_states, und_angles, gen_angles, plan, prefix=None):
        """`hidden_states` is the gen stream (G, hidden), `encoder_hidden_states` the und stream (U, hidden).

        Returns both after this layer, and the [`FrozenPrefix`] after this layer if there is one.
        """
        # A batch without latent tokens does not need the gen expert. In training it runs on zero tokens, so that every
        # parameter gets a gradient in every process.
        if hidden_states.shape[0] == 0 and not torch.is_grad_enabled():
            return hidden_states, self._und_only(encoder_hidden_states, und_angles, plan)[0]
        prefix_states = None
        if prefix is not None:
            with torch.no_grad():
                hidden, prefix_states = self._und_only(*prefix)
            prefix = prefix._replace(hidden=hidden)
        und = self.und.qkv(encoder_hidden_states, und_angles)
        gen = self.gen.qkv(hidden_states, gen_angles)
        und_attended, gen_attended = self.attn(und, gen, plan, prefix_states)
        streams = self.gen.finish(hidden_states, gen_attended), self.und.finish(encoder_hidden_states, und_attended)
        return streams if prefix is None else (*streams, prefix)

    def _und_only(self, hidden, angles, plan):
        """Und tokens after this layer, computed without gen tokens, and their keys and values."""
        und = self.und.qkv(hidden, angles)
        attended, _ = self.attn(und, tuple(x[:0] for x in und), plan)
        return self.und.finish(hidden, attended), und[1:]


# --- model -----------------------------------------------------------------------------------------------------------


class BagelTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin, CacheMixin):
    """BAGEL's language model, generation expert, and latent input and output. The defaults are the release's sizes.

    Args:
        hidden_size, intermediate_size, num_layers, num_attention_heads, num_key_value_heads: sizes of both experts.
        vocab_size: size of the text embedding and of the language head.
        rms_norm_eps, rope_theta: as in Qwen2.
        latent_channels, latent_patch_size: channels of the VAE's latent, and latent pixels per token and side.
        max_latent_size: entries per side of the latent position table.
    """

    config: Any  # pyright: ignore[reportIncompatibleVariableOverride] - a FrozenDict with the arguments as attributes
    layers: Any  # nn.ModuleList of BagelBlock

    _supports_gradient_checkpointing = True
    _auto_class = "AutoModel"  # diffusers.AutoModel loads the published folder of this component
    _gradient_checkpointing_func: Any
    _no_split_modules = ["BagelBlock"]
    _repeated_blocks = ["BagelExpert"]  # see BagelExpert.compile
    # Quantizing the input and output projections or the time embedding changes results.
    _keep_in_full_precision = ["proj_in", "proj_out", "time_embed", "lm_head"]
    _skip_layerwise_casting_patterns = ["norm", "pos_embed", "embed_tokens", *_keep_in_full_precision]
    # Regular expressions for LoraConfig(target_modules=...): all linear layers of an expert.
    _lora_targets = {
        name: rf".*\.({experts})\.(to_q|to_k|to_v|to_out|ff\.gate_proj|ff\.up_proj|ff\.down_proj)"
        for name, experts in (("gen", "gen"), ("und", "und"), ("both", "gen|und"))
    }
    # Regular expression of our name -> name in the original layout, which the adapters of other trainers use.
    _original_names = {
        r"layers\.(\d+)\.und\.to_([qkv])": r"language_model.model.layers.\1.self_attn.\2_proj",
        r"layers\.(\d+)\.gen\.to_([qkv])": r"language_model.model.layers.\1.self_attn.\2_proj_moe_gen",
        r"layers\.(\d+)\.und\.to_out": r"language_model.model.layers.\1.self_attn.o_proj",
        r"layers\.(\d+)\.gen\.to_out": r"language_model.model.layers.\1.self_attn.o_proj_moe_gen",
        r"layers\.(\d+)\.und\.ff\.(gate|up|down)_proj": r"language_model.model.layers.\1.mlp.\2_proj",
        r"layers\.(\d+)\.gen\.ff\.(gate|up|down)_proj": r"language_model.model.layers.\1.mlp_moe_gen.\2_proj",
        r"proj_in": "vae2llm",
        r"proj_out": "llm2vae",
        r"time_embed\.linear_1": "time_embedder.mlp.0",
        r"time_embed\.linear_2": "time_embedder.mlp.2",
        r"lm_head": "language_model.lm_head",
    }
    # Part -> regular expression of the beginning of its parameters' names. The first match counts.
    _trainable_parts = {"text": r"(embed_tokens|lm_head)\.", "und": r"(.+\.)?und\.", "gen": ""}

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int = 4,
        vocab_size: int = 152064,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        latent_channels: int = 16,
        latent_patch_size: int = 2,
        max_latent_size: int = 64,
    ):
        super().__init__()
        _check_options(self)
        if hidden_size % num_attention_heads or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}, and that "
                f"of num_key_value_heads={num_key_value_heads}."
            )
        token_channels = latent_channels * latent_patch_size**2
        sizes = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        self.proj_in = nn.Linear(token_channels, hidden_size)
        table = get_2d_sincos_pos_embed(hidden_size, max_latent_size, output_type="pt").float()
        self.register_buffer("pos_embed", table.reshape(max_latent_size**2, hidden_size))
        self.layers = nn.ModuleList(BagelBlock(index, *sizes) for index in range(num_layers))
        self.norm_out = nn.ModuleDict({e: nn.RMSNorm(hidden_size, eps=rms_norm_eps) for e in ("und", "gen")})
        self.proj_out = nn.Linear(hidden_size, token_channels)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.training_attention = "auto"

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As in diffusers, without a warning about `auto_map`, by which `AutoModel` finds this class."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, but weights keep their stored dtype unless `dtype` is given.

        The release's 28 GB of bfloat16 would otherwise become 56 GB of float32.
        """
        dtype = _read_dtype(kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"])
        kwargs["dtype"] = dtype or _stored_dtype(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _exempting(kwargs["quantization_config"], cls._keep_in_full_precision)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # --- forward pass ------------------------------------------------------------------------------------------------

    def new_cache(self) -> BagelKVCache:
        """An empty cache."""
        return BagelKVCache(self.config.num_layers)

    def plan(self, sequence, contexts: list[Context]) -> InferencePlan:
        """The attention plan for `forward`, which updates over the same rows can share until a cache is enlarged."""
        return InferencePlan(inference_plan(sequence, contexts), self._angles(sequence))

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        timestep: torch.Tensor | None,
        sequence,
        vision_embeds: torch.Tensor | None = None,
        contexts: list[Context] | None = None,
        logit_index: torch.Tensor | None = None,
        plan: InferencePlan | None = None,
        return_dict: bool = True,
    ) -> BagelTransformerOutput | tuple:
        """Forward pass over a packed sequence.

        Args:
            hidden_states: (G, C) latent tokens of the clean and noised VAE segments, in the order of the sequence.
            timestep: (G,) time of each latent token in [0, 1], or (1,) for all: 0 is data (clean), 1 is noise.
            sequence: a `PackedSequence` (segments_bagel.py), which describes the tokens.
            vision_embeds: (V, hidden) output of the vision model.
            contexts: in inference, the context of each row; clean segments are appended to its cache. None: training,
                where every row is a complete sample.
            logit_index: (n,) indices of the und tokens whose next-token logits are returned.
            plan: the result of [`plan`] for `sequence` and `contexts`, to share it between updates.
            return_dict: False returns the output as a tuple, with `sample` first and without entries that are None.
        """
        und, gen = self._embed(sequence, hidden_states, timestep, vision_embeds)
        prefix: Any = ()
        before = rest = None
        if contexts is not None:
            calls, angles = plan or self.plan(sequence, contexts)
        else:
            if not und.requires_grad and self._und_is_frozen():
                before, rest = _split_prefix(sequence)
            calls, prefix_calls = self._training_plans(sequence, before, rest)
            angles = self._angles(sequence)
            if before is not None and prefix_calls is not None:
                prefix = (FrozenPrefix(und[before], tuple(x[before] for x in angles[0]), prefix_calls),)
                und, angles = und[rest], (tuple(x[rest] for x in angles[0]), angles[1])
        for block in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                gen, und, *prefix = self._gradient_checkpointing_func(block, gen, und, *angles, calls, *prefix)
            else:
                gen, und, *prefix = block(gen, und, *angles, calls, *prefix)
        if before is not None and rest is not None:
            und = torch.cat([prefix[0].hidden, und])[torch.cat([before, rest]).argsort()]
        und, gen = self.norm_out["und"](und), self.norm_out["gen"](gen)
        if contexts is not None:
            _advance_caches(sequence, contexts)
        output = BagelTransformerOutput(
            sample=self.proj_out(gen),
            logits=None if logit_index is None else self.lm_head(und[logit_index]),
            und_states=und,
            gen_states=gen,
        )
        return output if return_dict else output.to_tuple()

    def _embed(self, sequence, hidden_states, timestep, vision_embeds) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded und tokens (U, hidden) and gen tokens (G, hidden)."""
        und = self.embed_tokens(sequence.input_ids)  # (U, hidden)
        if vision_embeds is not None:
            und = und.index_copy(0, sequence.vision_index, vision_embeds.to(und.dtype))
        if hidden_states is None:
            hidden_states = und.new_zeros(0, self.config.latent_channels * self.config.latent_patch_size**2)
            timestep = und.new_zeros(0, dtype=torch.float32)
        time = self.time_embed(self.time_proj(timestep).to(und.dtype))
        position = self.pos_embed[sequence.latent_position_ids].to(und.dtype)
        return und, self.proj_in(hidden_states.to(und.dtype)) + time + position

    def _angles(self, sequence) -> tuple:
        """Rotary angles of the und stream and of the gen stream."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        options = (head_dim, self.config.rope_theta, self.embed_tokens.weight.dtype)
        return rotary_angles(sequence.und_position, *options), rotary_angles(sequence.gen_position, *options)

    def _und_is_frozen(self) -> bool:
        """Whether the und expert is frozen, so that a prefix of und tokens needs no backward pass."""
        frozen = (not p.requires_grad for block in self.layers for p in block.und.parameters())
        return torch.is_grad_enabled() and all(frozen)

    def _training_plans(self, sequence, before, rest):
        """The plan of a training pass, and the plan of its frozen prefix (None without a prefix)."""
        device = sequence.input_ids.device
        if self.training_attention == "sdpa" or (self.training_attention == "auto" and device.type != "cuda"):
            if before is None:
                return training_plan(sequence), None
            return training_plan(sequence, "rest"), training_plan(sequence, "prefix")
        und, gen = (sequence.und_segment, sequence.und_position), (sequence.gen_segment, sequence.gen_position)
        if before is None:
            return flex_plan(sequence, [und, gen], [und, gen]), None
        early, late = (tuple(x[part] for x in und) for part in (before, rest))
        return flex_plan(sequence, [late, gen], [early, late, gen]), flex_plan(sequence, [early], [early])

    # --- settings ----------------------------------------------------------------------------------------------------

    def set_training_attention(self, backend: str) -> None:
        """Set the attention of training: "sdpa" (masked calls per sample), "flex" (one block-sparse call) or "auto".

        "auto" is flex on CUDA and sdpa on other devices: FlexAttention has no backward pass on CPU. Raises ValueError
        for other values.
        """
        if backend not in ("auto", "sdpa", "flex"):
            raise ValueError(f"Training attention {backend!r} must be one of auto, sdpa, flex.")
        self.training_attention = backend

    def enable_cache(self, config) -> None:
        """As in diffusers, with a configuration of FirstBlockCache, MagCache, PyramidAttentionBroadcast or TaylorSeer.

        They skip layers or attention in some updates. Off by default: it changes images and needs memory (docs/performance.md). Raises ValueError for other
        configurations, and for one that matches no layer, because it would have no effect.
        """
        if isinstance(config, (FirstBlockCacheConfig, MagCacheConfig)):
            _describe_block()
        elif isinstance(config, PyramidAttentionBroadcastConfig):
            config = _checked_broadcast(config, [name for name, _ in self.named_modules()])
        elif isinstance(config, TaylorSeerCacheConfig):
            _check_taylorseer(config, [name for name, _ in self.named_modules()])
        else:
            raise ValueError(
                f"{type(config).__name__} is not supported: use FirstBlockCacheConfig, MagCacheConfig, "
                "PyramidAttentionBroadcastConfig or TaylorSeerCacheConfig."
            )
        super().enable_cache(config)

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

    # --- costs of a training step and of an update -------------------------------------------------------------------

    def flops(self, spans, num_labels: int, inputs_train: bool) -> float:
        """Floating point operations of the matrix products in one forward and backward pass, without recomputation.

        Counts what gradients need: no backward pass through a frozen prefix, no weight gradients of frozen weights;
        those of adapters are too small to count.

        Args:
            spans: of the packed sequence, per sample.
            num_labels: number of und tokens with a loss.
            inputs_train: whether token embeddings or image features need a gradient.
        """
        config, block = self.config, self.layers[0]
        key_share = config.num_key_value_heads / config.num_attention_heads
        weights = config.hidden_size**2 * (2 + 2 * key_share) + 3 * config.hidden_size * config.intermediate_size
        prefix_is_frozen = not inputs_train and all(b.und.tuning() == "frozen" for b in self.layers)
        trains = {"und": block.und.tuning() == "full", "gen": block.gen.tuning() == "full"}
        total = 0.0
        for sample in spans:
            cut = prefix_length(sample) if prefix_is_frozen else 0
            context = 0
            for index, span in enumerate(sample):
                und, gen = span.und.stop - span.und.start, span.gen.stop - span.gen.start
                n, backward = und + gen, index >= cut
                pairs = n * context + (n * (n + 1) / 2 if span.causal else n * n)
                total += config.num_layers * 4 * config.hidden_size * pairs * (3 if backward else 1)
                for tokens, expert in ((und, "und"), (gen, "gen")):
                    total += config.num_layers * 2 * weights * tokens * (1 + backward + trains[expert])
                context += 0 if span.hidden else n
        head = config.hidden_size * config.vocab_size
        return total + 2 * head * num_labels * (2 + self.lm_head.weight.requires_grad)

    def layer_activation_bytes(
        self, gen: int, und: int, *, compute: int = 4, residual: int = 4, rank: int = 0, masked_samples=()
    ) -> float:
        """Bytes that one layer keeps for the backward pass of `gen` and `und` tokens; 0 if nothing trains.

        Args:
            compute, residual: bytes per value in matrix products, and between layers.
            masked_samples: token counts of the samples whose attention uses a stored mask (CPU).
        """
        block = self.layers[0]
        if block.gen.tuning() == block.und.tuning() == "frozen":
            return 0.0
        kept = gen * block.gen.activation_bytes(compute, rank) + und * block.und.activation_bytes(compute, rank)
        return kept + sum(n * n for n in masked_samples) * compute

    def activation_bytes(
        self,
        gen: int,
        und: int,
        *,
        compute: int = 4,
        residual: int = 4,
        rank: int = 0,
        masked_samples=(),
        num_labels: int = 0,
        checkpointing: bool = False,
    ) -> float:
        """Bytes of the tensors that autograd keeps between the forward and backward pass.

        Arguments as in [`layer_activation_bytes`]. With `checkpointing`, only the layers' inputs are counted: a layer
        that is computed again adds `layer_activation_bytes`.
        """
        layer = self.layer_activation_bytes(
            gen, und, compute=compute, residual=residual, rank=rank, masked_samples=masked_samples
        )
        if layer == 0:
            return 0.0
        config, h, tokens = self.config, self.config.hidden_size, gen + und
        kept = config.num_layers * (tokens * h * residual if checkpointing else layer)
        kept += tokens * 4 * (h + 1)  # inputs of the last norms
        kept += tokens * 2 * residual * h // config.num_attention_heads  # rotary angles
        if self.layers[0].gen.tuning() == "full":
            kept += gen * (256 + 3 * h) * compute  # time embedding
            kept += gen * h * (4 + compute)  # normalised values, and the input of the velocity's projection
        if self.layers[0].und.tuning() == "full":
            kept += und * 4 * h
        return kept + num_labels * config.vocab_size * (compute + 3 * 4)  # logits, their softmax and gradient

    def backward_workspace_bytes(self, tokens: int, compute: int) -> float:
        """Bytes of the gradients that are alive at once in the backward pass: of the three inner tensors of an MLP."""
        return 3.0 * tokens * self.config.intermediate_size * compute

    def kv_cache_bytes(self, tokens: int, itemsize: int) -> float:
        """Bytes of the keys and values of all layers for contexts of `tokens` tokens in total."""
        config = self.config
        width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        return tokens * 2 * config.num_layers * width * itemsize

    def update_bytes(self, tokens: int, itemsize: int) -> float:
        """Bytes of activations at the peak of an update over `tokens` latent tokens of all rows: in the MLP of a layer.

        Per token: the layer's input, queries, the attention's result, their sum and its norm (hidden each), keys and
        values, and the MLP's gate, value and product (intermediate each).
        """
        h = self.config.hidden_size
        k = h // self.config.num_attention_heads * self.config.num_key_value_heads
        return tokens * (5 * h + 2 * k + 3 * self.config.intermediate_size) * itemsize


# --- helpers ---------------------------------------------------------------------------------------------------------


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


def _exempting(config, names: list[str]):
    """A copy of a quantization configuration that excludes the modules `names`, unless it excludes others."""
    config = copy.copy(config)
    for option in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(config, option, names) is None:
            setattr(config, option, list(names))
    return config


def _describe_block() -> None:
    """Register the outputs of a block for diffusers' FirstBlockCache and MagCache, which have no public function for it."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError as error:
        raise ValueError(f"FirstBlockCache is not supported with this version of diffusers: {error}.") from error
    TransformerBlockRegistry.register(BagelBlock, TransformerBlockMetadata(0, 1))


def _checked_broadcast(config, names: list[str]):
    """A PyramidAttentionBroadcast configuration that skips attention in updates alone.

    Raises ValueError without a callback, and for identifiers that match no attention layer.
    """
    callback = config.current_timestep_callback
    if callback is None:
        raise ValueError("PyramidAttentionBroadcast needs current_timestep_callback=lambda: pipe.current_timestep.")
    patterns = config.spatial_attention_block_identifiers if config.spatial_attention_block_skip_range else ()
    if not any(re.search(pattern, name) for pattern in patterns for name in names if name.endswith(".attn")):
        raise ValueError(
            "PyramidAttentionBroadcast would skip no attention: give spatial_attention_block_skip_range (there is no "
            "temporal or cross attention), and spatial_attention_block_identifiers=('layers',)."
        )
    config = copy.copy(config)
    config.current_timestep_callback = lambda: 0 if callback() is None else callback()  # None outside of updates
    return config


def _check_taylorseer(config, names: list[str]) -> None:
    """Raise ValueError for a configuration that would skip no layers of a model with modules `names`, or fail."""
    if config.disable_cache_before_step < 1:
        raise ValueError(
            f"disable_cache_before_step={config.disable_cache_before_step}: the first update cannot be extrapolated; use "
            "at least 1."
        )
    skipped, cached = (
        [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns or ())]
        for patterns in (config.skip_predict_identifiers, config.cache_identifiers)
    )
    layers = any(name.startswith("layers.") for name in skipped + cached)
    if config.use_lite_mode or not cached or not layers:
        raise ValueError(
            "TaylorSeer would skip no layer, or not replace a skipped one: use skip_predict_identifiers=[r'layers\\.\\d+'] "
            "and cache_identifiers=['proj_out'] (this model lacks the modules of use_lite_mode and of the defaults); got "
            f"{config.skip_predict_identifiers} and {config.cache_identifiers}, use_lite_mode={config.use_lite_mode}."
        )


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


def _check_initialization(adapter_config) -> None:
    """Raise ValueError for an initialization that changes the base weights: unloading would leave them changed."""
    kind = getattr(adapter_config, "init_lora_weights", True)
    if isinstance(kind, str) and kind.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(f"init_lora_weights={kind!r} changes the base weights: use True, 'gaussian' or 'orthogonal'.")
