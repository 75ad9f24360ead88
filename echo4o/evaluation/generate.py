"""Step 1: generates the images, divided among processes and nodes by Accelerate; each image has its own seed."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from echo4o.common.files import read_json, write_bytes, write_json
from echo4o.common.image_metadata import ImageMetadata, pixels_sha256, to_png, versions
from echo4o.common.locks import FolderLock
from echo4o.common.revisions import model_revision, public_name
from echo4o.evaluation.benchmarks.base import BenchmarkPrompt
from echo4o.evaluation.folder import GENERATION, IMAGES
from echo4o.evaluation.images import image_name, why_unreadable


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of the generation; None stands for the preset of the model.

    Args:
        batch_size: prompts per call of the pipeline. Batches are formed before they are divided among processes, so the
            images depend on it (in their last bits), but not on the number of processes.
    """

    model: str
    seed: int = 0
    per_prompt: int = 1
    batch_size: int = 1
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    height: int | None = None
    width: int | None = None
    think: bool = False
    adapter: str | None = None
    requested_dtype: str = "auto"


def image_seed(seed: int, prompt_id: str, number: int) -> int:
    """Returns the seed of an image, from the seed of the run, the id of the prompt and the number of the image."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}/{number}".encode()).digest()[:7])


def world(cpu: bool = False):
    """Returns the state of Accelerate. Processes that finish early wait for the others for up to a week."""
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=timedelta(days=7)) if _launched() else PartialState(cpu=cpu)


def _launched() -> bool:
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def generate_images(
    prompts: Sequence[BenchmarkPrompt],
    settings: GenerationSettings,
    out: Path,
    load_pipeline: Callable[[], Any],
    state=None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Generates the images that `out/images` does not have yet; returns the number that this process generated.

    Args:
        load_pipeline: called once, and only if images are missing.
        state: the `PartialState` of Accelerate; None creates one.
        on_progress: called after each image with the number of images done and in total, of this process.

    Raises:
        ValueError: `out` has images that were generated with other settings, or is in use by another process.
    """
    state = state or world()
    folder = out / IMAGES
    with FolderLock(out) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _require_same_settings(out, settings, prompts)
            folder.mkdir(parents=True, exist_ok=True)
        state.wait_for_everyone()
        size = settings.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        mine = batches[state.process_index :: state.num_processes]
        open_batches = [batch for batch in mine if any(_missing(folder, settings, batch))]
        total, generated = sum(len(batch) for batch in open_batches) * settings.per_prompt, 0
        pipe = load_pipeline() if open_batches else None
        for batch in open_batches:
            metadata = _metadata(pipe, folder, settings, batch)
            for path, image in zip(_paths(folder, settings, batch), _generate(pipe, settings, batch), strict=True):
                if path in _missing(folder, settings, batch):
                    write_bytes(path, to_png(image, metadata[path]))
                generated += 1
                on_progress(generated, total)
        if pipe is not None and state.is_main_process:
            write_json(out / GENERATION, _description(settings, prompts) | describe_model(pipe, settings))
        state.wait_for_everyone()
    return generated


def _paths(folder: Path, settings: GenerationSettings, batch: Sequence[BenchmarkPrompt]) -> list[Path]:
    return [
        folder / f"{image_name(prompt.id, number, settings.per_prompt)}.png"
        for prompt in batch
        for number in range(1, settings.per_prompt + 1)
    ]


def _metadata(
    pipe, folder: Path, settings: GenerationSettings, batch: Sequence[BenchmarkPrompt]
) -> dict[Path, ImageMetadata]:
    """What each image of a batch is generated from, by its file."""
    common = {
        "settings": _sampling(settings) | ({"think": True} if settings.think else {}),
        "model": public_name(settings.model),
        "revision": model_revision(settings.model, pipe),
        "adapters": _adapters(settings),
        "loading": {"dtype": settings.requested_dtype},
        "versions": versions(),
    }
    described = {}
    for prompt in batch:
        numbers = range(1, settings.per_prompt + 1)
        seeds = tuple(image_seed(settings.seed, prompt.id, number) for number in numbers)
        references = tuple(map(pixels_sha256, _open(prompt.references)))
        for index, path in enumerate(_paths(folder, settings, [prompt])):
            described[path] = ImageMetadata(prompt.text, seeds, index, references=references, **common)
    return described


def _adapters(settings: GenerationSettings) -> tuple[dict[str, Any], ...]:
    if not settings.adapter:
        return ()
    revision = model_revision(settings.adapter)
    return ({"name": public_name(settings.adapter), "scale": 1.0, "revision": revision},)


def _missing(folder: Path, settings: GenerationSettings, batch: Sequence[BenchmarkPrompt]) -> list[Path]:
    return [path for path in _paths(folder, settings, batch) if not path.is_file() or why_unreadable(path)]


def _generate(pipe, settings: GenerationSettings, batch: Sequence[BenchmarkPrompt]) -> list:
    import torch

    from echo4o.modeling.pipelines import require_supported

    generators = [
        torch.Generator().manual_seed(image_seed(settings.seed, prompt.id, number))
        for prompt in batch
        for number in range(1, settings.per_prompt + 1)
    ]
    references = [_open(prompt.references) for prompt in batch]
    if any(references):
        require_supported(type(pipe), {"reference images": "image"})
    result = pipe(
        prompt=[prompt.text for prompt in batch],
        **({"image": references} if any(references) else {}),
        num_images_per_prompt=settings.per_prompt,
        generator=generators,
        **({"think": True} if settings.think else {}),
        **_sampling(settings),
    )
    return result.images


def _sampling(settings: GenerationSettings) -> dict[str, Any]:
    """The settings that were given, as arguments of the pipeline."""
    arguments = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "image_guidance_scale": settings.image_guidance,
        "height": settings.height,
        "width": settings.width,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _open(paths: Sequence[Path]) -> list:
    from echo4o.modeling.common.image_files import open_image

    return [open_image(path, str(path)) for path in paths]


def _description(settings: GenerationSettings, prompts: Sequence[BenchmarkPrompt]) -> dict[str, Any]:
    texts = "\n".join(f"{prompt.id} {prompt.text}" for prompt in prompts)
    return asdict(settings) | {"prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()}


def _require_same_settings(out: Path, settings: GenerationSettings, prompts: Sequence[BenchmarkPrompt]) -> None:
    known, wanted = read_json(out / GENERATION), _description(settings, prompts)
    if known is not None:
        for name, value in wanted.items():
            # "asked" holds the settings of the user if the description holds the resolved ones.
            before = known.get("asked", {}).get(name, known.get(name))
            if before != value:
                raise ValueError(
                    f"{out} has images that were generated with {name} {before!r}, not {value!r}: use another --out"
                )
        return
    write_json(out / GENERATION, wanted)


def describe_model(pipe, settings: GenerationSettings) -> dict[str, Any]:
    """Returns the properties of the loaded model that images depend on: revision, dtype and used presets."""
    presets = dict(pipe.config.get("presets") or {})
    few_steps = getattr(pipe, "sampling_preset", None)
    steps = _default_steps(pipe)
    if few_steps is not None:  # an active adapter's preset takes the place of the checkpoint's
        presets = {task: preset | few_steps.to_json() for task, preset in presets.items()}
        steps = few_steps.num_inference_steps
    guidance = settings.guidance if settings.guidance is not None else _of_presets(presets, "guidance_scale")
    image = settings.image_guidance
    return {
        "asked": {name: getattr(settings, name) for name in ("steps", "guidance", "image_guidance")},
        "model_revision": model_revision(settings.model, pipe),
        "adapter_revision": model_revision(settings.adapter) if settings.adapter else None,
        "dtype": str(getattr(pipe, "dtype", None)).removeprefix("torch."),
        "steps": settings.steps if settings.steps is not None else steps,
        "guidance": guidance,
        "image_guidance": image if image is not None else _of_presets(presets, "image_guidance_scale"),
    }


def _of_presets(presets: dict, name: str) -> dict[str, float] | None:
    return {task: preset[name] for task, preset in presets.items() if name in preset} or None


def _default_steps(pipe) -> int | None:
    import inspect

    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter else None
