"""``echo4o generate`` and ``echo4o chat``."""

import secrets
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echo4o.cli.frame import finish, say
from echo4o.cli.models import (
    Device,
    Dtype,
    DtypeOption,
    Model,
    Think,
    check_model,
    choose_device,
    load_pipeline,
    require_options,
)

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SEED = 2**63 - 1


Prompt = Annotated[
    str, typer.Argument(help="What to generate, or how to edit the reference images.", show_default=False)
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="A reference image; repeat the option to pass several.", show_default=False),
]


def generate(
    prompt: Prompt,
    model: Model,
    image: Images = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write. An existing file is replaced.")] = Path(
        "echo4o.png"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Number of sampler updates.", show_default="49")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Strength of the prompt; 1 disables guidance.", show_default="the task's preset"),
    ] = None,
    image_guidance_scale: Annotated[
        float | None,
        typer.Option(help="Strength of the reference images; 1 disables it.", show_default="the task's preset"),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Height in pixels.", show_default="1024, or the last reference's")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Width in pixels.", show_default="1024, or the last reference's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_SEED, help="Seed of the first image; each further image adds 1.", show_default="random"
        ),
    ] = None,
    think: Think = False,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images to generate.")] = 1,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Generate an image from a prompt, or from a prompt and reference images.

    Example: [bold]echo4o generate "a lighthouse made of glass" --model DIR --out lighthouse.png[/bold]
    Editing: [bold]echo4o generate "make it night" --image lighthouse.png --model DIR --out night.png[/bold]
    Combining: [bold]echo4o generate "both on a table" -i cup.png -i lamp.png --model DIR --out both.png[/bold]
    """
    check_prompt(prompt)
    files = output_files(out, num_images)
    references = open_images(image)
    check_model(model)
    where = choose_device(device)
    require_writable(files)
    seed = secrets.randbelow(2**31) if seed is None else seed
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
        "height": height,
        "width": width,
        "think": think or None,
        "image": references or None,
    }

    require_options(model, "__call__", {name: value for name, value in options.items() if value is not None})

    import torch

    pipe = load_pipeline(model, where, dtype)
    say(pipe.placement().line)
    result = pipe(
        prompt=prompt,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(num_images)],
        **{name: value for name, value in options.items() if value is not None},
    )
    if think:
        for text in dict.fromkeys(result.texts or []):
            print(text)
    for file, result_image in zip(files, result.images, strict=True):
        result_image.save(file)
    say(f"seed {seed}; the image{'s' if num_images > 1 else ''}:")
    finish(files, shlex.join(["echo4o", "generate", "make it night", "--image", str(files[0]), "--model", model]))


def chat(
    prompt: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    model: Model,
    image: Images = None,
    think: Think = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer in tokens.")] = 512,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer a question, with or without images.

    Example: [bold]echo4o chat "What is in the image?" --image lighthouse.png --model DIR[/bold]
    """
    check_prompt(prompt)
    references = open_images(image)
    check_model(model)
    where = choose_device(device)
    options = {"image": references or None, "think": think or None}
    options = {name: value for name, value in options.items() if value is not None}
    require_options(model, "chat", options)
    pipe = load_pipeline(model, where, dtype)
    answer = pipe.chat(prompt, max_new_tokens=max_new_tokens, **options)
    say("the answer:")
    print(answer)
    finish(None, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", model]))


def check_prompt(prompt: str) -> None:
    """Raise an error if the prompt has no text."""
    if not prompt.strip():
        raise ValueError("the prompt is empty: write what to generate or to answer")


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


def open_images(paths: "list[Path] | None") -> "list[Image]":
    """Decode the reference images and apply their EXIF orientation."""
    if not paths:
        return []
    from PIL import Image, ImageOps

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError as error:
            raise ValueError(f"--image {path}: {error}") from error
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's decoders raise all of these for damaged files
            reason = getattr(error, "strerror", None) or "it cannot be decoded as an image"
            raise ValueError(f"--image {path}: {reason}") from error
    return images
