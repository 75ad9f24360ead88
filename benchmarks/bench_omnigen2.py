"""Times an update and a training step of OmniGen2, compared with their own matrix products, and counts padding.

A middle size: width 480, 8 layers and 2 refiner layers, 256 target tokens, a reference of 256 tokens, texts of 64 and
40 tokens. On the CPU, times are seconds of processor time on one thread.
"""

from argparse import Namespace

import torch

from benchmarks.bench_training import cpu_seconds
from benchmarks.measure import in_turns, ratios, record, replay, table, threads
from echo4o.modeling.omnigen2.transformer_omnigen2 import OmniGen2Transformer2DModel, Reference, Row
from echo4o.training.model import add_lora

SIDE, TEXT, NEGATIVE = 32, 64, 40  # latent pixels; tokens
UPDATE_TARGET, STEP_TARGET = 1.15, 1.35


def main(options: Namespace) -> None:
    """Print one table per number of branches, then training, then packing."""
    torch.manual_seed(0)
    with threads(1 if options.device == "cpu" else torch.get_num_threads()):
        model = middle_model().to(options.device)
        for branches in (1, 2, 3):
            measure_update(model.eval(), branches, options)
        for title, references in (("text to image", 0), ("one reference", 1)):
            measure_training(title, references, options)
    print(f"packing: {padding_share():.1%} of the tokens of a padded batch would be padding; packed: 0%")


def middle_model() -> OmniGen2Transformer2DModel:
    return OmniGen2Transformer2DModel(
        hidden_size=480, num_layers=8, num_attention_heads=4, num_kv_heads=2, text_feat_dim=512
    )


def in_rounds(ways: dict, options: Namespace) -> dict[str, list[float]]:
    return (in_turns if options.device != "cpu" else cpu_seconds)(ways, options.repeats)


@torch.no_grad()
def measure_update(model: OmniGen2Transformer2DModel, branches: int, options: Namespace) -> None:
    """The branches of one image: the prompt; the negative prompt with the reference; it without."""
    device = options.device
    texts = [torch.randn(n, 512, device=device) for n in (TEXT, NEGATIVE)]
    latent = torch.randn(16, SIDE, SIDE, device=device)
    references = [Reference(latent, 0, 0)]
    rows = {1: [Row(0, (0,), 0)], 2: [Row(0, (0,), 0), Row(1, (), 0)]}.get(
        branches, [Row(0, (0,), 0), Row(1, (0,), 0), Row(1, (), 0)]
    )
    condition = model.prepare(texts, references, [(SIDE, SIDE)], rows)
    time = torch.tensor([0.3], device=device)

    def update():
        return model([latent], time, condition=condition)

    products = record(update, model)
    times = in_rounds({"its matrix products": lambda: replay(products), "an update": update}, options)
    print(table(f"{branches} branches, {sum(condition.layout.row_lengths)} tokens", times), flush=True)
    products_seconds, update_seconds = times.values()
    options.results.add(
        f"OmniGen2, {branches} branches: update / products",
        ratios(update_seconds, products_seconds),
        at_most=UPDATE_TARGET,
    )


def measure_training(title: str, references: int, options: Namespace) -> None:
    """Forward and backward pass of two samples, full and LoRA."""
    from echo4o.training.backbones.omnigen2_recipe import OmniGen2LoraTuning

    device = options.device
    given = {
        "hidden_states": [torch.randn(16, SIDE, SIDE, device=device) for _ in range(2)],
        "timestep": torch.tensor([0.2, 0.7], device=device),
        "encoder_hidden_states": [torch.randn(n, 512, device=device) for n in (TEXT, NEGATIVE)],
        "ref_image_hidden_states": [[torch.randn(16, SIDE, SIDE, device=device)] * references for _ in range(2)],
    }
    full, lora = middle_model().to(device).train(), middle_model().to(device).train()
    lora.requires_grad_(False)
    add_lora(lora, OmniGen2LoraTuning(method="lora"), 0)

    def step(model):
        torch.stack(list(model(**given).sample)).square().mean().backward()
        model.zero_grad(set_to_none=True)

    products = record(lambda: step(full), full)
    ways = {
        "its matrix products": lambda: replay(products),
        "full: forward and backward": lambda: step(full),
        "LoRA on attention": lambda: step(lora),
    }
    times = in_rounds(ways, options)
    print(table(f"training, {title}", times), flush=True)
    products_seconds, full_seconds, lora_seconds = times.values()
    options.results.add(
        f"OmniGen2 training, {title}: full / products", ratios(full_seconds, products_seconds), at_most=STEP_TARGET
    )
    options.results.add(f"OmniGen2 training, {title}: LoRA / full", ratios(lora_seconds, full_seconds))


def padding_share(samples: int = 4000, batch: int = 2) -> float:
    """Share of padding in batches of two samples padded to the longest, for sizes and references as in Echo-4o-Image.

    A fifth of the samples have references, one to four of them; sides are from 512 to 1024 pixels.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    lengths = []
    for _ in range(samples):
        tokens = uniform(30, 200) + uniform(32, 64) * uniform(32, 64)
        if uniform(1, 5) == 1:
            count = uniform(1, 4)
            limit = (1048576, 1048576, 589824, 262144)[count - 1] // 256
            tokens += sum(min(limit, uniform(32, 64) * uniform(32, 64)) for _ in range(count))
        lengths.append(tokens)
    groups = [lengths[i : i + batch] for i in range(0, samples, batch)]
    return 1 - sum(lengths) / sum(max(group) * len(group) for group in groups)
