"""The block-sparse path equals the plain one: same forward pass, same rule. Its backward pass needs a GPU."""

import random

import pytest
import torch

from echo4o.modeling.bagel.segments_bagel import pack
from tests.modeling.test_frozen_prefix import SAMPLES, run


@pytest.fixture
def transformer(pipe):
    yield pipe.transformer
    pipe.transformer.set_training_attention("auto")
    pipe.transformer.requires_grad_(True)


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_equals_sdpa(transformer, frozen, monkeypatch):
    random.seed(3)
    sequence = pack([make() for make in SAMPLES.values()], latent_positions=16, patch_positions=16)
    latents, vision = torch.randn(len(sequence.gen_segment), 64), torch.randn(len(sequence.vision_index), 64)
    time = torch.rand(len(latents))
    transformer.requires_grad_(False)
    # The prefix is split off only where gradients are wanted, which FlexAttention lacks on CPU: ask for the split alone.
    monkeypatch.setattr(type(transformer), "_und_is_frozen", lambda self: frozen)
    outputs = {}
    for backend in ("sdpa", "flex"):
        transformer.set_training_attention(backend)
        outputs[backend] = transformer(latents, time, sequence, vision)
    for name in ("sample", "und_states", "gen_states"):
        torch.testing.assert_close(outputs["flex"][name], outputs["sdpa"][name], atol=1e-5, rtol=0)


def test_unknown_backend_is_named(transformer):
    with pytest.raises(ValueError, match="'xformers' must be one of auto, sdpa, flex"):
        transformer.set_training_attention("xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on CUDA only")
def test_gradients_equal_sdpa_on_cuda(transformer):
    transformer.cuda().requires_grad_(False)
    try:
        gradients = []
        for backend in ("sdpa", "flex"):
            random.seed(4)
            transformer.set_training_attention(backend)
            gradients.append(run(transformer, [make() for make in SAMPLES.values()], device="cuda")[1])
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)
    finally:
        transformer.cpu()
