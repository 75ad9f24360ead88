"""Times a training step, compared with its own matrix products; what freezing saves; packing; and the phases of a step."""

import statistics
import time
from argparse import Namespace

import torch
from torch import nn

from benchmarks.measure import in_turns, ratios, record, replay, table
from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, text_segment
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.training.backbones.bagel import BagelBatch, BagelLoraTuning, BagelSample, collate
from echo4o.training.backbones.bagel_objective import add_noise, bagel_losses
from echo4o.training.model import add_lora

TOKENS = SpecialTokens(1, 2, 3, 4)
SIDES = (64, 70)
CHANNELS, PIXELS = 64, 14 * 14 * 3
VOCABULARY = 4096  # a real vocabulary would be most of a model of this width


def main(options: Namespace) -> None:
    """Print one table per question, at a middle size: width 512, 8 layers, two experts."""
    torch.manual_seed(0)
    repeats, device = options.repeats, options.device
    full, lora = model("full").to(device), model("lora").to(device)
    for title, samples in (("2 references", [with_references(2)]), ("text to image", [text_to_image()] * 2)):
        batch = collate(samples, *SIDES).to(device)
        tokens = sum(map(len, samples))
        products = record(lambda batch=batch: step(full, batch))
        ways = {
            "its matrix products": lambda products=products: replay(products),
            "full: forward and backward": lambda batch=batch: step(full, batch),
            "LoRA on gen, und frozen": lambda batch=batch: step(lora, batch),
        }
        times = (in_turns if device != "cpu" else cpu_seconds)(ways, repeats)
        print(table(f"{title}: {tokens} tokens, {len(products)} products", times))
        bare, whole, small = times.values()
        options.results.add(f"training, {title}: full / products", ratios(whole, bare), at_most=1.35)
        options.results.add(
            f"training, {title}: LoRA / full", ratios(small, whole), at_most=0.75 if "2" in title else None
        )
        print(f"  full / products      {ratio(whole, bare)}   target 1.35")
        print(f"  LoRA / full          {ratio(small, whole)}" + ("   target 0.75" if "2" in title else ""), flush=True)
        if "2" in title:
            measure_packing(samples, statistics.median(whole), repeats)
    measure_phases()


def ratio(numerators: list[float], denominators: list[float]) -> str:
    """Median and spread of the ratios of each round."""
    each = [a / b for a, b in zip(numerators, denominators)]
    return f"x{statistics.median(each):.2f}  ({min(each):.2f} to {max(each):.2f})"


def cpu_seconds(ways: dict, repeats: int) -> dict[str, list[float]]:
    """As `in_turns`, in seconds of processor time, which other work on the machine affects less. Use one thread."""
    for run in ways.values():
        run()
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def measure_packing(samples: list[BagelSample], step_seconds: float, repeats: int) -> None:
    """Time of packing a batch and of sampling its noise, as shares of the full step."""
    from echo4o.training.backbones.base import named_generator
    from echo4o.training.packing import best_fit

    def pack():
        lengths = [len(sample) for sample in samples] + list(range(500, 1500, 32))
        best_fit(lengths, 10_240, first=False)
        collate(samples, *SIDES)

    def sample_noise():
        """The random numbers of a precomputed row: latents of three images, and noise."""
        for sample in samples:
            for segment in sample.segments:
                if segment.kind in ("vae", "noise"):
                    torch.randn(segment.data.shape, generator=named_generator(0, sample.id, 0, segment.kind))

    times = cpu_seconds({"packing": pack, "noise of precomputed rows": sample_noise}, repeats)
    for name, seconds in times.items():
        share = statistics.median(seconds) / step_seconds
        limit = "   target 2%" if name == "packing" else ""
        print(f"  {name:<22} {1000 * statistics.median(seconds):6.2f} ms, {share:.3%} of a full step{limit}")


def measure_phases(rows: int = 96, steps: int = 10) -> None:
    """Shares of the phases of a step in runs of the real trainer on the quickstart's base; no row is used twice."""
    import tempfile
    from pathlib import Path

    from echo4o.training.recipe_files import load_recipe
    from echo4o.training.run_log import phase_shares
    from echo4o.training.train import Trainer

    base = Path(__file__).parents[1] / "echo4o" / "quickstart" / "base"
    print(f"phases of a step, on CPU: {steps} steps, no row used twice, images encoded during the run")
    with tempfile.TemporaryDirectory() as folder:
        data = small_rows(rows)
        for name in ("one after the other", "the next step read ahead"):
            changes = {"model": str(base), "data.path": "given", "output_dir": f"{folder}/{name}", "max_seconds": None}
            changes |= {"steps": steps, "batch_size": rows // steps, "optimizer.warmup_steps": 1}
            trainer = Trainer(load_recipe("quickstart_cpu", changes), dataset=data)
            if name == "one after the other":
                trainer.ahead.next_step = trainer.batches.next_step
            start = time.process_time()
            log = trainer.run().log
            shares = ", ".join(f"{phase} {share:.0%}" for phase, share in phase_shares(log, steps).items())
            seconds = log[-1]["seconds"], time.process_time() - start
            print(f"  {name:<26} {shares}; {seconds[0]:.1f} s, {seconds[1]:.1f} s of the processor", flush=True)


def small_rows(count: int):
    """Rows of the dataset with images of 64 pixels; a third of them has one reference, a third has two."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    from echo4o.dataset_scripts.features import features

    def noise_image(seed: int):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8))

    shared = {"task": "text_to_image", "category": "bench", "source": "bench", "metadata": None}
    rows = [
        {"id": f"row-{i}", "instruction": f"image number {i}", "image": noise_image(i)}
        | {"reference_images": [noise_image(1000 * (r + 1) + i) for r in range(i % 3)]}
        | shared
        for i in range(count)
    ]
    return Dataset.from_list(rows, features=features())


# --- models and samples ---------------------------------------------------------------------------------------------


class Models(nn.Module):
    """Transformer and vision model behind one forward pass."""

    def __init__(self, transformer: nn.Module, vision_model: nn.Module):
        super().__init__()
        self.transformer, self.vision_model = transformer, vision_model

    def forward(self, batch: BagelBatch):
        noised = add_noise(batch.sequence, batch.noise, batch.raw_time, 1.0)
        return bagel_losses(self.transformer, self.vision_model, batch.sequence, noised)


def model(method: str) -> Models:
    """Everything trains ("full"), or an adapter on the generation expert ("lora")."""
    transformer = BagelTransformer2DModel(
        hidden_size=512,
        intermediate_size=1536,
        num_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    vision = BagelVisionModel(
        hidden_size=256, intermediate_size=768, num_layers=4, num_attention_heads=8, output_size=512
    )
    models = Models(transformer, vision).train()
    if method == "lora":
        models.requires_grad_(False)
        add_lora(transformer, BagelLoraTuning(method="lora", rank=16, alpha=16), 0)
    return models


def text_to_image(text: int = 64, side: int = 12) -> BagelSample:
    """A sample of a text and an image of 192 x 192 pixels with the release's VAE."""
    return _sample([_text(text), _image("noise", side, CHANNELS)])


def with_references(count: int, text: int = 64, side: int = 12) -> BagelSample:
    """A sample with references, each as latents and as an image of 168 pixels for the vision model."""
    references = [s for _ in range(count) for s in (_image("vae", side, CHANNELS), _image("vit", 12, PIXELS))]
    return _sample([*references, _text(text), _image("noise", side, CHANNELS)])


def _text(length: int):
    return text_segment(torch.randint(5, VOCABULARY, (length,)).tolist(), TOKENS)


def _image(kind: str, side: int, values: int):
    return image_segment(kind, (side, side), TOKENS, torch.randn(side * side, values))


def _sample(segments) -> BagelSample:
    return BagelSample("sample", segments, torch.randn(segments[-1].data.shape), torch.randn(1))


def step(trained: Models, batch: BagelBatch) -> None:
    """Forward and backward pass."""
    for parameter in trained.parameters():
        parameter.grad = None
    trained(batch).mse.mean().backward()
