"""The transformer as a diffusers citizen, and its cache."""

import pytest
import torch
from peft import LoraConfig

from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, pack, text_segment
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel

TOKENS = SpecialTokens(1, 2, 3, 4)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_latent_size": 8,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BagelTransformer2DModel(**SIZES).eval()


def rows(*samples, starts=None):
    return pack(samples, latent_positions=8, patch_positions=8, starts=starts)


def text(*ids):
    return text_segment(ids, TOKENS)


@torch.no_grad()
def read(model, cache, segments):
    cache.reserve(cache.length + sum(map(len, segments)), cache.scratch)
    model(None, None, rows(segments, starts=[cache.position]), contexts=[cache.whole()])
    cache.position += sum(segment.step for segment in segments)
    return cache


@torch.no_grad()
def velocity(model, cache, length, position, tokens):
    noised = rows([image_segment("noise", (2, 3), TOKENS)], starts=[position])
    return model(tokens, torch.full((6,), 0.5), noised, contexts=[cache.first(length)]).sample


def test_any_prefix_of_a_cache_is_a_context(model):
    first, second, tokens = text(5, 6, 7), text(8, 9), torch.randn(6, 64)
    whole = model.new_cache()
    whole.reserve(0, scratch=8)
    read(model, whole, [first, second])
    alone = model.new_cache()
    alone.reserve(0, scratch=8)
    read(model, alone, [first])
    keys = whole.keys(1).clone()
    from_prefix = velocity(model, whole, len(first), alone.position, tokens)
    torch.testing.assert_close(
        from_prefix, velocity(model, alone, len(first), alone.position, tokens), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(whole.keys(1), keys, atol=0, rtol=0)  # the noised picture left no trace
    assert not torch.allclose(from_prefix, velocity(model, whole, whole.length, whole.position, tokens), atol=1e-3)


def test_reading_in_pieces_equals_reading_at_once_and_truncation_forgets(model):
    first, second = text(5, 6, 7), text(8, 9)
    once = read(model, model.new_cache(), [first, second])
    pieces = read(model, read(model, model.new_cache(), [first]), [second])
    for layer in range(2):
        torch.testing.assert_close(pieces.keys(layer), once.keys(layer), atol=1e-6, rtol=0)
        torch.testing.assert_close(pieces.values(layer), once.values(layer), atol=1e-6, rtol=0)
    other = read(model, read(model, model.new_cache(), [first]), [text(30, 31, 32)])
    other.truncate(len(first), first.step)
    torch.testing.assert_close(read(model, other, [second]).keys(1), once.keys(1), atol=1e-6, rtol=0)


def test_growing_a_cache_keeps_what_it_holds(model):
    cache = read(model, model.new_cache(), [text(5, 6, 7)])
    keys = cache.keys(0).clone()
    cache.reserve(100, scratch=20)
    assert torch.equal(cache.keys(0), keys)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="hidden_size=30 must be a multiple of num_attention_heads=4"):
        BagelTransformer2DModel(**SIZES | {"hidden_size": 30})


def test_attention_processors_and_backends(model):
    assert len(model.attn_processors) == SIZES["num_layers"]
    model.set_attention_backend("native")
    cache = model.new_cache()
    cache.reserve(0, scratch=8)
    assert torch.isfinite(velocity(model, cache, 0, 0, torch.randn(6, 64))).all()


def test_lora_on_one_expert_changes_that_expert_alone(model):
    sample = rows([text(5, 6), image_segment("noise", (2, 3), TOKENS)])
    tokens, time = torch.randn(6, 64), torch.full((6,), 0.5)
    before = model(tokens, time, sample)
    model.add_adapter(LoraConfig(r=2, target_modules=r".*\.gen\.to_[qkv]", init_lora_weights=False))
    after = model(tokens, time, sample)
    n = len(text(5, 6))
    torch.testing.assert_close(after.und_states[:n], before.und_states[:n], atol=1e-5, rtol=0)
    assert not torch.allclose(after.sample, before.sample)
    model.disable_adapters()
    torch.testing.assert_close(model(tokens, time, sample).sample, before.sample, atol=1e-6, rtol=0)


def test_layerwise_casting_keeps_norms_and_tables(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.layers[0].gen.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.layers[0].gen.norm1.weight.dtype == model.pos_embed.dtype == torch.float32
    sample = rows([text(5, 6), image_segment("noise", (2, 3), TOKENS)])
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(6, 64), torch.full((6,), 0.5), sample).sample).all()


def test_gradient_checkpointing_gives_the_same_gradients(model):
    sample = rows([text(5, 6), image_segment("noise", (2, 3), TOKENS)])
    tokens, time = torch.randn(6, 64), torch.full((6,), 0.5)
    model.train()
    gradients = []
    for enable in (False, True):
        (model.enable_gradient_checkpointing if enable else model.disable_gradient_checkpointing)()
        model.zero_grad()
        model(tokens, time, sample).sample.pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in model.layers.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_outputs_come_as_tuples_as_well(model):
    sample = rows([text(5, 6), image_segment("noise", (2, 3), TOKENS)])
    inputs = (torch.randn(6, 64), torch.full((6,), 0.5), sample)
    for options in ({}, {"logit_index": torch.tensor([0, 2])}):
        output, plain = model(*inputs, **options), model(*inputs, **options, return_dict=False)
        assert isinstance(plain, tuple) and len(plain) == 3 + len(options)
        assert all(torch.equal(a, b) for a, b in zip(plain, output.to_tuple(), strict=True))
        assert torch.equal(plain[0], output.sample)


def test_the_vision_models_output_comes_as_a_tuple_as_well(pipe):
    patches = torch.randn(5, pipe.vision_model.patch_embed.in_features)
    inputs = {"patches": patches, "position_ids": torch.arange(5), "lengths": [2, 3]}
    with torch.no_grad():
        output, plain = pipe.vision_model(**inputs), pipe.vision_model(**inputs, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, output.to_tuple(), strict=True))
    assert torch.equal(plain[0], output.embeds)
