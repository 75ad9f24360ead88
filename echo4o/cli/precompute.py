"""``echo4o dataset precompute``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say


def precompute(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or Hub repository.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(help="The pipeline that the dataset will train; its encoders are used.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the recipe that changes what is encoded, or a guidance option of the teacher: key=value.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher",
            help="Generate the prompts' images with guidance and store their trajectories, for distill_lora.",
        ),
    ] = False,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Teacher: updates of an image.", show_default="48")
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Teacher: stored parts of a trajectory; few-step adapters have a divisor of them.",
            show_default="8",
        ),
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Teacher: trajectories of each row.", show_default="1")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Teacher: prompts of one call.", show_default="8")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Teacher: height in pixels.", show_default="the model's")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Teacher: width in pixels.", show_default="the model's")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Teacher: seed of the noise.", show_default="0")] = None,
) -> None:
    """Encode the rows once for all epochs (VAE moments, vision patches, text states). Run it again to resume.

    Example: [bold]echo4o dataset precompute echo-4o-image --model echo-4o --out latents[/bold]
    Several GPUs: [bold]accelerate launch -m echo4o.training.precompute echo-4o-image ...[/bold]
    Few-step adapters: [bold]echo4o dataset precompute PROMPTS --model echo-4o --out trajectories --teacher[/bold]
    """
    from echo4o.training.precompute import read_teacher, run
    from echo4o.training.recipe_files import parse_changes

    options = {"updates": updates, "segments": segments, "images_per_prompt": images_per_prompt}
    options |= {"batch_size": batch_size, "height": height, "width": width, "seed": seed}
    given = {option: value for option, value in options.items() if value is not None}
    rows = run(dataset, model, out, name, split, **read_teacher(teacher, given, parse_changes(set_ or [])))
    if teacher:
        say(f"trajectories of {rows} rows:")
        settings = ["--set", f"model={model}", "--set", f"data.path={dataset}", "--set", f"distill.teacher={out}"]
        finish(out, shlex.join(["echo4o", "train", "distill_lora", *settings]))
        return
    say(f"{rows} encoded rows:")
    settings = ["--set", f"model={model}", "--set", f"data.path={dataset}", "--set", f"latents={out}"]
    finish(out, shlex.join(["echo4o", "train", _recipe(model), *settings]))


def _recipe(model: str) -> str:
    """The bundled recipe that trains an adapter of this model on one GPU."""
    from echo4o.training.backbones import backbone_of
    from echo4o.training.recipe_files import bundled_names

    name = f"{backbone_of(model)}_lora_single_gpu"
    return name if name in bundled_names() else "lora_single_gpu"
