"""Draws the quickstart's prompts with a pipeline and scores the pictures by their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from echo4o.quickstart.detector import Score, check, detect, scores_by_tag
from echo4o.quickstart.prompts import Prompt
from echo4o.quickstart.scene import lay_out_reference
from echo4o.quickstart.shapes import draw

STEPS = 24


@dataclass(frozen=True)
class Drawn:
    """Prompts, their pictures, and what the detector says of each."""

    prompts: list[Prompt]
    pictures: list[Image.Image]
    reasons: list[list[str]]  # why a picture is wrong; empty where it is right
    scores: dict[str, Score]  # by tag, and "overall"


def reference_pictures(prompt: Prompt) -> list[Image.Image]:
    """What is shown beside a prompt."""
    return [draw(lay_out_reference(group)) for group in prompt.references]


def draw_prompts(pipeline, prompts: Sequence[Prompt], seed: int, steps: int = STEPS, **options) -> list[Image.Image]:
    """One picture per prompt in one batched call; picture i has a generator of its own, so order does not matter."""
    return pipeline(
        [prompt.text for prompt in prompts],
        image=[reference_pictures(prompt) or None for prompt in prompts],
        generator=[torch.Generator().manual_seed(seed * 1000 + i) for i in range(len(prompts))],
        num_inference_steps=steps,
        **options,
    ).images


def draw_and_score(pipeline, prompts: Sequence[Prompt], seed: int, steps: int = STEPS, **options) -> Drawn:
    """Draw the prompts and check each picture strictly: exactly the asked objects, nothing else."""
    pictures = draw_prompts(pipeline, prompts, seed, steps, **options)
    reasons = [check(prompt.groups, detect(picture))[1] for prompt, picture in zip(prompts, pictures)]
    scores = scores_by_tag([prompt.tag for prompt in prompts], [not why for why in reasons])
    return Drawn(list(prompts), pictures, reasons, scores)
