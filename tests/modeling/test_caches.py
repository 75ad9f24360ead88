"""Step caches of diffusers: which layers run, what may not be shortened, and that nothing leaks between calls."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

STEPS = 12
DRAW = {"num_inference_steps": STEPS, "output_type": "latent", "height": 32, "width": 32}
LAYERS = {"skip_predict_identifiers": [r"layers\.\d+"], "cache_identifiers": ["proj_out"]}
TAYLORSEER = TaylorSeerCacheConfig(
    cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, **LAYERS
)
FIRST_BLOCK = FirstBlockCacheConfig(threshold=0.5)


MAG = MagCacheConfig(threshold=0.2, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=torch.full((STEPS,), 0.98))
PYRAMID = "pyramid"  # needs the pipeline: see `configured`


def configured(config, pipe):
    if config is not PYRAMID:
        return config
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("layers",),
        spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


ALL = pytest.mark.parametrize(
    "config", [TAYLORSEER, FIRST_BLOCK, MAG, PYRAMID], ids=["taylorseer", "first", "mag", "pab"]
)


@pytest.fixture
def cached(pipe):
    """Enables a cache on the golden pipeline for one test, and counts how often each layer computes."""
    hooks, counts = [], [0] * len(pipe.transformer.layers)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    def enable(config):
        pipe.transformer.enable_cache(configured(config, pipe))
        return counts

    # Where a layer's own work begins: a skipped layer does not reach it.
    for index, layer in enumerate(pipe.transformer.layers):
        hooks.append(layer.und.norm1.register_forward_hook(count(index)))
    yield enable
    for hook in hooks:
        hook.remove()
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()


def draw(pipe, prompt="a red dot", seed=0, **options):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **DRAW | options).images


def full_steps(steps: int, config: TaylorSeerCacheConfig) -> int:
    """How many of `steps` updates in one context run in full."""
    before, interval = config.disable_cache_before_step, config.cache_interval
    return sum(step < before or (step - before - 1) % interval == 0 for step in range(steps))


def test_taylorseer_skips_the_layers_that_it_should(pipe, cached):
    counts = cached(TAYLORSEER)
    draw(pipe, guidance_scale=1.0)
    prefill = 1
    assert full_steps(STEPS, TAYLORSEER) == 5  # 0, 1, 3, 6, 9
    assert counts == [prefill + 5] * len(counts)


def test_first_block_cache_runs_the_first_layer_and_not_always_the_others(pipe, cached):
    counts = cached(FIRST_BLOCK)
    draw(pipe, guidance_scale=1.0)
    assert counts[0] == 1 + STEPS
    assert all(2 < count < STEPS for count in counts[1:]) and len(set(counts[1:])) == 1


def test_guidance_that_ends_has_contexts_of_its_own(pipe, cached):
    """Both parts of the interval warm up for themselves: guesses never cross the change in the number of rows."""
    sigmas = sample_times(pipe)
    guided = sum(0.4 < t <= 1.0 for t in sigmas)
    assert 3 < guided < STEPS - 1
    counts = cached(TAYLORSEER)
    draw(pipe, guidance_scale=4.0, guidance_interval=(0.4, 1.0))
    assert counts[0] == 1 + full_steps(guided, TAYLORSEER) + full_steps(STEPS - guided, TAYLORSEER)


def test_guidance_that_comes_and_goes_is_not_guessed_across_the_gap(pipe, cached):
    """Before and after the interval the rows are the same, but what is known of them is old."""
    sigmas = sample_times(pipe)
    parts = [sum(0.8 < t for t in sigmas), sum(0.4 < t <= 0.8 for t in sigmas), sum(t <= 0.4 for t in sigmas)]
    assert min(parts) > 1
    counts = cached(TAYLORSEER)
    draw(pipe, guidance_scale=4.0, guidance_interval=(0.4, 0.8))
    assert counts[0] == 1 + sum(full_steps(part, TAYLORSEER) for part in parts)


def sample_times(pipe) -> list[float]:
    import numpy as np

    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, STEPS + 1)[:-1])
    return pipe.scheduler.sigmas[:-1].tolist()


@pytest.mark.long
@ALL
def test_calls_do_not_know_of_each_other(pipe, pictures, cached, config):
    """Other pictures, other sizes, a call that was stopped: the next call draws what it would have drawn first."""
    cached(config)
    first = draw(pipe)
    draw(pipe, "two blue squares", seed=1, height=48)
    draw(pipe, "make it blue", image=pictures["img_a"], seed=2)
    assert torch.equal(draw(pipe), first)

    def stop(pipeline, step, timestep, given):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, "another", seed=3, callback_on_step_end=stop)
    assert torch.equal(draw(pipe), first)


@ALL
def test_prefill_and_chat_never_use_the_step_cache(pipe, pictures, cached, config):
    question = {"image": pictures["img_b"], "max_new_tokens": 12}
    answer = pipe.chat("what is this?", **question)
    plan = pipe("a dot", think=True, max_think_tokens=12, **DRAW).texts
    counts = cached(config)
    assert pipe.chat("what is this?", **question) == answer
    assert len(set(counts)) == 1 and counts[0] > 1
    assert pipe("a dot", think=True, max_think_tokens=12, **DRAW).texts == plan


@ALL
def test_a_cache_comes_close_and_goes_without_a_trace(pipe, cached, config):
    exact = draw(pipe)
    cached(config)
    guessed = draw(pipe)
    difference = torch.linalg.vector_norm(guessed - exact) / torch.linalg.vector_norm(exact)
    assert 0 < difference < 0.5
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), exact)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TaylorSeerCacheConfig(), "would skip no layer"),
        (TaylorSeerCacheConfig(use_lite_mode=True), "use_lite_mode=True"),
        (TaylorSeerCacheConfig(cache_identifiers=["proj_out"]), "would skip no layer"),
        (TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+"]), "would skip no layer"),
        (TaylorSeerCacheConfig(skip_predict_identifiers=[r"layers\.\d+"]), "not replace a skipped one"),
        (TaylorSeerCacheConfig(disable_cache_before_step=0, **LAYERS), "disable_cache_before_step=0"),
        (PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2), "current_timestep_callback"),
        (PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 0), "would skip no attention"),
        (
            PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=lambda: 0),
            "would skip no attention",
        ),
        (FasterCacheConfig(), "not supported"),
    ],
)
def test_a_configuration_that_does_nothing_or_harm_is_refused(pipe, config, words):
    with pytest.raises(ValueError, match=words):
        pipe.transformer.enable_cache(config)
    assert not pipe.transformer.is_cache_enabled


def test_a_diffusers_without_its_private_registry_loads_all_the_same(pipe, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers.hooks._helpers", None)
    with pytest.raises(ValueError, match="is not supported with this version of diffusers"):
        pipe.transformer.enable_cache(FIRST_BLOCK)
    assert not pipe.transformer.is_cache_enabled


def test_a_prompt_that_is_not_read_again_starts_afresh_all_the_same(pipe, cached):
    """With a prefill cache no reading stands between a call that was stopped and the next one."""
    cached(TAYLORSEER)
    pipe.enable_prefill_cache()
    try:
        first = draw(pipe)

        def stop(pipeline, step, timestep, given):
            if step == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            draw(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(draw(pipe), first)
    finally:
        pipe.disable_prefill_cache()


def test_mag_cache_skips_by_the_ratio_of_the_update_itself(pipe, cached):
    """Guidance that ends restarts the cache; the ratios after it are still those of the later updates."""
    guided = sum(0.7 < t <= 1.0 for t in sample_times(pipe))
    assert 2 < guided < STEPS - 3
    never = torch.full((STEPS,), 5.0)  # far from 1: the error is too large to skip
    for first, second in ((never, torch.ones(STEPS)), (torch.ones(STEPS), never)):
        ratios = torch.cat([first[:guided], second[guided:]])
        settings = {"threshold": 0.1, "max_skip_steps": 20, "retention_ratio": 0.0, "num_inference_steps": STEPS}
        counts = cached(MagCacheConfig(mag_ratios=ratios, **settings))
        before = list(counts)
        draw(pipe, guidance_scale=4.0, guidance_interval=(0.7, 1.0))
        ran = counts[1] - before[1] - 1  # without the prefill
        parts = [guided if torch.equal(first, never) else 1, STEPS - guided if torch.equal(second, never) else 1]
        assert ran == sum(parts)
        pipe.transformer.disable_cache()


def test_mag_cache_of_another_number_of_updates_is_refused(pipe, cached):
    cached(MAG)
    with pytest.raises(ValueError, match="num_inference_steps=12.* does not fit a call with 5 updates"):
        draw(pipe, num_inference_steps=5)


def test_mag_cache_calibrates_over_all_updates(pipe, cached, capsys):
    """One ratio for each update, although guidance ends within the call; then they can be used."""
    cached(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    exact = draw(pipe, guidance_scale=4.0, guidance_interval=(0.4, 1.0))
    printed = capsys.readouterr().out
    ratios = eval(printed[printed.index("[", printed.index(":")) : printed.rindex("]") + 1])
    assert len(ratios) == STEPS and len({round(r, 4) for r in ratios}) > STEPS // 2
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, guidance_scale=4.0, guidance_interval=(0.4, 1.0)), exact)
    cached(MagCacheConfig(mag_ratios=ratios, num_inference_steps=STEPS, threshold=0.5))
    assert not torch.equal(draw(pipe, guidance_scale=4.0, guidance_interval=(0.4, 1.0)), exact)


def test_pyramid_attention_broadcast_skips_attention_between_updates(pipe, cached, monkeypatch):
    calls = []
    processor = type(pipe.transformer.layers[0].attn.processor)
    original = processor.__call__
    monkeypatch.setattr(processor, "__call__", lambda *a, **k: calls.append(1) or original(*a, **k))
    draw(pipe, guidance_scale=1.0)
    every = len(calls)
    cached(PYRAMID)
    calls.clear()
    draw(pipe, guidance_scale=1.0)
    within = sum(100 < 1000 * t < 950 for t in sample_times(pipe))
    layers = len(pipe.transformer.layers)
    assert every - len(calls) in (layers * (within // 2), layers * -(-within // 2))


def test_pyramid_attention_broadcast_refuses_several_passes_per_update(pipe, cached, monkeypatch):
    """It keeps the results of one pass; a second group of images would be given those of the first."""
    from echo4o.modeling.bagel import pipeline_echo4o

    monkeypatch.setattr(pipeline_echo4o, "activation_limit", lambda device: 1.0)
    cached(PYRAMID)
    with pytest.raises(ValueError, match="more than one forward pass per update"):
        draw(pipe, ["a red dot", "a blue dot"])
    assert draw(pipe).shape[0] == 1
