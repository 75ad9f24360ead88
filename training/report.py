"""`run.html`: one file with the curves, images and recipe of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from echo4o.common import files
from echo4o.common.files import write_text
from echo4o.common.thumbnails import data_uri, figure_uri, thumbnail_uri
from echo4o.training.recipe import TrainingRecipe
from echo4o.training.recipe_files import dump_recipe
from echo4o.training.run_log import PHASES, phase_shares
from echo4o.training.sample_images import FOLDER, INPUTS
from echo4o.training.validation_result import ValidationResult

SIDE = 256  # pixels of the largest image that is shown as it is
CURVES = {  # key of the log -> title; the losses are added
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "share of the matrix rate",
    "memory_gb": "memory (GB)",
    "packing_efficiency": "fill of the packs",
}


def write_report(
    recipe: TrainingRecipe,
    log: list[dict],
    parts: dict[str, dict[str, int]],
    losses: Sequence[str],
    validations: Sequence[ValidationResult] = (),
) -> Path:
    """Write `run.html` into the run's folder and return its path.

    Args:
        log: one entry per step.
        parts: numbers of trained and frozen parameters of each part.
        losses: names of the losses in the log.
        validations: results of the run, oldest first.
    """
    folder = recipe.output_dir
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("run.html.j2").render(
        name=folder.name,
        steps=len(log),
        last=log[-1],
        shares=phase_shares(log, len(log)),
        parts=parts,
        curves=_curves(log, losses, validations),
        validations=_validation_table(validations),
        sheet=_contact_sheet(folder / FOLDER),
        recipe=dump_recipe(recipe),
    )
    write_text(folder / "run.html", text)
    return folder / "run.html"


def _contact_sheet(folder: Path) -> dict | None:
    """The images of all steps below the inputs that they were generated from; None without images."""
    inputs = files.read_json(folder / INPUTS) if (folder / INPUTS).is_file() else None
    if not inputs:
        return None
    steps = [
        (step.name.removeprefix("step-").lstrip("0") or "0", [_small(file) for file in _by_number(step)])
        for step in sorted(folder.glob("step-*"))
    ]
    return {
        "inputs": [(entry["text"], [_small(folder / name) for name in entry["references"]]) for entry in inputs],
        "targets": [_small(folder / entry["target"]) if entry["target"] else None for entry in inputs],
        "steps": steps,
    }


def _small(file: Path) -> str:
    """An image as a data address: unchanged if it is small, else as a thumbnail."""
    with Image.open(file) as image:
        if max(image.size) > SIDE:
            return thumbnail_uri(image.convert("RGB"), SIDE)
    return data_uri(file.read_bytes(), "png")


def _by_number(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"), key=lambda f: int(f.stem))


def _validation_table(validations: Sequence[ValidationResult]) -> list[tuple[str, list[tuple[str, float]]]]:
    """(name, (step, value) of the first, the best and the last validation) of every number."""
    if not validations:
        return []
    best = min(validations, key=lambda result: result.loss)
    shown = {"before training" if not r.step else f"step {r.step}": r for r in (validations[0], best, validations[-1])}
    names = [name for name in validations[0].flat() if not name.startswith("time_")]
    return [(name, [(when, r.flat().get(name, float("nan"))) for when, r in shown.items()]) for name in names]


def _curves(log: list[dict], losses: Sequence[str], validations: Sequence[ValidationResult] = ()) -> str:
    from matplotlib.figure import Figure

    titles = {"loss": "loss"} | {name: f"{name} loss" for name in losses} | CURVES
    names = [name for name in titles if any(entry.get(name) for entry in log)]
    panels = [panel for panel in (_by_task(validations), _by_time(validations)) if panel[1]]
    rows = -(-(len(names) + 1 + len(panels)) // 3)
    height = 2.6 * rows
    figure = Figure(figsize=(12, height))
    # A layout that matplotlib computes takes twice the time.
    figure.subplots_adjust(0.04, 0.3 / height, 0.99, 1 - 0.3 / height, wspace=0.15, hspace=0.3)
    for position, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, 3, position)
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        axes.plot(*zip(*points), linewidth=0.8, label="training")
        validated = [(r.step, v) for r in validations if (v := ({"loss": r.loss} | r.losses).get(name)) is not None]
        if validated:
            axes.plot(*zip(*validated), linewidth=1.2, marker=".", label="validation")
            axes.legend(fontsize=7)
        axes.set_title(titles[name], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
        axes.yaxis.offsetText.set_fontsize(7)
    for position, (title, curves) in enumerate(panels, len(names) + 2):
        axes = figure.add_subplot(rows, 3, position)
        for label, points in curves.items():
            axes.plot(*zip(*points), linewidth=0.8, marker=".", label=label)
        axes.legend(fontsize=6)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
    axes = figure.add_subplot(rows, 3, len(names) + 1)
    seconds = [[entry[f"{phase}_seconds"] for entry in log] for phase in PHASES]
    axes.stackplot([entry["step"] for entry in log], *seconds, labels=PHASES, linewidth=0)
    axes.legend(fontsize=7)
    axes.set_title("seconds of a step", fontsize=9)
    axes.tick_params(labelsize=7)
    return figure_uri(figure, dpi=110)


def _by_task(validations: Sequence[ValidationResult]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """A panel of the validation losses of each task over steps."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in validations:
        for task, losses in result.tasks.items():
            for name, value in losses.items():
                curves.setdefault(f"{task} ({name})", []).append((result.step, value))
    return "validation by task", curves


def _by_time(validations: Sequence[ValidationResult]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """A panel of the first and the last validation loss over noise levels."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in {r.step: r for r in (*validations[:1], *validations[-1:])}.values():
        for level, losses in result.times.items():
            for name, value in losses.items():
                curves.setdefault(f"step {result.step} ({name})", []).append((float(level), value))
    return "validation by noise level (0: clean, 1: noise)", curves
