"""Draws some prompts with a saved pipeline, in a process of its own: proves that the folder holds all that is needed.

`python -m echo4o.quickstart.regenerate FOLDER REQUEST.json OUT_DIR`, where the request lists the held-out prompts by index.
"""

import json
import sys
from pathlib import Path


def main(folder: str, request_file: str, out_dir: str) -> None:
    """Write `0.png`, `1.png`, ... for the request's prompts."""
    import torch

    from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
    from echo4o.quickstart.generation import generate_images

    request = json.loads(Path(request_file).read_text("utf-8"))
    torch.set_num_threads(request["threads"])
    pipeline = Echo4oPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    every = held_out_prompts()
    prompts = [every[index] for index in request["prompts"]]
    for index, picture in enumerate(generate_images(pipeline, prompts, request["seed"], request["steps"])):
        picture.save(Path(out_dir) / f"{index}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
