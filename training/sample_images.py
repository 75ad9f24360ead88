"""Images that a run generates: fixed prompts, with or without references, and validation rows beside their targets.

    images/step-00000500/0.png   one image per prompt, then one per row
    images/inputs.json           text, files of references and target of each, in the same order

Each image is generated alone, so it is the same for any number of processes. Processes share the images; the processes
of a sharded model generate all of them together, because each of them holds a part of every layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch.distributed.fsdp import FSDPModule

from echo4o.common import files
from echo4o.common.image_metadata import ImageMetadata, pixels_sha256, to_png, versions
from echo4o.common.revisions import public_name
from echo4o.modeling.common.image_files import open_image, to_rgb
from echo4o.training.engine import reshard
from echo4o.training.export import few_step_preset
from echo4o.training.held_out import ValidationRows
from echo4o.training.recipe import RecipeError, TrainingRecipe
from echo4o.training.row_images import decoded

FOLDER, INPUTS = "images", "inputs.json"


@dataclass(frozen=True)
class SampleImageRequest:
    """One image to generate at every turn."""

    text: str
    references: list[Image.Image]
    seed: int
    target: Image.Image | None = None


class SampleImages:
    """Generates and saves the images of a run.

    Args:
        rows: of the validation; the first ones with a target are generated as well.

    Raises:
        RecipeError: a reference cannot be read, or the pipeline takes no references.
    """

    def __init__(self, recipe: TrainingRecipe, accelerator: Accelerator, pipeline: Any, rows: ValidationRows | None):
        assert recipe.images is not None
        self.settings, self.accelerator, self.pipeline = recipe.images, accelerator, pipeline
        self.folder = recipe.output_dir / FOLDER
        self.model, self.run = public_name(recipe.model), recipe.output_dir.name
        preset = few_step_preset(recipe)
        self.sampling: dict[str, Any] = {"num_inference_steps": recipe.images.steps}
        if preset is not None:
            self.sampling = preset.arguments(pipeline.scheduler)
        self._inputs_written = False
        self.requests = [*self._prompts(), *self._rows(rows)]
        if any(request.references for request in self.requests):
            if "image" not in inspect.signature(type(pipeline).__call__).parameters:
                raise RecipeError(f"images: a {type(pipeline).__name__} generates without references.")

    def _prompts(self) -> Iterator[SampleImageRequest]:
        for index, prompt in enumerate(self.settings.sample_prompts()):
            references = []
            for file in prompt.references:
                try:
                    references.append(to_rgb(open_image(file)))
                except (OSError, ValueError) as error:
                    raise RecipeError(f"images.prompts.{index}.references: {file} cannot be read: {error}") from error
            seed = self.settings.seed + index if prompt.seed is None else prompt.seed
            yield SampleImageRequest(prompt.prompt, references, seed)

    def _rows(self, rows: ValidationRows | None) -> Iterator[SampleImageRequest]:
        chosen = [ref for ref, task in zip(rows.refs, rows.tasks) if task != "answers"] if rows else []
        for index, ref in enumerate(chosen[: self.settings.validation_rows], len(self.settings.prompts)):
            assert rows is not None
            row = decoded(rows.sources[ref.source][ref.row])
            references = [to_rgb(image) for image in row["reference_images"] or []]
            target = None if row["image"] is None else to_rgb(row["image"])
            yield SampleImageRequest(row["instruction"], references, self.settings.seed + index, target)

    @torch.no_grad()
    def generate(self, model: torch.nn.Module, step: int) -> None:
        """Generate all images with the current weights, on all processes together.

        Args:
            model: holds the trained components in evaluation mode.
        """
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self._write_inputs()
        sharded = accelerator.distributed_type == DistributedType.FSDP
        self.pipeline.set_progress_bar_config(disable=True)
        with outermost_weights(model) if sharded else torch.no_grad(), accelerator.autocast():
            for index, request in enumerate(self.requests):
                mine = index % accelerator.num_processes == accelerator.process_index
                if mine or sharded:
                    image = self._generate(request)
                    if mine:
                        (folder / f"{index}.png").write_bytes(to_png(image, self._metadata(request, step)))
        accelerator.wait_for_everyone()
        self._track(folder, step)

    def _generate(self, request: SampleImageRequest) -> Image.Image:
        generator = torch.Generator().manual_seed(request.seed)
        inputs: dict[str, Any] = {"image": request.references} if request.references else {}
        return self.pipeline(request.text, **self.sampling, generator=generator, **inputs).images[0]

    def _metadata(self, request: SampleImageRequest, step: int) -> ImageMetadata:
        return ImageMetadata(
            request.text,
            (request.seed,),
            settings=self.sampling,
            references=tuple(pixels_sha256(image) for image in request.references),
            model=self.model,
            revision=f"{self.run}, step {step}",
            versions=versions(),
        )

    def _write_inputs(self) -> None:
        """Write references and targets once, for the report."""
        if self._inputs_written:
            return
        self._inputs_written = True
        entries = []
        for index, request in enumerate(self.requests):
            named = {f"{index}-reference-{n}.png": image for n, image in enumerate(request.references)}
            target = {} if request.target is None else {f"{index}-target.png": request.target}
            for name, image in (named | target).items():
                image.save(self.folder / name)
            entries.append({"text": request.text, "references": list(named), "target": next(iter(target), None)})
        files.write_json(self.folder / INPUTS, entries)

    def _track(self, folder: Path, step: int) -> None:
        """Log the images to the trackers; only the main process has any."""
        for tracker in self.accelerator.trackers:
            images = [Image.open(folder / f"{index}.png") for index in range(len(self.requests))]
            if tracker.name == "tensorboard":
                import numpy as np

                arrays = {f"images/{index}": np.asarray(image)[None] for index, image in enumerate(images)}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"images": images}, step=step)


@contextmanager
def outermost_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within the context, the weights outside the layers of a sharded model are gathered; layers gather themselves.

    FSDP2 gathers them in the forward pass of the whole model, and a pipeline calls its components instead.
    """
    assert isinstance(model, FSDPModule)
    model.unshard()
    try:
        yield
    finally:
        reshard(model)
