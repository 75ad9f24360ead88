"""Generates the images of a request and writes them with their metadata."""

import secrets
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo4o.cli.frame import say
from echo4o.cli.generate_options import LoadingOptions
from echo4o.cli.models import choose_device, require_options
from echo4o.common.files import write_bytes
from echo4o.common.image_metadata import ImageMetadata, pixels_sha256, to_png, versions
from echo4o.common.revisions import model_revision, public_name

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class GenerationRequest:
    """One call of the pipeline.

    Args:
        seeds: one per image.
        settings: further arguments of the pipeline.
        references: the decoded reference images.
        indices: numbers of the images to keep; None: all. The others are computed, because images of one call
            are computed together, and are not written.
    """

    prompt: str
    seeds: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    references: "tuple[Image, ...]" = ()
    indices: tuple[int, ...] | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(range(len(self.seeds))) if self.indices is None else self.indices


class ImageGenerator:
    """Loads a pipeline once, generates the images of requests, and writes them.

    Args:
        metadata: store in PNG files what the image was generated from.
    """

    def __init__(self, model: str, loading: LoadingOptions, metadata: bool = True):
        self.model, self.loading, self.metadata = model, loading, metadata
        self.adapters = loading.adapters()
        self.device = choose_device(loading.device)
        loading.check(self.device)

    def check(self, request: GenerationRequest) -> None:
        """Raise ValueError, naming the option, if the pipeline does not take an argument of the request."""
        images = {"image": request.references} if request.references else {}
        require_options(self.model, "__call__", request.settings | images)

    @cached_property
    def pipe(self) -> Any:
        from echo4o.cli.generate_loading import load_for_generation

        pipe = load_for_generation(self.model, self.device, self.loading, self.adapters)
        say(pipe.placement().line)
        return pipe

    def write(self, request: GenerationRequest, files: list[Path]) -> list[str]:
        """Generate the images of a request into files, one for each kept image; the model's texts, if it plans."""
        import torch

        arguments = dict(request.settings)
        if request.references:
            arguments["image"] = list(request.references)
        result = self.pipe(
            prompt=request.prompt,
            num_images_per_prompt=len(request.seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
            **arguments,
        )
        for file, index in zip(files, request.kept, strict=True):
            metadata = self.describe(request, index) if self.metadata else None
            save_image(result.images[index], file, metadata)
        return list(getattr(result, "texts", None) or [])

    def describe(self, request: GenerationRequest, index: int) -> ImageMetadata:
        """The metadata of one image of a request."""
        return ImageMetadata(
            prompt=request.prompt,
            seeds=request.seeds,
            index=index,
            settings=request.settings,
            references=tuple(map(pixels_sha256, request.references)),
            model=public_name(self.model),
            revision=self._revision,
            adapters=self._adapter_facts,
            loading=self.loading.description(self.device),
            versions=versions(),
        )

    @cached_property
    def _revision(self) -> str:
        return model_revision(self.model, None if Path(self.model).exists() else self.pipe)

    @cached_property
    def _adapter_facts(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"name": public_name(each.place), "scale": each.scale, "revision": model_revision(each.place)}
            for each in self.adapters
        )


def save_image(image: "Image", file: Path, metadata: ImageMetadata | None) -> None:
    """Write an image in the format of the file's suffix; only PNG files store metadata."""
    if file.suffix.lower() == ".png":
        write_bytes(file, to_png(image, metadata))
    else:
        image.save(file)


def random_seed() -> int:
    return secrets.randbelow(2**31)


def output_files(out: Path, count: int) -> list[Path]:
    """The files for ``count`` images: ``out``, or ``out`` numbered from 1 if there are several."""
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"--out {out}: not an image file; use one of {', '.join(IMAGE_SUFFIXES)}")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; pass a file")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]


def require_writable(files: list[Path]) -> None:
    """Create the folder of the files. Raises ValueError if they cannot be written, before the model is loaded."""
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for file in files:
            if file.exists():
                open(file, "r+b").close()
    except OSError as error:
        raise ValueError(f"--out {files[0]}: cannot be written ({error.filename}: {error.strerror})") from error
