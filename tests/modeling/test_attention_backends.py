"""Every attention backend of diffusers that runs here gives the same images and answers."""

import copy

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

BACKENDS = [
    backend.value
    for backend in _AttentionBackendRegistry.list_backends()
    if backend.value == "flex" or backend.value.startswith("_native")
]


@pytest.fixture
def mine(pipe):
    """The golden pipeline with a transformer of its own; the default backend of the process is restored."""
    original = pipe.transformer
    pipe.transformer = copy.deepcopy(original)
    yield pipe
    pipe.transformer = original
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def results(pipe, pictures) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Latents of a generation and of an edit, and an answer."""

    def latents(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red dot", generator=generator, num_inference_steps=3, output_type="latent", **options).images

    answer = pipe.chat("what is it?", pictures["img_a"], max_new_tokens=6)
    return latents(height=32, width=32), latents(image=pictures["img_a"]), answer


def runs_here(backend: str) -> bool:
    """Whether the backend computes plain attention on this machine."""
    x = torch.randn(1, 4, 2, 8)
    try:
        attention_dispatch.dispatch_attention_fn(x, x, x, backend=AttentionBackendName(backend))
    except (RuntimeError, ValueError, TypeError, NameError, AttributeError):  # no kernel, or no package
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_give_the_same_results(mine, pictures, backend):
    if not runs_here(backend):
        assert backend not in ("flex", "_native_flash", "_native_math"), "these run on a CPU"
        return
    want = results(mine, pictures)
    mine.transformer.set_attention_backend(backend)
    got = results(mine, pictures)
    for a, b, bound in zip(got[:2], want[:2], (1e-6, 2e-6), strict=True):  # an edit has twice the contexts
        assert (a - b).norm() <= bound * b.norm()
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert got[2] == want[2]


@pytest.mark.parametrize("chosen_by", ["model", "context"])
def test_masked_and_causal_calls_are_native_and_all_updates_use_the_chosen_backend(
    mine, pictures, monkeypatch, chosen_by
):
    """Also when another model, or a `with attention_backend(...)`, set the default of the process."""
    calls = []

    def recorded(name):
        backend = _AttentionBackendRegistry._backends[name]

        def attend(query, key, value, attn_mask=None, is_causal=False, **kwargs):
            calls.append((name.value, attn_mask is not None or is_causal, query.shape[1]))
            return backend(query=query, key=key, value=value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

        return attend

    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, recorded(name))
    if chosen_by == "model":
        mine.transformer.set_attention_backend("_native_math")
        results(mine, pictures)
    else:
        with attention_dispatch.attention_backend("_native_math"):
            results(mine, pictures)
    assert {name for name, masked, _ in calls if masked} == {"native"}
    assert {name for name, masked, _ in calls if not masked} == {"_native_math"}
    image_tokens = 2 * 2 + 2  # of an image of 32 x 32 pixels
    assert [name for name, _, queries in calls if queries == image_tokens].count("_native_math") >= 3 * 2
