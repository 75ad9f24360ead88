"""Times generation, compared with its own matrix products and with a plain implementation of the same model.

There are two sizes: a middle one (width 512, 8 layers, 256 latent tokens), whose time is mostly matrix products, and the
quickstart's, whose time is mostly the overhead of calls. Prints the tables of docs/performance.md, and plots time against
updates, rows and tokens. ECHO4O_BENCH_ROUNDS changes the number of rounds (20).
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks.measure import in_turns, ratios, record, replay, spread, threads
from benchmarks.plain_model import PlainBagel, PlainContext, noised
from benchmarks.results import BenchmarkResults
from echo4o.modeling.bagel.denoising_bagel import GuidanceBranch, NoisyImage, pack_branches, predict_velocity
from echo4o.modeling.bagel.guidance_bagel import Guidance
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.quickstart.tiny_base import BASE, load_tokenizer, load_vae

THREADS, ROUNDS = 2, int(os.environ.get("ECHO4O_BENCH_ROUNDS", "20"))
TEXT = 32  # tokens of a prompt, with its markers
GUIDED = Guidance(4.0, 2.0, (0.0, 1.0), "text_channel")
PLOT = Path("build/benchmarks/sampling.png")


def main(options: Namespace) -> None:
    """Print one table per size, then loading, then how time grows."""
    torch.manual_seed(0)
    with threads(THREADS), torch.no_grad():
        print(f"{THREADS} threads, float32; medians of {ROUNDS} rounds (images: {image_rounds()}), middle half")
        middle = middle_pipeline()
        measure(middle, "middle size, 256 px", 16, 20, options.results)
        measure(quickstart_pipeline(), "quickstart, 64 px", 4, 24, options.results)
        measure_loading(middle)
        measure_growth(middle)


# --- models ---------------------------------------------------------------------------------------------------------


def middle_pipeline() -> Echo4oPipeline:
    """Random weights in float32; the VAE and the tokenizer are the quickstart's."""
    transformer = BagelTransformer2DModel(
        hidden_size=512,
        intermediate_size=2048,
        num_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
    )
    vision = BagelVisionModel(
        hidden_size=256, intermediate_size=1024, num_layers=4, num_attention_heads=4, output_size=512
    )
    return quiet(
        Echo4oPipeline(
            transformer.eval(), vision.eval(), load_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), load_tokenizer()
        )
    )


def quickstart_pipeline() -> Echo4oPipeline:
    """The base model of `echo4o quickstart`."""
    return quiet(Echo4oPipeline.from_pretrained(BASE, dtype=torch.float32))


def quiet(pipe: Echo4oPipeline) -> Echo4oPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_of(pipe: Echo4oPipeline, tokens: int) -> str:
    """A text whose segment has `tokens` tokens."""
    words = "a"
    while len(pipe.text_segment(words)) < tokens:
        words += " a"
    assert len(pipe.text_segment(words)) == tokens
    return words


# --- both implementations, doing the same ---------------------------------------------------------------------------


class Case:
    """A text prompt, encoded by both implementations; the image-free branch is another context of the same size."""

    def __init__(self, pipe: Echo4oPipeline, side: int, images: int = 1):
        self.pipe, self.grid, self.plain = pipe, (side, side), PlainBagel(pipe.transformer)
        self.text = pipe.text_segment(prompt_of(pipe, TEXT))
        self.caches = [self.read() for _ in range(2)]
        contexts = [self.read_plain() for _ in range(2)]
        self.contexts = [contexts[0], PlainContext(), contexts[1]]
        self.noise = torch.randn(side * side, pipe.transformer.proj_in.in_features)
        self.segment = noised(self.grid, pipe.special_tokens)
        self.images = images

    def read(self):
        cache = self.pipe.transformer.new_cache()
        cache.reserve(0, scratch=self.grid[0] * self.grid[1] + 2)
        self.pipe.prefill([(cache, [self.text])])
        return cache

    def read_plain(self) -> PlainContext:
        context = PlainContext()
        self.plain.read(context, self.text)
        return context

    def update(self, rows: int):
        """A function that computes the guided velocity of every image with ours, as in one update."""
        guidance = (Guidance(1.0, 1.0, (0.0, 1.0), "global"), Guidance(4.0, 1.0, (0.0, 1.0), "global"), GUIDED)[
            rows - 1
        ]
        transformer = self.pipe.transformer
        conditional, image_free = (GuidanceBranch.whole(cache) for cache in self.caches)
        branches = (conditional, GuidanceBranch(self.caches[0], 0, 0), image_free)
        images = [NoisyImage(self.noise, self.grid, guidance, *branches) for _ in range(self.images)]
        batch = pack_branches(transformer, images, 0.5, self.pipe.special_tokens, self.pipe.pack)
        return lambda: predict_velocity(transformer, batch, 0.5)

    def plain_update(self, rows: int):
        return lambda: self.plain.guided(self.contexts[:rows], self.segment, self.noise, 0.5, GUIDED)

    def image(self, updates: int):
        prompt, size = prompt_of(self.pipe, TEXT), self.grid[0] * self.pipe.latent_stride
        patch = self.pipe.transformer.config.latent_patch_size
        latents = torch.zeros(1, self.pipe.transformer.config.latent_channels, *(n * patch for n in self.grid))
        options = {"guidance_scale": 4.0, "guidance_interval": (0.4, 1.0), "output_type": "latent"}
        options |= {"height": size, "width": size, "num_inference_steps": updates, "latents": latents}
        return lambda: self.pipe(prompt, **options).images

    def plain_image(self, updates: int):
        """A function that encodes the prompt and takes Euler steps with the plain implementation."""
        guidance = Guidance(4.0, 1.0, (0.4, 1.0), "global")
        scheduler = self.pipe.scheduler

        def generate():
            contexts = [self.read_plain(), PlainContext()]
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, updates + 1)[:-1])
            sigmas, tokens = scheduler.sigmas.tolist(), torch.zeros_like(self.noise)
            for t, after in zip(sigmas, sigmas[1:]):
                rows = 1 + guidance.active(t).text_free
                tokens = tokens + (after - t) * self.plain.guided(contexts[:rows], self.segment, tokens, t, guidance)
            return tokens

        return generate


class ReferenceCase:
    """The encoding of a reference image, as latents and as patches, and of a text."""

    def __init__(self, pipe: Echo4oPipeline, side: int, patches: int):
        from echo4o.modeling.bagel.segments_bagel import image_segment

        self.pipe, self.plain = pipe, PlainBagel(pipe.transformer)
        channels = pipe.transformer.proj_in.in_features
        pixels = pipe.vision_model.patch_embed.in_features
        self.segments = [
            image_segment("vae", (side, side), pipe.special_tokens, torch.randn(side**2, channels)),
            image_segment("vit", (patches, patches), pipe.special_tokens, torch.randn(patches**2, pixels)),
            pipe.text_segment(prompt_of(pipe, TEXT)),
        ]

    def ours(self):
        self.pipe.prefill([(self.pipe.transformer.new_cache(), self.segments)])

    def plain_way(self):
        context = PlainContext()
        for segment in self.segments:
            embeds = None
            if segment.kind == "vit":
                sequence = self.pipe.pack([[segment]])
                inputs = (sequence.patches, sequence.patch_position_ids, sequence.patch_lengths)
                embeds = self.pipe.vision_model(*inputs).embeds
            self.plain.read(context, segment, embeds)


# --- tables ---------------------------------------------------------------------------------------------------------


def image_rounds() -> int:
    return max(3, ROUNDS // 4)


def measure(pipe: Echo4oPipeline, title: str, side: int, updates: int, results: BenchmarkResults) -> None:
    case, reference = Case(pipe, side), ReferenceCase(pipe, side, patches=14 if side > 8 else 4)
    print(f"\n| {title} | ours, ms | its products, ms | ours / products | plain, ms | plain / ours |")
    print("|---|---|---|---|---|---|")

    def compared(name: str, ours, plain, rounds: int = ROUNDS, target: float | None = None) -> None:
        over, faster = line(pipe, name, ours, plain, rounds)
        results.add(f"{title}: {name}, ours / products", over, at_most=target)
        results.add(f"{title}: {name}, plain / ours", faster)

    for rows in (1, 2, 3):
        name = f"one update, {rows} row{'s' * (rows > 1)}"
        compared(name, case.update(rows), case.plain_update(rows), target=1.15)
    compared(f"prefill, {TEXT} text tokens", case.read, case.read_plain)
    compared("prefill, a reference and the text", reference.ours, reference.plain_way)
    ways = case.image(updates), case.plain_image(updates)
    compared(f"an image, {updates} updates, 2 rows, then 1", *ways, rounds=image_rounds())


def line(pipe, name: str, ours, plain, rounds: int) -> tuple[list[float], list[float]]:
    """Print a row of the table; the three take turns. Returns the ratios ours / products and plain / ours."""
    products = record(ours, pipe.transformer, pipe.vision_model)
    times = in_turns({"ours": ours, "products": lambda: replay(products), "plain": plain}, rounds)
    cells = [spread([1000 * s for s in seconds]) for seconds in times.values()]
    ours, bare, plain = times.values()
    over, faster = ratios(ours, bare), ratios(plain, ours)
    print(f"| {name} | {cells[0]} | {cells[1]} | {spread(over, 2)} | {cells[2]} | {spread(faster, 2)} |", flush=True)
    return over, faster


_LOAD = """
import json, sys, time
import torch
from echo4o import Echo4oPipeline
from echo4o.modeling.bagel import transformer_bagel, vision_bagel
from diffusers import AutoencoderKL
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
before, start = status("VmRSS"), time.perf_counter()
pipe = Echo4oPipeline.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
models = (pipe.transformer, pipe.vision_model, pipe.vae)
weights = sum(x.nbytes for model in models for x in [*model.parameters(), *model.buffers()])
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before, "weights": weights}))
"""


def measure_loading(pipe: Echo4oPipeline, rounds: int = 3) -> None:
    """Time loading, each time in a new process, which reports its peak of memory."""
    if not Path("/proc/self/status").is_file():
        print("\nloading: peak memory is read from /proc, which this system does not have")
        return
    with tempfile.TemporaryDirectory(prefix="echo4o-bench-") as folder:
        pipe.save_pretrained(folder)
        runs = [
            json.loads(subprocess.run([sys.executable, "-c", _LOAD, folder], capture_output=True, check=True).stdout)
            for _ in range(rounds)
        ]
    print("\n| `from_pretrained`, middle size | weights, MB | seconds | peak / weights |")
    print("|---|---|---|---|")
    seconds, peak = (
        spread([run[name] / unit(run) for run in runs], 2)
        for name, unit in (("seconds", lambda run: 1), ("peak", lambda run: run["weights"]))
    )
    print(
        f"| float32, a new process, {rounds} rounds | {runs[0]['weights'] / 1e6:.0f} | {seconds} | {peak} |",
        flush=True,
    )


# --- growth ---------------------------------------------------------------------------------------------------------


def measure_growth(pipe: Echo4oPipeline, rounds: int = 3) -> None:
    """Time against updates, rows and latent tokens, each with the other two fixed."""
    case = Case(pipe, 8)
    axes = {
        "updates (2 rows, 64 tokens)": {n: case.image(n) for n in (5, 10, 20, 40)},
        "rows (64 tokens)": {2 * n: Case(pipe, 8, images=n).update(2) for n in (1, 2, 4, 8)},
        "latent tokens (2 rows)": {n * n: Case(pipe, n).update(2) for n in (4, 8, 16, 24, 32)},
    }
    print("\n| time against | milliseconds | milliseconds for one more, first half and second half |")
    print("|---|---|---|")
    curves = {}
    for name, ways in axes.items():
        times = in_turns(ways, rounds)
        curves[name] = medians = {n: 1000 * float(np.median(seconds)) for n, seconds in times.items()}
        cells = ", ".join(f"{n}: {value:.0f}" for n, value in medians.items())
        print(f"| {name} | {cells} | {', '.join(f'{s:.2f}' for s in slopes(medians))} |", flush=True)
    print(f"\nplotted in {plot(curves)}")


def slopes(medians: dict[int, float]) -> list[float]:
    """Milliseconds per unit over the lower and the upper part of the range: equal where time is linear."""
    numbers = sorted(medians)
    middle = numbers[len(numbers) // 2]
    ends = ((numbers[0], middle), (middle, numbers[-1]))
    return [(medians[b] - medians[a]) / (b - a) for a, b in ends]


def plot(curves: dict[str, dict[int, float]]) -> Path:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), constrained_layout=True)
    for axis, (name, medians) in zip(axes, curves.items(), strict=True):
        axis.plot(list(medians), list(medians.values()), "o-")
        axis.set(xlabel=name, ylabel="ms", xlim=(0, None), ylim=(0, None))
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=100)
    pyplot.close(figure)
    return PLOT
