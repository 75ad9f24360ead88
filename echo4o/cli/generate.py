"""``echo4o generate`` and ``echo4o chat``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echo4o.cli.evaluate_options import spread
from echo4o.cli.frame import finish, say
from echo4o.cli.generate_images import GenerationRequest, ImageGenerator, output_files, random_seed, require_writable
from echo4o.cli.generate_options import Images, LoadingOptions, NumImages, OutputOptions, SamplingOptions, Seed
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


@spread
def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to generate, or how to edit the reference images.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A pipeline folder, an original checkpoint folder, or a Hub repository.",
            show_default=False,
        ),
    ] = None,
    image: Images = None,
    seed: Seed = None,
    num_images: NumImages = 1,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Generate the images of a file: one prompt per line, or JSON lines with their own settings. "
            "An interrupted run resumes.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Generate the image of this PNG file again, from the metadata in it. Other options replace its "
            "settings.",
            show_default=False,
        ),
    ] = None,
    sampling: SamplingOptions,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """Generate images from a prompt, or from a prompt and reference images.

    Example: [bold]echo4o generate "a lighthouse made of glass" --model DIR --out lighthouse.png[/bold]
    Editing: [bold]echo4o generate "make it night" --image lighthouse.png --model DIR --out night.png[/bold]
    Combining: [bold]echo4o generate "both on a table" -i cup.png -i lamp.png --model DIR --out both.png[/bold]
    Again: [bold]echo4o generate --like lighthouse.png --model DIR --out again.png[/bold]
    Many: [bold]echo4o generate --prompts prompts.txt --model DIR --out images[/bold]
    """
    if sum(source is not None for source in (prompt, prompts, like)) != 1:
        raise ValueError("give one of a prompt, --prompts FILE or --like IMAGE.png")
    if prompts is not None:
        from echo4o.cli.generate_prompts import generate_file

        if image:
            raise ValueError('--image cannot be combined with --prompts; write {"image": [...]} in the JSON lines')
        generate_file(prompts, require_model(model), seed or 0, num_images, sampling, output, loading)
        return
    if like is not None:
        from echo4o.cli.generate_like import generate_like

        generate_like(like, model, image, seed, sampling, output, loading)
        return
    assert prompt is not None
    check_prompt(prompt)
    files = output_files(output.out or Path("echo4o.png"), num_images)
    references = open_images(image)
    first = random_seed() if seed is None else seed
    request = GenerationRequest(
        prompt, tuple(range(first, first + num_images)), sampling.settings(), tuple(references)
    )
    model = require_model(model)
    generator = ImageGenerator(model, loading, metadata=not output.no_metadata)
    generator.check(request)
    require_writable(files)
    texts = generator.write(request, files)
    for text in dict.fromkeys(texts if sampling.think else []):
        print(text)
    if output.sheet:
        sheet = files[0].with_name(f"{files[0].stem}-sheet.png")
        write_sheet(files, [prompt] * len(files), sheet)
        files.append(sheet)
    say(f"seed {first}; the image{'s' if num_images > 1 else ''}:")
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
    options: dict[str, Any] = {"image": references or None, "think": think or None}
    options = {name: value for name, value in options.items() if value is not None}
    require_options(model, "chat", options)
    pipe = load_pipeline(model, where, dtype)
    answer = pipe.chat(prompt, max_new_tokens=max_new_tokens, **options)
    say("the answer:")
    print(answer)
    finish(None, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", model]))


def require_model(model: str | None) -> str:
    """The model of the command line. Raises ValueError if none was given or if it does not exist."""
    if model is None:
        raise ValueError("--model is missing: pass a pipeline folder, a checkpoint folder or a Hub repository")
    check_model(model)
    return model


def check_prompt(prompt: str) -> None:
    """Raises ValueError if the prompt has no text."""
    if not prompt.strip():
        raise ValueError("the prompt is empty: write what to generate or to answer")


def open_images(paths: "list[Path] | None") -> "list[Image]":
    """Decodes the reference images as people see them: upright, in RGB, on white where they are transparent."""
    if not paths:
        return []
    from PIL.Image import DecompressionBombError

    from echo4o.modeling.common.image_files import open_image

    images = []
    for path in paths:
        try:
            images.append(open_image(path, "it"))
        except ValueError as error:
            cause = error.__cause__
            is_known = cause is None or isinstance(cause, DecompressionBombError)
            reason = str(cause or error) if is_known else getattr(cause, "strerror", None)
            reason = reason or "it cannot be decoded as an image"
            raise ValueError(f"--image {path}: {reason}") from error
    return images


def write_sheet(files: list[Path], captions: list[str], sheet: Path) -> None:
    """Write a contact sheet of the images."""
    from echo4o.common.contact_sheet import contact_sheet
    from echo4o.modeling.common.image_files import open_image

    contact_sheet(list(zip(files, captions, strict=True)), open_image).save(sheet, "PNG")
