"""Writes the report of the quickstart: one HTML file that contains all images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from echo4o.common.files import write_text
from echo4o.common.thumbnails import png_uri
from echo4o.quickstart.generation import GeneratedImages, reference_images_of
from echo4o.training.validation_result import ValidationResult


def write_report(
    path: Path,
    result: dict,
    before: GeneratedImages,
    after: GeneratedImages,
    log: list[dict],
    validations: Sequence[ValidationResult] = (),
) -> None:
    """Writes the report.

    Args:
        result: the contents of `result.json`.
        before, after: images of the base model and of the fine-tuned model for the same prompts.
        log: the log of the training, one entry per step.
        validations: losses of rows that did not train.
    """
    environment = Environment(loader=PackageLoader("echo4o.quickstart", "."), autoescape=True, trim_blocks=True)
    items_by_tag: dict[str, list[dict]] = {}
    for index, prompt in enumerate(after.prompts):
        item = {
            "text": prompt.text,
            "references": [png_uri(image) for image in reference_images_of(prompt)],
            "before": png_uri(before.images[index]),
            "after": png_uri(after.images[index]),
            "why_before": before.reasons[index],
            "why_after": after.reasons[index],
        }
        items_by_tag.setdefault(prompt.tag, []).append(item)
    html = environment.get_template("quickstart_report.html.j2").render(
        r=result,
        rows=sum(result["rows"].values()),
        curve=Markup(loss_curve(log, validations)),
        items_by_tag=items_by_tag,
    )
    write_text(path, html)


def loss_curve(log: list[dict], validations: Sequence[ValidationResult] = (), window: int = 25) -> str:
    """Returns an SVG plot of the loss over samples: every step, the mean over `window` steps, validations by noise level."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    samples = np.array([entry["samples"] for entry in log])
    losses = np.array([entry["loss"] for entry in log])
    window = min(window, len(losses))
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(samples, losses, color="#c9ced6", linewidth=0.8)
    axes.plot(samples[window - 1 :], np.convolve(losses, np.ones(window) / window, "valid"), color="#2c4cc8")
    if validations:
        reached = [samples[result.step - 1] if result.step else 0 for result in validations]
        for level in validations[0].times:
            losses = [result.times[level]["mse"] for result in validations]
            shade = 0.25 + 0.75 * float(level)
            axes.plot(reached, losses, color="#d2603a", alpha=shade, marker="o", markersize=3, label=f"noise {level}")
        axes.legend(title="validation", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xlabel="samples", ylabel="loss", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
