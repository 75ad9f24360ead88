"""Generates images for the prompts of the quickstart and scores them by their pixels."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.accuracy import Accuracy, scores_by_tag
from echo4o.evaluation.benchmarks.shapes4o.grammar import ShapesPrompt
from echo4o.evaluation.benchmarks.shapes4o.rendering import render
from echo4o.evaluation.benchmarks.shapes4o.scene import lay_out_reference

STEPS = 24


@dataclass(frozen=True)
class GeneratedImages:
    """Prompts, their images, and the findings of the detector."""

    prompts: list[ShapesPrompt]
    images: list[Image.Image]
    reasons: list[list[str]]  # why an image is wrong; empty if it is correct
    scores: dict[str, Accuracy]  # by tag, and "overall"


def reference_images_of(prompt: ShapesPrompt) -> list[Image.Image]:
    """Renders the reference images of a prompt."""
    return [render(lay_out_reference(group)) for group in prompt.references]


def generate_images(
    pipeline, prompts: Sequence[ShapesPrompt], seed: int, steps: int | None = STEPS, **options
) -> list[Image.Image]:
    """Generates one image per prompt in one batch; each image has its own generator, seeded by its position.

    `steps=None` is the default of the pipeline, or the preset of an active adapter.
    """
    return pipeline(
        [prompt.text for prompt in prompts],
        image=[reference_images_of(prompt) or None for prompt in prompts],
        generator=[torch.Generator().manual_seed(seed * 1000 + i) for i in range(len(prompts))],
        num_inference_steps=steps,
        **options,
    ).images


def generate_and_score(
    pipeline, prompts: Sequence[ShapesPrompt], seed: int, steps: int = STEPS, out: Path | None = None, **options
) -> GeneratedImages:
    """Generates images and scores them with `echo4o.evaluation`.

    An image is correct if it shows exactly the objects of its prompt. `out` is the folder for images and records; None
    for a temporary one.
    """
    images = generate_images(pipeline, prompts, seed, steps, **options)
    reasons = judge(prompts, images, out)
    scores = scores_by_tag([prompt.tag for prompt in prompts], [not problems for problems in reasons])
    return GeneratedImages(list(prompts), images, reasons, scores)


def judge(prompts: Sequence[ShapesPrompt], images: Sequence[Image.Image], out: Path | None = None) -> list[list[str]]:
    """Returns the reasons why each image is wrong, from the judge `pixels`; empty if it is correct."""
    from echo4o.common.json_lines import JsonLines
    from echo4o.evaluation import evaluate_images
    from echo4o.evaluation.benchmarks.shapes4o.benchmark import rows_of
    from echo4o.evaluation.judging import JudgingOptions

    if out is None:
        with TemporaryDirectory() as folder:
            return judge(prompts, images, Path(folder))
    shutil.rmtree(out, ignore_errors=True)
    named = {str(number): image for number, image in enumerate(images, start=1)}
    evaluate_images("shapes4o", named, "pixels", out, rows=rows_of(prompts), options=JudgingOptions(probe=False))
    records = {record["id"]: record for record in JsonLines(out / "records.jsonl")}
    ordered = [records[name] for name in named]
    return [[] if record["scores"]["correct"] else record["reason"].split("; ") for record in ordered]
