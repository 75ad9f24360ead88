"""What the engine watches inside a call of the pipeline: progress, previews, tokens, and whether anybody still waits."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from echo4o.serving.tasks import ChatTask, ImageTask, Progress, Text


class Cancelled(Exception):
    """Raised inside a pipeline call when nobody waits for its results."""


class StepWatcher:
    """Called after each sampler update: reports progress, makes previews, and stops when every task was cancelled."""

    def __init__(self, pipe: Any, tasks: Sequence[ImageTask], started: float):
        self.tasks, self.started, self.before = tasks, started, None
        self.previews = any(task.previews for task in tasks) and hasattr(pipe, "decode_latent")

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if all(task.stop.is_set() for task in self.tasks):
            raise Cancelled
        total = pipe.num_timesteps
        left = (time.monotonic() - self.started) / (step + 1) * (total - step - 1)
        latents = given.get("latents")
        for index, task in enumerate(self.tasks):
            preview = None
            due = step + 1 in preview_steps(total, task.previews) and not task.stop.is_set()
            if due and latents is not None and self.before is not None:
                preview = _preview(pipe, self.before[index], latents[index], step)
            task.notify(Progress(step + 1, total, left, preview))
        self.before = latents
        return {}


def preview_steps(total: int, number: int) -> set[int]:
    """The updates (from 1) after which previews are made: at most `number`, evenly spaced, none after the last.

    A preview needs two updates.
    """
    return {max(2, round(total * index / (number + 1))) for index in range(1, number + 1)} & set(range(2, total))


def _preview(pipe: Any, before: torch.Tensor, after: torch.Tensor, step: int) -> Image.Image:
    """The image at the end of a straight path from here: latents move with constant velocity in each Euler update."""
    start, end = (float(pipe.scheduler.sigmas[i]) for i in (step, step + 1))
    velocity = (after - before) / (end - start)
    pixels = pipe.decode_latent(after - end * velocity).float()
    values = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to(torch.uint8)
    return Image.fromarray(values.cpu().numpy())


class AnswerWatcher:
    """Called after each token of an answer: sends the text so far, and ends answers that nobody needs any longer."""

    def __init__(self, tokenizer: Any, tasks: Sequence[ChatTask]):
        self.tokenizer, self.tasks = tokenizer, tasks

    def __call__(self, index: int, token_ids: list[int]) -> bool:
        if all(task.stop.is_set() for task in self.tasks):
            raise Cancelled
        task = self.tasks[index]
        text = self.tokenizer.decode(token_ids)
        kept = before_stop(text, task.stops)
        ends = kept != text
        if not ends:
            kept = kept[: len(kept) - _held_back(kept, task.stops)]
        task.notify(Text(kept))
        return ends or task.stop.is_set()


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Number of letters at the end that may still change: a half character, or the beginning of a stop."""
    if text.endswith("\ufffd"):
        return 1
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]
