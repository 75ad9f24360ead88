"""Large batches are denoised in groups whose activations fit the caches; the images are the same."""

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

from echo4o.modeling.bagel import pipeline_echo4o
from echo4o.modeling.common.activation_limit import activation_limit, last_cache_bytes

PROMPTS = ["a red circle", "two blue squares", "a fox made of clouds"]
OPTIONS = {"height": 32, "width": 32, "output_type": "latent"}


def latents(pipe, prompts: list[str], seeds: range, **options) -> list[torch.Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return list(pipe(prompts, generator=generators, num_inference_steps=4, **OPTIONS | options).images)


@pytest.fixture
def calls(pipe, monkeypatch):
    """Rows of every forward pass of the denoising loop."""
    rows = []
    monkeypatch.setattr(pipe.transformer, "forward", recording(pipe.transformer.forward, rows))
    return rows


def recording(forward, rows: list[int]):
    def recorded(*arguments, **options):
        if arguments and isinstance(arguments[0], torch.Tensor) and len(arguments[0]):
            rows.append(len(options["contexts"]))
        return forward(*arguments, **options)

    return recorded


@pytest.mark.parametrize(("limit", "groups"), [(1.0, 3), (float("inf"), 1)])
def test_groups_change_no_image(pipe, calls, monkeypatch, limit, groups):
    single = [latents(pipe, [prompt], range(i, i + 1))[0] for i, prompt in enumerate(PROMPTS)]
    calls.clear()
    monkeypatch.setattr(pipeline_echo4o, "activation_limit", lambda device: limit)
    batch = latents(pipe, PROMPTS, range(3))
    assert len(calls) == 4 * groups, "one pass per group and update"
    for one, other in zip(single, batch, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        if groups == 3:
            assert torch.equal(one, other), "a group of one image is a single call"


def test_a_group_is_as_large_as_the_limit_allows(pipe, calls, monkeypatch):
    tokens = (32 // pipe.latent_stride) ** 2
    two_images = pipe.transformer.update_bytes(2 * 2 * tokens, 4)
    monkeypatch.setattr(pipeline_echo4o, "activation_limit", lambda device: two_images)
    latents(pipe, PROMPTS, range(3), guidance_interval=(0.0, 1.0))
    assert calls == [4, 2] * 4


def test_every_group_has_a_step_cache_of_its_own(pipe, monkeypatch):
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        skip_predict_identifiers=[r"layers\.\d+"],
        cache_identifiers=["proj_out"],
    )
    pipe.transformer.enable_cache(config)
    try:
        single = [latents(pipe, [prompt], range(i, i + 1))[0] for i, prompt in enumerate(PROMPTS)]
        monkeypatch.setattr(pipeline_echo4o, "activation_limit", lambda device: 1.0)
        batch = latents(pipe, PROMPTS, range(3))
    finally:
        pipe.transformer.disable_cache()
    assert all(torch.equal(one, other) for one, other in zip(single, batch, strict=True))


def test_the_limit_is_half_of_the_last_cache():
    assert activation_limit(torch.device("cpu")) == last_cache_bytes() / 2 > 2**18
    assert activation_limit(torch.device("meta")) == float("inf")
