"""What quantization costs on the quickstart's task: `python -m benchmarks.quantized_quality MODEL`.

Generates the held-out prompts of the quickstart with a pipeline and with the same pipeline after `echo4o quantize`,
scores the images with the quickstart's detector, and prints a Markdown table with the sizes on the disk.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from echo4o.evaluation.benchmarks.shapes4o.grammar import ShapesPrompt
from echo4o.modeling.common.quantization import METHODS, quantize_pipeline
from echo4o.modeling.pipelines import pipeline_class
from echo4o.quickstart.generation import STEPS, GeneratedImages, generate_and_score


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Args:
        megabytes: of the transformer's weights on the disk.
        generated: the images and their scores.
    """

    name: str
    megabytes: float
    generated: GeneratedImages


def main(arguments: list[str] | None = None) -> None:
    from echo4o.quickstart.run import chosen_prompts

    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized_quality", description=__doc__)
    parser.add_argument("model", type=Path, help="a pipeline folder of the quickstart (its folder `pipeline`)")
    parser.add_argument("--method", choices=sorted(METHODS), default="int8")
    parser.add_argument("--prompts-per-tag", type=int, default=10, help="10 gives the quickstart's 90 prompts")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates per image")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    prompts = chosen_prompts(options.prompts_per_tag)
    try:
        rows = measure(options.model, options.method, prompts, options.seed, options.steps)
    except (ValueError, FileNotFoundError) as error:  # no such folder, or a package that the method needs
        parser.error(str(error))
    print(f"{options.model}: {len(prompts)} held-out prompts, {options.steps} updates, seed {options.seed}\n")
    print(table(rows))


def measure(model: Path, method: str, prompts: list[ShapesPrompt], seed: int, steps: int) -> list[Measured]:
    """The pipeline in float32, as it is stored, and quantized; all with the same seeds."""
    cls = pipeline_class(model)
    with tempfile.TemporaryDirectory() as work:
        quantized = Path(work) / method
        quantize_pipeline(cls, str(model), quantized, METHODS[method])
        loads = {
            "float32": (model, {"dtype": torch.float32}),
            "as stored": (model, {}),
            method: (quantized, {}),
        }
        rows = []
        for name, (folder, loading) in loads.items():
            pipe = cls.from_pretrained(folder, **loading)
            pipe.set_progress_bar_config(desc=name, leave=False)
            megabytes = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")) / 1e6
            rows.append(Measured(name, megabytes, generate_and_score(pipe, prompts, seed, steps)))
    return rows


def table(rows: list[Measured]) -> str:
    """A Markdown table of sizes, scores, and differences from the pipeline as it is stored."""
    lines = [
        "| weights | transformer on disk | correct images | mean difference of a pixel |",
        "|---|---|---|---|",
    ]
    stored = rows[1].generated
    for row in rows:
        score = row.generated.scores["overall"]
        pairs = zip(row.generated.images, stored.images, strict=True)
        difference = np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs])
        lines.append(f"| {row.name} | {row.megabytes:.2f} MB | {score} | {difference:.2f} of 255 |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
