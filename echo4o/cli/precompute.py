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
            "--set", help="A setting of the recipe that changes what is encoded: key=value.", show_default=False
        ),
    ] = None,
) -> None:
    """Encode the rows once for all epochs (VAE moments, vision patches, text states). Run it again to resume.

    Example: [bold]echo4o dataset precompute echo-4o-image --model echo-4o --out latents[/bold]
    Several GPUs: [bold]accelerate launch -m echo4o.training.precompute echo-4o-image ...[/bold]
    """
    from echo4o.training.precompute import run
    from echo4o.training.recipe_files import parse_changes

    rows = run(dataset, model, out, name, split, parse_changes(set_ or []))
    say(f"{rows} encoded rows:")
    settings = ["--set", f"model={model}", "--set", f"data.path={dataset}", "--set", f"latents={out}"]
    finish(out, shlex.join(["echo4o", "train", _recipe(model), *settings]))


def _recipe(model: str) -> str:
    """The bundled recipe that trains an adapter of this model on one GPU."""
    from echo4o.training.backbones import backbone_of
    from echo4o.training.recipe_files import bundled_names

    name = f"{backbone_of(model)}_lora_single_gpu"
    return name if name in bundled_names() else "lora_single_gpu"
