"""What it costs to draw: batches against single calls, shared prompts, guidance branches."""

from argparse import Namespace

import torch
from PIL import Image

from benchmarks.measure import in_turns, table

PROMPTS = ["a red circle", "two blue squares", "a fox made of clouds", "a lighthouse made of glass"]


def main(options: Namespace) -> None:
    """Print one table per question."""
    from echo4o import Echo4oPipeline

    is_original = Echo4oPipeline.is_original(options.model)
    load = Echo4oPipeline.from_original if is_original else Echo4oPipeline.from_pretrained
    pipe = load(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    count = len(PROMPTS)

    def draw(prompt, **arguments):
        pipe(prompt, num_inference_steps=options.steps, output_type="latent", **arguments)

    def report(title, ways):
        print(table(f"{title} ({options.steps} updates)", in_turns(ways, options.repeats)), flush=True)

    report(
        f"{count} prompts, a picture each",
        {"one call per prompt": lambda: [draw(p) for p in PROMPTS], "one batch": lambda: draw(PROMPTS)},
    )
    report(
        f"one prompt, {count} pictures",
        {
            "one call per picture": lambda: [draw(PROMPTS[0]) for _ in range(count)],
            "num_images_per_prompt": lambda: draw(PROMPTS[0], num_images_per_prompt=count),
        },
    )
    reference = Image.new("RGB", (128, 128), "orange")
    report(
        "one reference",
        {
            "no guidance": lambda: draw(PROMPTS[0], image=reference, guidance_scale=1.0, image_guidance_scale=1.0),
            "text guidance": lambda: draw(PROMPTS[0], image=reference, image_guidance_scale=1.0),
            "text and image guidance": lambda: draw(PROMPTS[0], image=reference),
        },
    )
    if torch.device(options.device).type == "cuda":
        print(f"peak CUDA memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
