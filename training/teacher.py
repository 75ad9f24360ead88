"""Trajectories of a guided sampler, from which few-step adapters are trained (training/distillation.py).

    echo4o dataset precompute DATASET --model PIPELINE --out DIR --teacher --updates 48 --segments 8

For every prompt, the pipeline generates an image with its guidance. The latents before, between and after equal numbers
of updates are stored, together with the encoded prompt and references, so that training encodes nothing. A trajectory
of 8 segments trains adapters of 8, 4, 2 and 1 updates.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from echo4o.common.configuration import StrictModel
from echo4o.modeling.common.weights import component_tensors
from echo4o.training.backbones.base import Backbone, PreparedRow, named_generator
from echo4o.training.model import base_folder

SAMPLE_BYTES = 4096  # read at the start and at the end of every stored tensor, for the fingerprint
# Options of a pipeline's call that decide how images are guided.
GUIDANCE_OPTIONS = (
    "guidance_scale",
    "image_guidance_scale",
    "guidance_interval",
    "guidance_range",
    "guidance_renorm",
    "guidance_renorm_min",
)


class TeacherSettings(StrictModel):
    """How the teacher generates.

    Args:
        updates: of the sampler; a multiple of `segments`.
        segments: parts of a trajectory whose ends are stored.
        images_per_prompt: trajectories of each row, from different noise.
        batch_size: prompts per call of the pipeline. The last bits of the latents depend on it.
        height, width: pixels; None: the pipeline's default.
        guidance: options of the pipeline's call; None: the checkpoint's presets.
    """

    updates: int = Field(default=48, gt=0)
    segments: int = Field(default=8, gt=0)
    images_per_prompt: int = Field(default=1, gt=0)
    batch_size: int = Field(default=8, gt=0)
    height: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    guidance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self):
        if self.updates % self.segments:
            raise ValueError(f"updates={self.updates} must be a multiple of segments={self.segments}.")
        if unknown := sorted(self.guidance.keys() - set(GUIDANCE_OPTIONS)):
            raise ValueError(f"{unknown[0]} is not a guidance option; there are: {', '.join(GUIDANCE_OPTIONS)}.")
        return self


@dataclass(frozen=True)
class Trajectories:
    """A row with its trajectories.

    Args:
        conditions: the prepared row without a target.
        latents: (images, segments + 1, C, h, w) float32, from noise to the image.
        times: amounts of noise of the `segments` + 1 latents, from 1 to 0.
    """

    id: str
    conditions: PreparedRow
    latents: torch.Tensor
    times: list[float]
    instruction: str

    @property
    def nbytes(self) -> int:
        return self.conditions.nbytes + self.latents.nbytes

    def to_cache(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors, facts = self.conditions.to_cache()
        stored = {f"conditions.{name}": tensor for name, tensor in tensors.items()} | {"latents": self.latents}
        return stored, {"conditions": facts, "times": self.times, "text": text_digest(self.instruction)}


def text_digest(text: str) -> str:
    """A hash of an instruction, by which a changed one is noticed."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def reference_generator(seed: int, row: str) -> torch.Generator:
    """The generator that samples the latents of a row's references, for the teacher and for the adapter."""
    return named_generator(seed, row, 0, "teacher references")


class Teacher:
    """Prepares rows by generating their images: what `precompute` stores instead of encoded images."""

    def __init__(self, backbone: Backbone, settings: TeacherSettings):
        self.backbone, self.settings, self.pipeline = backbone, settings, backbone.pipeline
        self.rows_at_once = settings.batch_size
        known = inspect.signature(type(self.pipeline).__call__).parameters
        if unknown := [name for name in settings.guidance if name not in known]:
            raise ValueError(f"{type(self.pipeline).__name__} does not take {unknown[0]}.")

    def encoder_settings(self) -> dict[str, Any]:
        """Everything that the stored tensors depend on, apart from the rows."""
        given = json.loads(self.settings.model_dump_json())
        presets = json.loads(json.dumps(self.pipeline.config.get("presets")))
        dtype = str(self.pipeline.transformer.dtype).removeprefix("torch.")
        fingerprint = teacher_fingerprint(self.backbone.recipe.model)
        sampling = {"sampling": given, "presets": presets, "dtype": dtype}
        return self.backbone.encoder_settings() | {"teacher": fingerprint} | sampling

    @torch.no_grad()
    def prepare(self, rows: Sequence[dict]) -> list[Trajectories]:
        """Generate the images of the rows in one call."""
        settings, backbone = self.settings, self.backbone
        conditions = [backbone.conditions(row) for row in rows]
        shapes = [backbone.latent_shape(row, settings.height, settings.width) for row in rows]
        noise = [
            torch.randn(shape, generator=named_generator(settings.seed, row["id"], copy, "teacher noise"))
            for row, shape in zip(rows, shapes, strict=True)
            for copy in range(settings.images_per_prompt)
        ]
        latents = self._generate(rows, noise)
        copies = settings.images_per_prompt
        return [
            Trajectories(
                id=row["id"],
                conditions=prepared,
                latents=torch.stack(latents[index * copies : (index + 1) * copies]),
                times=self._times(shape),
                instruction=row["instruction"],
            )
            for index, (row, prepared, shape) in enumerate(zip(rows, conditions, shapes, strict=True))
        ]

    def _times(self, shape: Sequence[int]) -> list[float]:
        stride = self.settings.updates // self.settings.segments
        return self.backbone.generation_times(self.settings.updates, shape)[::stride]

    def _generate(self, rows: Sequence[dict], noise: list[torch.Tensor]) -> list[torch.Tensor]:
        """The latents (segments + 1, C, h, w) of every image."""
        settings = self.settings
        stride = settings.updates // settings.segments
        kept = [list(noise)]

        def keep(pipeline, step: int, timestep, tensors: dict) -> dict:
            if (step + 1) % stride == 0:
                kept.append([latent.float().cpu().clone() for latent in tensors["latents"]])
            return {}

        references = [list(row["reference_images"] or []) for row in rows]
        images: dict[str, Any] = {"image": references} if any(references) else {}
        self.pipeline(
            prompt=[row["instruction"] for row in rows],
            **images,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.updates,
            num_images_per_prompt=settings.images_per_prompt,
            # The pipeline uses them for the latents of references alone, because the noise is given.
            generator=[
                reference_generator(settings.seed, row["id"])
                for row in rows
                for _ in range(settings.images_per_prompt)
            ],
            latents=noise,
            output_type="latent",
            callback_on_step_end=keep,
            **settings.guidance,
        )
        return [torch.stack(image) for image in zip(*kept, strict=True)]


def teacher_fingerprint(model: str) -> str:
    """A hash of a pipeline's stored weights and scheduler: names, shapes, and a sample of every tensor's bytes.

    Args:
        model: pipeline folder or Hub repository.
    """
    folder, digest = base_folder(model), hashlib.blake2b(digest_size=16)
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if place.name == "scheduler":
            digest.update((place / "scheduler_config.json").read_bytes())
        if any(place.glob("*.safetensors")):
            for name, tensor in sorted(component_tensors(place).items()):
                digest.update(f"{place.name}.{name} {tensor.dtype} {tensor.shape}\0".encode())
                digest.update(_sample(tensor.file, tensor.start, tensor.nbytes))
    return digest.hexdigest()


def _sample(file: Path, start: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(start)
        first = stream.read(min(size, SAMPLE_BYTES))
        stream.seek(start + max(0, size - SAMPLE_BYTES))
        return first + stream.read(min(size, SAMPLE_BYTES))
