"""Times generation: batches compared with single calls, shared prompts, guidance branches."""

from argparse import Namespace

import torch
from PIL import Image

from benchmarks.measure import in_turns, ratios, spread, table, threads
from benchmarks.results import BenchmarkResults

PROMPTS = ["a red circle", "two blue squares", "a fox made of clouds", "a lighthouse made of glass"]


def main(options: Namespace) -> None:
    """Print one table per question."""
    from echo4o import Echo4oPipeline

    is_original = Echo4oPipeline.is_original(options.model)
    load = Echo4oPipeline.from_original if is_original else Echo4oPipeline.from_pretrained
    pipe = load(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    count = len(PROMPTS)

    def generate(prompt, **arguments):
        pipe(prompt, num_inference_steps=options.steps, output_type="latent", **arguments)

    def report(title, ways):
        print(table(f"{title} ({options.steps} updates)", in_turns(ways, options.repeats)), flush=True)

    report(
        f"{count} prompts, an image each",
        {"one call per prompt": lambda: [generate(p) for p in PROMPTS], "one batch": lambda: generate(PROMPTS)},
    )
    report(
        f"one prompt, {count} images",
        {
            "one call per image": lambda: [generate(PROMPTS[0]) for _ in range(count)],
            "num_images_per_prompt": lambda: generate(PROMPTS[0], num_images_per_prompt=count),
        },
    )
    reference = Image.new("RGB", (128, 128), "orange")
    report(
        "one reference",
        {
            "no guidance": lambda: generate(PROMPTS[0], image=reference, guidance_scale=1.0, image_guidance_scale=1.0),
            "text guidance": lambda: generate(PROMPTS[0], image=reference, image_guidance_scale=1.0),
            "text and image guidance": lambda: generate(PROMPTS[0], image=reference),
        },
    )
    measure_batches(options.results)
    if torch.device(options.device).type == "cuda":
        print(f"peak CUDA memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def measure_batches(results: BenchmarkResults, rounds: int = 5) -> None:
    """n prompts in one call against n calls, on the CPU, at the two sizes of `bench_sampling`; and the peak memory.

    The target: a batch is never slower than single calls.
    """
    from benchmarks.bench_sampling import middle_pipeline, quickstart_pipeline

    print("\n| prompts in one call | n calls / one call | activations of an update, MB | all rows at once, MB |")
    print("|---|---|---|---|")
    with threads(2), torch.no_grad():
        for title, pipe, side, updates in (
            ("middle size, 256 px", middle_pipeline(), 256, 4),
            ("quickstart, 64 px", quickstart_pipeline(), 64, 8),
        ):
            for count in (2, 4, 8):
                measure_batch(pipe, f"{title}, {count} prompts", count, side, updates, rounds, results)


def measure_batch(
    pipe, name: str, count: int, side: int, updates: int, rounds: int, results: BenchmarkResults
) -> None:
    prompts = [f"{PROMPTS[i % len(PROMPTS)]} {i}" for i in range(count)]
    options = {"height": side, "width": side, "num_inference_steps": updates, "output_type": "latent"}
    options |= {"guidance_interval": (0.0, 1.0)}
    ways = {
        "single": lambda: [pipe(prompt, **options) for prompt in prompts],
        "batch": lambda: pipe(prompts, **options),
    }
    single, batch = in_turns(ways, rounds).values()
    gain = ratios(single, batch)
    results.add(f"{name}: n calls / one call", gain, at_least=1.0)
    row = pipe.transformer.update_bytes((side // pipe.latent_stride) ** 2, 4)
    from echo4o.modeling.common.activation_limit import activation_limit

    limit = activation_limit(torch.device("cpu"))
    used = max(2 * row, min(2 * count * row, limit // (2 * row) * 2 * row))
    print(f"| {name} | {spread(gain, 2)} | {used / 1e6:.1f} | {2 * count * row / 1e6:.1f} |", flush=True)
