"""Draws the quickstart's prompts with a pipeline and scores the pictures by their pixels."""

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
    """Prompts, their pictures, and what the detector says of each."""

    prompts: list[ShapesPrompt]
    pictures: list[Image.Image]
    reasons: list[list[str]]  # why a picture is wrong; empty where it is right
    scores: dict[str, Accuracy]  # by tag, and "overall"


def reference_images_of(prompt: ShapesPrompt) -> list[Image.Image]:
    """What is shown beside a prompt."""
    return [render(lay_out_reference(group)) for group in prompt.references]


def generate_images(
    pipeline, prompts: Sequence[ShapesPrompt], seed: int, steps: int = STEPS, **options
) -> list[Image.Image]:
    """One picture per prompt in one batched call; picture i has a generator of its own, so order does not matter."""
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
    """Draw the prompts and check each picture strictly: exactly the asked objects, nothing else.

    Scored as every model is, by `echo4o.evaluation`; `out`: the folder for its pictures, records and report.
    """
    pictures = generate_images(pipeline, prompts, seed, steps, **options)
    reasons = judge(prompts, pictures, out)
    scores = scores_by_tag([prompt.tag for prompt in prompts], [not why for why in reasons])
    return GeneratedImages(list(prompts), pictures, reasons, scores)


def judge(
    prompts: Sequence[ShapesPrompt], pictures: Sequence[Image.Image], out: Path | None = None
) -> list[list[str]]:
    """Why each picture is wrong, in the words of the judge `pixels`; empty where it is right."""
    from echo4o.common.json_lines import JsonLines
    from echo4o.evaluation import evaluate_images
    from echo4o.evaluation.benchmarks.shapes4o.benchmark import rows_of
    from echo4o.evaluation.judging import JudgingOptions

    if out is None:
        with TemporaryDirectory() as folder:
            return judge(prompts, pictures, Path(folder))
    shutil.rmtree(out, ignore_errors=True)
    named = {str(number): picture for number, picture in enumerate(pictures, start=1)}
    evaluate_images("shapes4o", named, "pixels", out, rows=rows_of(prompts), options=JudgingOptions(probe=False))
    records = {record["id"]: record for record in JsonLines(out / "records.jsonl")}
    found = [records[name] for name in named]
    return [[] if of["scores"]["correct"] else of["reason"].split("; ") for of in found]
