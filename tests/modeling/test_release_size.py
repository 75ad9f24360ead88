"""The release's own sizes, on the meta device: it builds, counts and names as the original does.

Sizes: Qwen2.5-7B with two experts in each layer, SigLIP so400m-14 without its last layer and its pooling head, FLUX's
VAE. The original's names are written out here by hand, independently of the converter's table. The parameter counts
follow from the sizes by the formulas of `counts`:

    one expert in one layer      233,058,048
    transformer               14,155,484,736   56 experts, embedding and head, final norms, time, latents in and out
    vision model                 419,533,728   patches, positions, 26 layers of 15,239,504, final norm, connector
    VAE                           83,819,683   the count that FLUX publishes; encoder 34,274,208, decoder 49,545,475

The fixed position tables (4096 and 4900 rows of 3584) are stored as tensors, but are no parameters. In bfloat16 the
transformer, the vision model and the tables are 29,214,520,256 bytes: the release's ema.safetensors is 29.2 GB.
"""

import pytest
import torch
from diffusers import AutoencoderKL

from echo4o.modeling.bagel.original_configs import component_configs, original_sizes
from echo4o.modeling.bagel.original_keys import all_keys
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel

H, I, V, HEADS, KV_HEADS, LAYERS = 3584, 18944, 152064, 28, 4, 28
W, F, VIT_LAYERS = 1152, 4304, 26
CHANNELS, BLOCKS, LATENT = (128, 256, 512, 512), 2, 16
LLM = {"hidden_size": H, "intermediate_size": I, "vocab_size": V, "num_hidden_layers": LAYERS}
LLM |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
VIT = {"hidden_size": W, "intermediate_size": F, "num_hidden_layers": VIT_LAYERS + 1, "num_attention_heads": 16}
VIT |= {"patch_size": 14, "image_size": 980}
CONFIG = {"latent_patch_size": 2, "max_latent_size": 64, "vit_max_num_patch_per_side": 70}
CONFIG |= {"vae_config": {"z_channels": LATENT, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": BLOCKS}}
CLASSES = {"transformer": BagelTransformer2DModel, "vision_model": BagelVisionModel, "vae": AutoencoderKL}


@pytest.fixture(scope="module")
def sizes():
    sizes, problems = original_sizes(LLM, VIT, CONFIG, {}, {})
    assert problems == []
    return sizes


@pytest.fixture(scope="module")
def models(sizes):
    configs = component_configs(LLM, VIT, CONFIG, sizes)
    with torch.device("meta"):
        return {name: cls(**configs[name]) for name, cls in CLASSES.items()}


# --- how many ------------------------------------------------------------------------------------------------------


def linear(into: int, out: int) -> int:
    return into * out + out


def convolution(into: int, out: int, side: int = 3) -> int:
    return into * out * side * side + out


def resnet(into: int, out: int) -> int:
    shortcut = convolution(into, out, 1) if into != out else 0
    return 2 * into + convolution(into, out) + 2 * out + convolution(out, out) + shortcut


def vae_count() -> tuple[int, int]:
    """Parameters of the encoder and of the decoder."""
    top = CHANNELS[-1]
    middle = 2 * resnet(top, top) + 2 * top + 4 * linear(top, top)
    encoder, width = convolution(3, CHANNELS[0]), CHANNELS[0]
    for level, channels in enumerate(CHANNELS):
        encoder += resnet(width, channels) + (BLOCKS - 1) * resnet(channels, channels)
        encoder += convolution(channels, channels) if level < 3 else 0
        width = channels
    encoder += middle + 2 * top + convolution(top, 2 * LATENT)
    decoder, width = convolution(LATENT, top) + middle, top
    for level, channels in reversed(list(enumerate(CHANNELS))):
        decoder += resnet(width, channels) + BLOCKS * resnet(channels, channels)
        decoder += convolution(channels, channels) if level else 0
        width = channels
    return encoder, decoder + 2 * width + convolution(width, 3)


def counts() -> dict[str, int]:
    """Parameters of each component, from the sizes alone."""
    head = H // HEADS
    narrow = KV_HEADS * head
    patch = 2 * 2 * LATENT
    expert = linear(H, H) + 2 * linear(H, narrow) + H * H + 2 * head + 2 * H + 3 * H * I
    assert expert == 233_058_048
    time_and_latents = linear(256, H) + linear(H, H) + linear(patch, H) + linear(H, patch)
    layer = 4 * linear(W, W) + linear(W, F) + linear(F, W) + 4 * W
    tower = linear(14 * 14 * 3, W) + 70 * 70 * W + VIT_LAYERS * layer + 2 * W
    return {
        "transformer": 2 * LAYERS * expert + 2 * V * H + 2 * H + time_and_latents,
        "vision_model": tower + linear(W, H) + linear(H, H),
        "vae": sum(vae_count()),
    }


def test_parameter_counts(models):
    expected = {"transformer": 14_155_484_736, "vision_model": 419_533_728, "vae": 83_819_683}
    assert counts() == expected
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == expected
    assert all(t.is_meta for model in models.values() for t in model.state_dict().values())
    in_ema = [t for name in ("transformer", "vision_model") for t in models[name].state_dict().values()]
    assert 2 * sum(t.numel() for t in in_ema) == 29_214_520_256


# --- what it is called ---------------------------------------------------------------------------------------------


def ema_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release's ema.safetensors."""
    names = {"language_model.model.embed_tokens.weight": (V, H), "language_model.lm_head.weight": (V, H)}
    for suffix in ("", "_moe_gen"):
        names[f"language_model.model.norm{suffix}.weight"] = (H,)
        for i in range(LAYERS):
            layer = f"language_model.model.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"{layer}.{norm}{suffix}.weight"] = (H,)
            for which, rows in (("q", H), ("k", 512), ("v", 512)):
                names[f"{layer}.self_attn.{which}_proj{suffix}.weight"] = (rows, H)
                names[f"{layer}.self_attn.{which}_proj{suffix}.bias"] = (rows,)
            names[f"{layer}.self_attn.o_proj{suffix}.weight"] = (H, H)
            names[f"{layer}.self_attn.q_norm{suffix}.weight"] = (128,)
            names[f"{layer}.self_attn.k_norm{suffix}.weight"] = (128,)
            names[f"{layer}.mlp{suffix}.gate_proj.weight"] = (I, H)
            names[f"{layer}.mlp{suffix}.up_proj.weight"] = (I, H)
            names[f"{layer}.mlp{suffix}.down_proj.weight"] = (H, I)
    modules = {"time_embedder.mlp.0": (H, 256), "time_embedder.mlp.2": (H, H), "vae2llm": (H, 64), "llm2vae": (64, H)}
    modules |= {"connector.fc1": (H, W), "connector.fc2": (H, H)}
    tower = "vit_model.vision_model"
    modules[f"{tower}.embeddings.patch_embedding"] = (W, 588)
    vectors = [f"{tower}.post_layernorm"]
    for i in range(VIT_LAYERS):
        layer = f"{tower}.encoder.layers.{i}"
        modules |= {f"{layer}.self_attn.{n}": (W, W) for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
        modules |= {f"{layer}.mlp.fc1": (F, W), f"{layer}.mlp.fc2": (W, F)}
        vectors += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    names |= {f"{n}.weight": shape for n, shape in modules.items()} | {f"{n}.bias": s[:1] for n, s in modules.items()}
    names |= {f"{n}.{part}": (W,) for n in vectors for part in ("weight", "bias")}
    names[f"{tower}.embeddings.position_embedding.weight"] = (4900, W)
    names["latent_pos_embed.pos_embed"] = (4096, H)
    names["vit_pos_embed.pos_embed"] = (4900, H)
    return names


def ae_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of FLUX's ae.safetensors."""
    weights: dict[str, tuple[int, ...]] = {}

    def block(name: str, into: int, out: int) -> None:
        weights.update({f"{name}.norm1": (into,), f"{name}.norm2": (out,)})
        weights.update({f"{name}.conv1": (out, into, 3, 3), f"{name}.conv2": (out, out, 3, 3)})
        if into != out:
            weights[f"{name}.nin_shortcut"] = (out, into, 1, 1)

    for half, first, last in (
        ("encoder", (128, 3, 3, 3), (32, 512, 3, 3)),
        ("decoder", (512, 16, 3, 3), (3, 128, 3, 3)),
    ):
        weights |= {f"{half}.conv_in": first, f"{half}.norm_out": last[1:2], f"{half}.conv_out": last}
        block(f"{half}.mid.block_1", 512, 512)
        block(f"{half}.mid.block_2", 512, 512)
        weights[f"{half}.mid.attn_1.norm"] = (512,)
        weights |= {f"{half}.mid.attn_1.{n}": (512, 512, 1, 1) for n in ("q", "k", "v", "proj_out")}
    for level, (into, out) in enumerate(((128, 128), (128, 256), (256, 512), (512, 512))):
        block(f"encoder.down.{level}.block.0", into, out)
        block(f"encoder.down.{level}.block.1", out, out)
    for level, (into, out) in enumerate(((256, 128), (512, 256), (512, 512), (512, 512))):
        block(f"decoder.up.{level}.block.0", into, out)
        block(f"decoder.up.{level}.block.1", out, out)
        block(f"decoder.up.{level}.block.2", out, out)
    for level, width in ((0, 128), (1, 256), (2, 512)):
        weights[f"encoder.down.{level}.downsample.conv"] = (width, width, 3, 3)
    for level, width in ((1, 256), (2, 512), (3, 512)):
        weights[f"decoder.up.{level}.upsample.conv"] = (width, width, 3, 3)
    return {f"{n}.weight": s for n, s in weights.items()} | {f"{n}.bias": s[:1] for n, s in weights.items()}


def test_names_map_one_to_one_onto_the_originals(models, sizes):
    keys = all_keys(sizes)
    expected = ema_names() | ae_names()
    assert len(keys) == len({k.original for k in keys}) == len({k[:2] for k in keys}) == len(expected)
    assert {k.original: k.original_shape for k in keys} == expected
    for name, model in models.items():
        ours = {k.name: k.shape for k in keys if k.component == name}
        assert ours == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    vae = {k.original for k in keys if k.component == "vae"}
    assert vae == ae_names().keys()


def test_defaults_are_the_releases_sizes(models):
    for name in ("transformer", "vision_model"):
        with torch.device("meta"):
            default = CLASSES[name]()
        given = {k: v for k, v in models[name].config.items() if k != "_use_default_values"}
        assert {k: v for k, v in default.config.items() if k != "_use_default_values"} == given
