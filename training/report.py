"""`run.html`: one file with the curves, images and recipe of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from echo4o.common.files import write_text
from echo4o.common.thumbnails import data_uri, figure_uri
from echo4o.training.recipe import TrainingRecipe
from echo4o.training.recipe_files import dump_recipe
from echo4o.training.run_log import PHASES, phase_shares

CURVES = {  # key of the log -> title; the losses are added
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "share of the matrix rate",
    "memory_gb": "memory (GB)",
    "packing_efficiency": "fill of the packs",
}


def write_report(
    recipe: TrainingRecipe, log: list[dict], parts: dict[str, dict[str, int]], losses: Sequence[str]
) -> Path:
    """Write `run.html` into the run's folder and return its path.

    Args:
        log: one entry per step.
        parts: numbers of trained and frozen parameters of each part.
        losses: names of the losses in the log.
    """
    folder = recipe.output_dir
    rows = [
        (
            step.name.removeprefix("step-").lstrip("0") or "0",
            [data_uri(f.read_bytes(), "png") for f in _by_number(step)],
        )
        for step in sorted((folder / "images").glob("step-*"))
    ]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("run.html.j2").render(
        name=folder.name,
        steps=len(log),
        last=log[-1],
        shares=phase_shares(log, len(log)),
        parts=parts,
        curves=_curves(log, losses),
        prompts=recipe.images.prompts if recipe.images else (),
        rows=rows,
        recipe=dump_recipe(recipe),
    )
    write_text(folder / "run.html", text)
    return folder / "run.html"


def _by_number(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"), key=lambda f: int(f.stem))


def _curves(log: list[dict], losses: Sequence[str]) -> str:
    from matplotlib.figure import Figure

    titles = {"loss": "loss"} | {name: f"{name} loss" for name in losses} | CURVES
    names = [name for name in titles if any(entry.get(name) for entry in log)]
    rows = -(-(len(names) + 1) // 3)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for position, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, 3, position)
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        axes.plot(*zip(*points), linewidth=0.8)
        axes.set_title(titles[name], fontsize=9)
        axes.tick_params(labelsize=7)
    axes = figure.add_subplot(rows, 3, len(names) + 1)
    seconds = [[entry[f"{phase}_seconds"] for entry in log] for phase in PHASES]
    axes.stackplot([entry["step"] for entry in log], *seconds, labels=PHASES, linewidth=0)
    axes.legend(fontsize=7)
    axes.set_title("seconds of a step", fontsize=9)
    axes.tick_params(labelsize=7)
    return figure_uri(figure, dpi=110)
