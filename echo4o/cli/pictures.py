"""``echo4o generate`` and ``chat``: a pipeline from the command line."""

import secrets
import shlex
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echo4o.cli.frame import finish, say
from echo4o.common.hub_names import is_repository_name

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SEED = 2**63 - 1
# namespace/name, as the Hub allows them


class Dtype(StrEnum):
    """Floating point types that a model can be loaded in; ``auto`` is the stored one."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Prompt = Annotated[str, typer.Argument(help="What to draw, or how to change the pictures.", show_default=False)]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="A reference picture; repeat the option for several.", show_default=False),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A pipeline folder, an original checkpoint folder, or a Hub repository."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="The type to load the weights in.")]
Think = Annotated[bool, typer.Option("--think", help="Plan in words first.")]


def generate(
    prompt: Prompt,
    model: Model,
    image: Images = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write (an existing one is replaced).")] = Path(
        "echo4o.png"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the sampler.", show_default="49")] = None,
    guidance: Annotated[float | None, typer.Option(help="Text guidance.", show_default="the task's preset")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="Image guidance.", show_default="the task's preset")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Height in pixels.", show_default="1024, or the last reference's")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Width in pixels.", show_default="1024, or the last reference's")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the first picture.", show_default="a new one")
    ] = None,
    think: Think = False,
    num_images: Annotated[int, typer.Option(min=1, help="How many pictures to draw.")] = 1,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Draw a picture from a prompt, or from a prompt and reference pictures.

    Example: [bold]echo4o generate "a lighthouse made of glass" --model DIR --out lighthouse.png[/bold]
    Editing: [bold]echo4o generate "make it night" --image lighthouse.png --model DIR --out night.png[/bold]
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
        "guidance_scale": guidance,
        "image_guidance_scale": image_guidance,
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
    for file, picture in zip(files, result.images, strict=True):
        picture.save(file)
    say(f"seed {seed}; the picture{'s' if num_images > 1 else ''}:")
    finish(files, shlex.join(["echo4o", "generate", "make it night", "--image", str(files[0]), "--model", model]))


def chat(
    prompt: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    model: Model,
    image: Images = None,
    think: Think = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 512,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer a question, about pictures if some are given.

    Example: [bold]echo4o chat "What is in the picture?" --image lighthouse.png --model DIR[/bold]
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
    """Refuse a prompt without words."""
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what to draw or to answer")


def output_files(out: Path, count: int) -> list[Path]:
    """The files for ``count`` pictures: ``out`` itself, or ``out`` numbered from 1."""
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--out {out}: a picture file is needed, one of {', '.join(PICTURE_SUFFIXES)}")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder, a file is needed")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]


def require_writable(files: list[Path]) -> None:
    """Make the folder of the files; refuse a place that cannot be written before anything slow is done for it."""
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
    """Read and decode the reference pictures, turned as their EXIF orientation says."""
    if not paths:
        return []
    from PIL import Image, ImageOps

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(ImageOps.exif_transpose(picture))
        except Image.DecompressionBombError as error:
            raise ValueError(f"--image {path}: {error}") from error
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders make of damaged files
            reason = getattr(error, "strerror", None) or "this is no picture that can be decoded"
            raise ValueError(f"--image {path}: {reason}") from error
    return pictures


def check_model(model: str) -> None:
    """Refuse what is neither a checkpoint folder nor a Hub id, before anything slow is imported."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file() and not _is_original(folder):
            raise ValueError(f"--model {model}: the folder holds neither model_index.json nor an original checkpoint")
    elif folder.exists():
        raise NotADirectoryError(f"--model {model} is a file, a folder or a Hub repository is needed")
    elif not is_repository_name(model):
        raise FileNotFoundError(
            f"--model {model}: there is no such folder, and it is not a Hub repository (owner/name)"
        )


def choose_device(name: str) -> "torch.device":
    """The torch device of a name; ``auto`` takes the first accelerator, or else the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: unknown, use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        raise ValueError(f"--device {name}: not there, {built}; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: not available on this machine; use --device cpu")
    return device


def _is_original(folder: Path) -> bool:
    from echo4o.modeling.pipelines import original_class

    return original_class(folder) is not None


# The option of the command line that sets an argument of a pipeline.
_OPTIONS = {
    "image": "--image",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "image_guidance_scale": "--image-guidance",
    "height": "--height",
    "width": "--width",
    "think": "--think",
}


def require_options(model: str, method: str, arguments: dict) -> None:
    """Raise ValueError, naming the options, if the model's pipeline does not take one of these arguments."""
    from echo4o.modeling.pipelines import require_supported

    require_supported(class_of(model), {_OPTIONS[name]: name for name in arguments}, method)


def class_of(model: str) -> type:
    """The pipeline class of a pipeline folder, a Hub repository or a checkpoint in an original layout."""
    from echo4o.modeling.pipelines import original_class, pipeline_class

    original = original_class(model) if Path(model).is_dir() else None
    return original or pipeline_class(model)


def load_pipeline(model: str, device: "torch.device", dtype: Dtype) -> "DiffusionPipeline":
    """Load a pipeline folder, a Hub repository or an original checkpoint onto a device."""
    import torch

    import echo4o

    options = {} if dtype is Dtype.auto else {"dtype": getattr(torch, dtype.value)}
    cls = class_of(model)
    is_original = cls.is_original(model)
    cls = getattr(echo4o, cls.__name__, cls)
    pipe = cls.from_original(model, **options) if is_original else cls.from_pretrained(model, **options)
    return pipe.to(device)
