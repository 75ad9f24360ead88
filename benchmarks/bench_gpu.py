"""Times the release's size on a GPU: random weights in bfloat16, 1024 x 1024 pixels, 49 updates, guidance 4.0 in (0.4, 1.0).

Batches of 1 and 4, eager and compiled, with and without step caches: seconds, peak memory, and the share of the
rate that this GPU reaches in one large matrix product. Only products that run are counted.
"""

import time
from argparse import Namespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_caches import taylorseer
from benchmarks.measure import spread

SIDE, UPDATES, TEXT, ROUNDS = 64, 49, 32, 3


def main(options: Namespace) -> None:
    """Print one table, or one line if there is no GPU."""
    if not torch.cuda.is_available():
        print("needs a CUDA device, and there is none")
        return
    from diffusers import FirstBlockCacheConfig

    rate = matrix_rate()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in an 8192-wide bfloat16 product")
    print("\n| batch | layers | cache | seconds per call | peak, GB | TFLOP run | share of the matrix rate |")
    print("|---|---|---|---|---|---|---|")
    caches = {
        "none": None,
        "TaylorSeer, 3": taylorseer(3),
        "FirstBlockCache, 0.1": FirstBlockCacheConfig(threshold=0.1),
    }
    transformer, flops = release(), {}
    for compiled in (False, True):
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        for batch in (1, 4):
            for name, config in caches.items():
                if config is not None:
                    transformer.enable_cache(config)
                generate = call(transformer, batch)
                if not compiled:
                    with FlopCounterMode(display=False) as counter:
                        generate()
                    flops[batch, name] = counter.get_total_flops()
                report(f"{batch} | {'compiled' if compiled else 'eager'} | {name}", generate, flops[batch, name], rate)
                if config is not None:
                    transformer.disable_cache()


def release():
    """The transformer at the release's size, with random weights."""
    from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = BagelTransformer2DModel()
    torch.set_default_dtype(torch.float32)
    return transformer.eval()


def matrix_rate(size: int = 8192, repeats: int = 50) -> float:
    """FLOP per second of a large square product in bfloat16."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def report(name: str, generate, flops: int, rate: float) -> None:
    generate()  # warms up and compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        generate()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9
    share = flops / sorted(seconds)[ROUNDS // 2] / rate
    print(f"| {name} | {spread(seconds, 2)} | {peak:.1f} | {flops / 1e12:.0f} | {share:.0%} |", flush=True)


def call(transformer, batch: int):
    """A function that encodes a prompt and generates `batch` latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from echo4o.modeling.bagel.denoising_bagel import (
        GuidanceBranch,
        NoisyImage,
        pack_branches,
        predict_velocity,
        take_step,
    )
    from echo4o.modeling.bagel.guidance_bagel import Guidance
    from echo4o.modeling.bagel.segments_bagel import SpecialTokens, pack, text_segment
    from echo4o.modeling.common.step_cache import uncached_pass

    tokens = SpecialTokens(1, 2, 3, 4)
    guidance = Guidance(4.0, 1.0, (0.4, 1.0), "global")
    text = text_segment(range(10, 8 + TEXT), tokens)

    def packed(rows, starts):
        return pack(rows, latent_positions=SIDE, patch_positions=70, starts=starts).to("cuda")

    @torch.no_grad()
    def generate():
        cache = transformer.new_cache()
        cache.reserve(len(text), scratch=SIDE * SIDE + 2)
        with uncached_pass(transformer):
            transformer(None, None, packed([[text]], [0]), contexts=[cache.whole()])
        branches = GuidanceBranch(cache, len(text), len(text)), GuidanceBranch(cache, 0, 0)
        noise = [torch.randn(SIDE * SIDE, 64, device="cuda") for _ in range(batch)]
        images = [NoisyImage(x, (SIDE, SIDE), guidance, *branches) for x in noise]
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, UPDATES + 1)[:-1], device="cuda")
        packed_at = None
        for step, timestep in enumerate(scheduler.timesteps):
            t = float(scheduler.sigmas[step])
            if packed_at != guidance.active(t):
                packed_at = guidance.active(t)
                branch_batch = pack_branches(transformer, images, t, tokens, packed)
            take_step(scheduler, images, predict_velocity(transformer, branch_batch, t), timestep)

    return generate
