"""Compares TaylorSeer and FirstBlockCache on the quickstart's base: layers that run, memory, and correct images.

The prompts are 30 single objects, which the base all generates correctly without a cache; 24 updates as in the
quickstart.
"""

import time
from argparse import Namespace

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

from benchmarks.bench_sampling import THREADS, quickstart_pipeline
from benchmarks.measure import threads
from echo4o.quickstart.generation import STEPS, judge
from echo4o.quickstart.imperfect_rows import single_object_prompts

PROMPTS = 30


def taylorseer(interval: int) -> TaylorSeerCacheConfig:
    """TaylorSeer that skips all layers and extrapolates the velocity."""
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        taylor_factors_dtype=torch.float32,
        skip_predict_identifiers=[r"layers\.\d+"],
        cache_identifiers=["proj_out"],
    )


WAYS = {
    "no cache": None,
    "TaylorSeer, interval 2": taylorseer(2),
    "TaylorSeer, interval 3": taylorseer(3),
    "TaylorSeer, interval 5": taylorseer(5),
    "FirstBlockCache, threshold 0.05": FirstBlockCacheConfig(threshold=0.05),
    "FirstBlockCache, threshold 0.1": FirstBlockCacheConfig(threshold=0.1),
    "FirstBlockCache, threshold 0.2": FirstBlockCacheConfig(threshold=0.2),
}


def main(options: Namespace) -> None:
    """Print one table."""
    pipe, prompts = quickstart_pipeline(), single_object_prompts(PROMPTS)
    layers, cached_bytes = LayerCounter(pipe.transformer), []

    def measure_cache(pipeline, step, timestep, tensors):
        if step == STEPS - 1:
            cached_bytes.append(cache_bytes(pipeline.transformer))

    def generate(output_type: str):
        return pipe(
            [prompt.text for prompt in prompts],
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            num_inference_steps=STEPS,
            output_type=output_type,
            callback_on_step_end=measure_cache,
        ).images

    exact = None
    print(f"{PROMPTS} prompts in one call, {STEPS} updates, two rows each, float32, {THREADS} threads")
    print("\n| cache | layers run | seconds | difference of latents | right by the detector | cache, kB per image |")
    print("|---|---|---|---|---|---|")
    with threads(THREADS):
        for name, config in WAYS.items():
            if config is not None:
                pipe.transformer.enable_cache(config)
            layers.count, start = 0, time.perf_counter()
            latents = generate("latent")
            seconds, run = time.perf_counter() - start, layers.count - len(pipe.transformer.layers)  # prefill
            exact = latents if exact is None else exact
            distance = torch.linalg.vector_norm(latents - exact) / torch.linalg.vector_norm(exact)
            right = sum(not why for why in judge(prompts, generate("pil")))
            if config is not None:
                pipe.transformer.disable_cache()
            share = run / (STEPS * len(pipe.transformer.layers))
            print(
                f"| {name} | {share:.0%} | {seconds:.1f} | {distance:.1%} | {right} of {PROMPTS} | {cached_bytes[-1] / PROMPTS / 1e3:.1f} |",
                flush=True,
            )


class LayerCounter:
    """Counts the layers that run: a skipped layer does not call its first norm."""

    def __init__(self, transformer):
        self.count = 0
        for layer in transformer.layers:
            layer.und.norm1.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1


def cache_bytes(transformer) -> int:
    """Bytes of all tensors that diffusers' hooks hold; shared tensors count once."""
    found: dict[int, int] = {}

    def visit(value) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            [visit(item) for item in value]
        elif isinstance(value, dict):
            [visit(item) for item in value.values()]

    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry else ():
            for state in getattr(hook.state_manager, "_state_cache", {}).values():
                visit(vars(state))
    return sum(found.values())
