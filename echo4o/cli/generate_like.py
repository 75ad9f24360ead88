"""``echo4o generate --like IMAGE.png``: generates an image again from its metadata."""

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from echo4o.cli.frame import finish, say
from echo4o.cli.generate_images import GenerationRequest, ImageGenerator, output_files, require_writable
from echo4o.cli.generate_options import Cache, LoadingOptions, Offload, OutputOptions, Quantize, SamplingOptions
from echo4o.cli.models import Dtype
from echo4o.common.hub_names import is_repository_name
from echo4o.common.image_metadata import ImageMetadata, pixels_sha256, read_metadata

if TYPE_CHECKING:
    from PIL.Image import Image


def generate_like(
    like: Path,
    model: str | None,
    image: list[Path] | None,
    seed: int | None,
    sampling: SamplingOptions,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """Generate the image of a PNG file again; options that were given replace what the file says.

    Raises ValueError if the file has no metadata, or if its model, its adapters or its reference images are missing.
    """
    from echo4o.cli.generate import open_images, require_model

    metadata = read_metadata(like)
    model = require_model(model or _hub_model(metadata, like))
    references = open_images(image)
    _require_references(metadata, references, like)
    changed = sampling.settings()
    request = GenerationRequest(
        metadata.prompt,
        metadata.seeds if seed is None else (seed,),
        metadata.settings | changed,
        tuple(references),
        (metadata.index,) if seed is None else None,
    )
    generator = ImageGenerator(model, _loading(metadata, loading, like), metadata=not output.no_metadata)
    generator.check(request)
    files = output_files(output.out or like.with_stem(f"{like.stem}-again"), 1)
    require_writable(files)
    now = generator.describe(request, request.kept[0])
    if different := _differences(metadata, now):
        say(f"not the same as for {like}: {', '.join(different)}; the image may differ")
    generator.write(request, files)
    say(f"seed {now.seed}; the image:")
    finish(files, shlex.join(["echo4o", "generate", "make it night", "--image", str(files[0]), "--model", model]))


def _hub_model(metadata: ImageMetadata, like: Path) -> str:
    if is_repository_name(metadata.model):
        return metadata.model
    raise ValueError(f"{like} was generated with the folder {metadata.model!r}; pass where it is with --model")


def _require_references(metadata: ImageMetadata, references: "list[Image]", like: Path) -> None:
    wanted = metadata.references
    if len(references) != len(wanted):
        listed = ", ".join(sha256[:12] for sha256 in wanted)
        raise ValueError(
            f"{like} was generated from {len(wanted)} reference images, and {len(references)} are given; pass them in "
            f"the same order with --image{f' (SHA-256 of their pixels: {listed})' if wanted else ''}"
        )
    for number, (reference, sha256) in enumerate(zip(references, wanted, strict=True), start=1):
        if pixels_sha256(reference) != sha256:
            raise ValueError(f"--image number {number} is not the image that {like} was generated from")


def _loading(metadata: ImageMetadata, options: LoadingOptions, like: Path) -> LoadingOptions:
    """The options of the command line; those that were not given are as the metadata says."""
    known = metadata.loading
    kinds = {"dtype": Dtype, "offload": Offload, "quantize": Quantize, "cache": Cache}
    try:
        recorded = LoadingOptions(
            lora=[f"{adapter['name']}:{adapter['scale']}" for adapter in metadata.adapters] or None,
            compile=bool(known.get("compile")),
            **{name: kind(known[name]) for name, kind in kinds.items() if name in known},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{like}: its metadata describes a model that cannot be loaded ({error})") from error
    defaults = LoadingOptions()
    given = {
        field.name: getattr(options, field.name)
        for field in fields(LoadingOptions)
        if getattr(options, field.name) != getattr(defaults, field.name)
    }
    missing = [a["name"] for a in metadata.adapters if not (is_repository_name(a["name"]) or Path(a["name"]).exists())]
    if missing and not options.lora:
        raise ValueError(f"{like} was generated with the adapter {missing[0]!r}; pass where it is with --lora")
    return replace(recorded, **given)


def _differences(then: ImageMetadata, now: ImageMetadata) -> list[str]:
    """Names of what differs between two descriptions of an image, besides the settings of the command line."""
    names = [name for name in ("revision", "versions") if getattr(then, name) != getattr(now, name)]
    names += [name for name, value in now.loading.items() if then.loading.get(name, value) != value]
    if [a["revision"] for a in then.adapters] != [a["revision"] for a in now.adapters]:
        names.append("adapters")
    return names
