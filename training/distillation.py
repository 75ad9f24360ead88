"""Few-step adapters: a LoRA that makes the image of a guided sampler in K updates of one row each.

The teacher is the model itself with its guidance (text and image branches, interval, renormalization) and N updates.
For a given noise its sampler is a deterministic map, whose path is stored at the ends of S equal parts of the schedule
(training/teacher.py). The student is the same model with a LoRA adapter and without guidance. It has K updates, K a
divisor of S, at the teacher's own times t_0 = 1 > t_1 > ... > t_K = 0. At the start of each segment it learns the
velocity of the straight line to the segment's end:

    loss = | v_student(x_k, t_k) - (x_k - x_(k+1)) / (t_k - t_(k+1)) |^2,   x_k: the teacher's latent at t_k

One Euler update with that velocity covers the segment, guidance included. The method combines
- guidance distillation, a student without guidance that learns the guided prediction: Meng et al., "On Distillation of
  Guided Diffusion Models", 2023 (arXiv 2210.03142);
- straight lines within segments of the trajectory: Yan et al., "PeRFlow: Piecewise Rectified Flow as Universal
  Plug-and-Play Accelerator", 2024 (arXiv 2405.07510);
- one update for several of a deterministic sampler, regressed directly: Salimans and Ho, "Progressive Distillation for
  Fast Sampling of Diffusion Models", 2022 (arXiv 2202.00512).
K is fixed, so that only the K start times are ever evaluated and only these are trained.

The line through both ends of a segment, prolonged to t = 0 and t = 1, joins a virtual image and a virtual noise. A
point of a segment is therefore an ordinary flow-matching sample of a backbone, at a fixed time: this file needs no loss
of its own, and works for every backbone with [`Backbone.line_sample`].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from echo4o.training.backbones.base import Backbone, TrainingSample, named_generator
from echo4o.training.precompute import CacheError, LatentCache, digest_of, read_about, settings_of
from echo4o.training.recipe import TrainingRecipe, ValidationSettings
from echo4o.training.teacher import Trajectories, reference_generator, teacher_fingerprint, text_digest


class Line(NamedTuple):
    """The straight line through both ends of a segment."""

    image: torch.Tensor  # at t = 0
    noise: torch.Tensor  # at t = 1
    start: float  # time at which the segment starts


def segment_line(row: Trajectories, image: int, index: int, steps: int) -> Line:
    """The line of segment `index` of `steps`, of one of the row's trajectories."""
    stride = (len(row.times) - 1) // steps
    start, end = index * stride, (index + 1) * stride
    x, t = row.latents[image, start], row.times[start]
    velocity = (x - row.latents[image, end]) / (t - row.times[end])
    return Line(x - t * velocity, x + (1 - t) * velocity, t)


class DistilledRows:
    """Prepares rows from stored trajectories; a sample is the start of one segment.

    In every epoch a row gives one sample. `steps` epochs visit all segments of a trajectory.

    Raises:
        CacheError: the trajectories are incomplete, of another model, or have no segments for the recipe's steps.
    """

    def __init__(self, backbone: Backbone, recipe: TrainingRecipe):
        assert recipe.distill is not None
        self.backbone, self.steps, self.seed = backbone, recipe.distill.steps, recipe.seed
        self.folder = recipe.distill.teacher
        about = _about_trajectories(self.folder, recipe.model)
        self.cache = LatentCache(self.folder, settings_of(backbone))
        segments, self.teacher_seed = about["sampling"]["segments"], about["sampling"]["seed"]
        if segments % self.steps:
            possible = ", ".join(str(n) for n in range(segments, 0, -1) if segments % n == 0)
            raise CacheError(
                f"distill.steps={self.steps} does not divide the {segments} segments of {self.folder}: "
                f"choose one of {possible}."
            )

    def prepare(self, rows: Sequence[dict]) -> list[Trajectories]:
        """The stored rows. Raises CacheError for one that is not stored, or was another when it was."""
        return [self._prepare(row) for row in rows]

    def _prepare(self, row: dict) -> Trajectories:
        if row["id"] not in self.cache:
            raise CacheError(f"{self.folder} has no trajectory of it: run precompute --teacher on its data.")
        tensors, facts = self.cache.stored(row["id"])
        if text_digest(row["instruction"]) != facts["text"]:
            raise CacheError(f"it has another instruction than when {self.folder} was made.")
        images = row["reference_images"] or []
        if all(isinstance(image, dict) for image in images) and digest_of(row | {"image": None}) != facts["digest"]:
            raise CacheError(f"it has other references than when {self.folder} was made.")
        named = {name.removeprefix("conditions."): t for name, t in tensors.items() if name != "latents"}
        conditions = self.backbone.from_cache(row, named, facts["conditions"])
        return Trajectories(row["id"], conditions, tensors["latents"], facts["times"], row["instruction"])

    def sample(self, prepared: Trajectories, epoch: int) -> TrainingSample:
        """The next of the row's segments, from a start that its id names."""
        choices = len(prepared.latents) * self.steps
        first = int(torch.randint(choices, (), generator=named_generator(self.seed, prepared.id, 0, "segment")))
        image, index = divmod((first + epoch) % choices, self.steps)
        return self._start(prepared, image, index)

    def _start(self, prepared: Trajectories, image: int, index: int) -> TrainingSample:
        line = segment_line(prepared, image, index, self.steps)
        references = reference_generator(self.teacher_seed, prepared.id)
        return self.backbone.line_sample(prepared.conditions, line.image, line.noise, line.start, references)

    def noise_levels(self, settings: ValidationSettings) -> list[float]:
        """The starts of all updates, before the scheduler shifts them."""
        return [1 - index / self.steps for index in range(self.steps)]

    def validation_samples(self, prepared: Trajectories, times: Sequence[float]) -> list[Any]:
        """The starts of all segments of the row's first trajectory."""
        return [self._start(prepared, 0, index) for index in range(self.steps)]


def _about_trajectories(folder: Path, model: str) -> dict:
    """The description of a folder of trajectories. Raises CacheError if it holds something else or is of another model."""
    about = read_about(folder)
    if "teacher" not in about:
        raise CacheError(
            f"{folder} holds encoded images, not trajectories: make them with `echo4o dataset precompute --teacher`."
        )
    if about["teacher"] != (now := teacher_fingerprint(model)):
        raise CacheError(
            f"{folder} is stale: its trajectories are of a model with the fingerprint {about['teacher'][:12]}, and "
            f"{model} has {now[:12]}. Run `echo4o dataset precompute --teacher` with this model into another folder."
        )
    return about
