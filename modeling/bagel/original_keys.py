"""Names and shapes of BAGEL's tensors in our layout and in the original one.

Both directions of the conversion and all checks of names and shapes use this table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..common.weights import StoredTensor

FREQUENCIES = 256  # width of the timestep's sinusoidal embedding


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine the shapes of all tensors of a checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    latent_channels: int
    latent_patch: int
    latent_side: int  # positions of the latent table along one side
    vit_hidden: int
    vit_intermediate: int
    vit_layers: int  # layers kept: one fewer than vit_config.json counts
    vit_patch_values: int  # numbers in one patch: side * side * channels
    vit_side: int  # positions of the ViT table along one side
    vae_channels: tuple[int, ...]  # per level, from full resolution down
    vae_blocks: int  # ResNet blocks per level of the encoder


class TensorEntry(NamedTuple):
    """A tensor's component, its name and shape in our layout, and its name and shape in the original one."""

    component: str
    name: str
    original: str
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]


def all_keys(sizes: Sizes) -> list[TensorEntry]:
    """Every tensor of a checkpoint of these sizes, in the order of the forward pass."""
    return [*transformer_keys(sizes), *vision_keys(sizes), *vae_keys(sizes)]


def transformer_keys(s: Sizes) -> Iterator[TensorEntry]:
    """The tensors of `transformer/`; in the original, of ema.safetensors."""

    def key(name: str, original: str, *shape: int) -> TensorEntry:
        return TensorEntry("transformer", name, original, shape, shape)

    patch = s.latent_patch**2 * s.latent_channels
    yield key("embed_tokens.weight", "language_model.model.embed_tokens.weight", s.vocabulary, s.hidden)
    for ours, theirs, width in (("linear_1", "mlp.0", FREQUENCIES), ("linear_2", "mlp.2", s.hidden)):
        yield key(f"time_embed.{ours}.weight", f"time_embedder.{theirs}.weight", s.hidden, width)
        yield key(f"time_embed.{ours}.bias", f"time_embedder.{theirs}.bias", s.hidden)
    yield key("proj_in.weight", "vae2llm.weight", s.hidden, patch)
    yield key("proj_in.bias", "vae2llm.bias", s.hidden)
    yield key("pos_embed", "latent_pos_embed.pos_embed", s.latent_side**2, s.hidden)
    for layer in range(s.layers):
        for expert, suffix in (("und", ""), ("gen", "_moe_gen")):
            for name, original, shape in _layer(s, suffix):
                yield key(f"layers.{layer}.{expert}.{name}", f"language_model.model.layers.{layer}.{original}", *shape)
    yield key("norm_out.und.weight", "language_model.model.norm.weight", s.hidden)
    yield key("norm_out.gen.weight", "language_model.model.norm_moe_gen.weight", s.hidden)
    yield key("proj_out.weight", "llm2vae.weight", patch, s.hidden)
    yield key("proj_out.bias", "llm2vae.bias", patch)
    yield key("lm_head.weight", "language_model.lm_head.weight", s.vocabulary, s.hidden)


def _layer(s: Sizes, suffix: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, original name, shape) of one expert's tensors in one layer."""
    head = s.hidden // s.heads
    yield "norm1.weight", f"input_layernorm{suffix}.weight", (s.hidden,)
    for which, rows in (("q", s.heads * head), ("k", s.kv_heads * head), ("v", s.kv_heads * head)):
        yield f"to_{which}.weight", f"self_attn.{which}_proj{suffix}.weight", (rows, s.hidden)
        yield f"to_{which}.bias", f"self_attn.{which}_proj{suffix}.bias", (rows,)
    for which in "qk":
        yield f"norm_{which}.weight", f"self_attn.{which}_norm{suffix}.weight", (head,)
    yield "to_out.weight", f"self_attn.o_proj{suffix}.weight", (s.hidden, s.heads * head)
    yield "norm2.weight", f"post_attention_layernorm{suffix}.weight", (s.hidden,)
    for which in ("gate_proj", "up_proj", "down_proj"):
        shape = (s.hidden, s.intermediate) if which == "down_proj" else (s.intermediate, s.hidden)
        yield f"ff.{which}.weight", f"mlp{suffix}.{which}.weight", shape


def vision_keys(s: Sizes) -> Iterator[TensorEntry]:
    """The tensors of `vision_model/`: the tower, the connector and its position table, all from ema.safetensors."""

    def key(name: str, original: str, *shape: int) -> TensorEntry:
        return TensorEntry("vision_model", name, original, shape, shape)

    tower, width, inner = "vit_model.vision_model", s.vit_hidden, s.vit_intermediate
    yield key("patch_embed.weight", f"{tower}.embeddings.patch_embedding.weight", width, s.vit_patch_values)
    yield key("patch_embed.bias", f"{tower}.embeddings.patch_embedding.bias", width)
    yield key("position_embedding.weight", f"{tower}.embeddings.position_embedding.weight", s.vit_side**2, width)
    matrices = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
    matrices |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for layer in range(s.vit_layers):
        for name in ("layer_norm1", "layer_norm2", *matrices):
            shape = matrices.get(name, (width,))
            yield key(f"layers.{layer}.{name}.weight", f"{tower}.encoder.layers.{layer}.{name}.weight", *shape)
            yield key(f"layers.{layer}.{name}.bias", f"{tower}.encoder.layers.{layer}.{name}.bias", shape[0])
    for part in ("weight", "bias"):
        yield key(f"post_layernorm.{part}", f"{tower}.post_layernorm.{part}", width)
    for name, columns in (("fc1", width), ("fc2", s.hidden)):
        yield key(f"connector.{name}.weight", f"connector.{name}.weight", s.hidden, columns)
        yield key(f"connector.{name}.bias", f"connector.{name}.bias", s.hidden)
    yield key("pos_embed", "vit_pos_embed.pos_embed", s.vit_side**2, s.hidden)


def vae_keys(s: Sizes) -> Iterator[TensorEntry]:
    """The tensors of `vae/` (diffusers AutoencoderKL); originals lie in ae.safetensors (the FLUX layout)."""
    channels, top = s.vae_channels, len(s.vae_channels) - 1
    yield from _conv("encoder.conv_in", "encoder.conv_in", channels[0], 3)
    width = channels[0]
    for level, out in enumerate(channels):
        for block in range(s.vae_blocks):
            ours, theirs = f"encoder.down_blocks.{level}.resnets.{block}", f"encoder.down.{level}.block.{block}"
            yield from _resnet(ours, theirs, width, out)
            width = out
        if level < top:
            ours, theirs = f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
            yield from _conv(ours, theirs, out, out)
    yield from _middle("encoder", width)
    yield from _ends("encoder", width, 2 * s.latent_channels)
    yield from _conv("decoder.conv_in", "decoder.conv_in", width, s.latent_channels)
    yield from _middle("decoder", width)
    for level in range(top, -1, -1):  # the original counts from full resolution, diffusers in the order of use
        for block in range(s.vae_blocks + 1):
            ours, theirs = f"decoder.up_blocks.{top - level}.resnets.{block}", f"decoder.up.{level}.block.{block}"
            yield from _resnet(ours, theirs, width, channels[level])
            width = channels[level]
        if level:
            ours, theirs = f"decoder.up_blocks.{top - level}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv"
            yield from _conv(ours, theirs, width, width)
    yield from _ends("decoder", width, 3)


def _vae(
    name: str, original: str, shape: tuple[int, ...], original_shape: tuple[int, ...] | None = None
) -> TensorEntry:
    return TensorEntry("vae", name, original, shape, original_shape or shape)


def _conv(name: str, original: str, out: int, into: int, side: int = 3) -> Iterator[TensorEntry]:
    yield _vae(f"{name}.weight", f"{original}.weight", (out, into, side, side))
    yield _vae(f"{name}.bias", f"{original}.bias", (out,))


def _norm(name: str, original: str, width: int) -> Iterator[TensorEntry]:
    for part in ("weight", "bias"):
        yield _vae(f"{name}.{part}", f"{original}.{part}", (width,))


def _resnet(name: str, original: str, into: int, out: int) -> Iterator[TensorEntry]:
    yield from _norm(f"{name}.norm1", f"{original}.norm1", into)
    yield from _conv(f"{name}.conv1", f"{original}.conv1", out, into)
    yield from _norm(f"{name}.norm2", f"{original}.norm2", out)
    yield from _conv(f"{name}.conv2", f"{original}.conv2", out, out)
    if into != out:
        yield from _conv(f"{name}.conv_shortcut", f"{original}.nin_shortcut", out, into, 1)


def _middle(half: str, width: int) -> Iterator[TensorEntry]:
    yield from _resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", width, width)
    ours, theirs = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
    yield from _norm(f"{ours}.group_norm", f"{theirs}.norm", width)
    for name, original in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        # A 1x1 convolution there, a linear layer here: the same numbers.
        yield _vae(f"{ours}.{name}.weight", f"{theirs}.{original}.weight", (width, width), (width, width, 1, 1))
        yield _vae(f"{ours}.{name}.bias", f"{theirs}.{original}.bias", (width,))
    yield from _resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", width, width)


def _ends(half: str, width: int, out: int) -> Iterator[TensorEntry]:
    yield from _norm(f"{half}.conv_norm_out", f"{half}.norm_out", width)
    yield from _conv(f"{half}.conv_out", f"{half}.conv_out", out, width)


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor], where: str) -> list[str]:
    """One line for each missing, unexpected or wrongly shaped tensor; empty when all is as expected."""
    lines = [f"missing from {where}: {n} {_text(expected[n])}" for n in expected if n not in found]
    lines += [f"unexpected in {where}: {n} {_text(t.shape)}" for n, t in found.items() if n not in expected]
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            lines.append(f"wrong shape in {where}: {name} is {_text(found[name].shape)}, expected {_text(shape)}")
    return lines


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(n or "?") for n in shape) + "]"
