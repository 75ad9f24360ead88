"""A plain implementation of BAGEL's inference, organised as the original, for `benchmarks sampling`.

There is one forward pass for every encoded segment and for every guidance branch of an update. A pass holds its tokens in
reading order; every layer gathers each expert's tokens by index and scatters its results back, and concatenates the
keys of the pass with those of the context. It uses the transformer's weights; tests/modeling/test_plain_model.py compares
the results with ours.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from echo4o.modeling.bagel.guidance_bagel import Guidance, guide
from echo4o.modeling.bagel.segments_bagel import Segment, SpecialTokens, grid_position_ids, image_segment


@dataclass
class PlainContext:
    """Keys and values of the encoded segments: one (length, K, D) pair per layer."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    position: int = 0

    def copy(self) -> "PlainContext":
        return PlainContext([x.clone() for x in self.keys], [x.clone() for x in self.values], self.position)


class PlainBagel:
    """Encodes segments and predicts velocities with a transformer's weights."""

    def __init__(self, transformer):
        self.model = transformer

    @torch.no_grad()
    def read(self, context: PlainContext, segment: Segment, vision_embeds: torch.Tensor | None = None) -> None:
        """Append a clean segment to the context."""
        time = torch.zeros(segment.size) if segment.kind == "vae" else None
        content = segment.data if segment.kind == "vae" else vision_embeds
        _, keys, values = self._forward(context, segment, content, time)
        context.keys, context.values = keys, values
        context.position += segment.step

    @torch.no_grad()
    def velocity(self, context: PlainContext, segment: Segment, tokens: torch.Tensor, t: float) -> torch.Tensor:
        """(G, C) velocity of a noised image under one context."""
        states, _, _ = self._forward(context, segment, tokens, torch.full((len(tokens),), t))
        return self.model.proj_out(states[1:-1])

    def guided(self, contexts: list[PlainContext], segment, tokens, t: float, guidance: Guidance) -> torch.Tensor:
        """One pass per branch: the condition, then as many of the text-free and the image-free one as are given."""
        branches = [self.velocity(context, segment, tokens, t) for context in contexts]
        return guide(*branches, *[None] * (3 - len(branches)), guidance)

    def _forward(self, context: PlainContext, segment: Segment, content, time):
        model, n = self.model, len(segment)
        und = torch.arange(n)
        gen = torch.arange(0)
        if segment.kind in ("vae", "noise"):
            und, gen = torch.tensor([0, n - 1]), torch.arange(1, n - 1)
        x = model.embed_tokens.weight.new_zeros(n, model.config.hidden_size)
        markers = und if segment.kind == "text" else torch.tensor([0, n - 1])
        x[markers] = model.embed_tokens(torch.tensor(segment.ids))
        if segment.kind == "vit":
            x[1:-1] = content
        elif len(gen):
            place = model.pos_embed[grid_position_ids(segment.grid, model.config.max_latent_size)]
            x[gen] = model.proj_in(content) + model.time_embed(model.time_proj(time)) + place
        positions = torch.full((n,), context.position)
        if segment.kind == "text":
            positions += torch.arange(n)
        cos, sin = self._rotary(positions)
        keys, values = [], []
        for index, layer in enumerate(model.layers):
            past = (context.keys[index], context.values[index]) if context.keys else None
            x, key, value = self._layer(layer, x, und, gen, cos, sin, past, segment.kind == "text")
            keys.append(key)
            values.append(value)
        out = torch.zeros_like(x)
        out[und] = model.norm_out["und"](x[und])
        out[gen] = model.norm_out["gen"](x[gen])
        return out, keys, values

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.model.config
        head_dim = config.hidden_size // config.num_attention_heads
        frequencies = 1 / config.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(positions.float(), frequencies).repeat(1, 2)[:, None]  # (n, 1, D)
        return angles.cos(), angles.sin()

    @staticmethod
    def _layer(layer, x, und, gen, cos, sin, past, causal: bool):
        """(n, hidden) -> the same, and the keys and values of the context with this segment."""
        experts = [(layer.und, und)] + ([(layer.gen, gen)] if len(gen) else [])
        n, width = x.shape
        head_dim = layer.und.head_dim
        normed = torch.zeros_like(x)
        for expert, index in experts:
            normed[index] = expert.norm1(x[index])
        query, key, value = (x.new_zeros(n, getattr(layer.und, f"to_{name}").out_features) for name in "qkv")
        for expert, index in experts:
            query[index] = expert.to_q(normed[index])
            key[index] = expert.to_k(normed[index])
            value[index] = expert.to_v(normed[index])
        query, key, value = (states.view(n, -1, head_dim) for states in (query, key, value))
        query_normed, key_normed = torch.zeros_like(query), torch.zeros_like(key)
        for expert, index in experts:
            query_normed[index] = expert.norm_q(query[index])
            key_normed[index] = expert.norm_k(key[index])
        query, key = (states * cos + _half_turn(states) * sin for states in (query_normed, key_normed))
        if past is not None:
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        mask = torch.ones(n, len(key), dtype=torch.bool).tril(len(key) - n) if causal else None
        attended = nn.functional.scaled_dot_product_attention(
            *(states.transpose(0, 1)[None] for states in (query, key, value)), attn_mask=mask, enable_gqa=True
        )
        attended = attended[0].transpose(0, 1).reshape(n, width)
        projected = torch.zeros_like(x)
        for expert, index in experts:
            projected[index] = expert.to_out(attended[index])
        x = x + projected
        result = torch.zeros_like(x)
        for expert, index in experts:
            result[index] = expert.ff(expert.norm2(x[index]))
        return x + result, key, value


def _half_turn(states: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def noised(grid: tuple[int, int], tokens: SpecialTokens) -> Segment:
    """The segment of an image that is generated."""
    return image_segment("noise", grid, tokens)
