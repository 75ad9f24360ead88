"""Generates images with a saved pipeline in a separate process, which shows that the folder is complete.

`python -m echo4o.quickstart.regenerate FOLDER REQUEST.json OUT_DIR`; the request lists held-out prompts by index.
"""

import json
import sys
from pathlib import Path


def main(folder: str, request_file: str, out_dir: str) -> None:
    """Writes `0.png`, `1.png`, ... for the prompts of the request."""
    import torch

    from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts
    from echo4o.modeling.pipelines import pipeline_class
    from echo4o.quickstart.generation import generate_images

    request = json.loads(Path(request_file).read_text("utf-8"))
    torch.set_num_threads(request["threads"])
    pipeline = pipeline_class(folder).from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    held_out = held_out_prompts()
    prompts = [held_out[index] for index in request["prompts"]]
    for index, image in enumerate(generate_images(pipeline, prompts, request["seed"], request["steps"])):
        image.save(Path(out_dir) / f"{index}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
