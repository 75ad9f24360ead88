"""The quickstart: from data to pictures on a CPU, every part of the package once and for real.

Render Shapes-4o as upstream publishes Echo-4o-Image, read it into a `datasets` dataset, fine-tune a tiny BAGEL on it,
draw held-out prompts before and after, score the pictures by their pixels with the package's own evaluation, save the pipeline and load it again in a
fresh process.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from echo4o.common.files import write_json
from echo4o.evaluation.benchmarks.shapes4o.accuracy import Accuracy
from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS, chance_of_references, held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import ROWS, render_upstream
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.quickstart.base_model import single_object_prompts
from echo4o.quickstart.generation import STEPS, GeneratedImages, generate_and_score, generate_images
from echo4o.training.recipe_files import bundled_recipe, dump_recipe, load_recipe
from echo4o.training.train import Trainer, TrainingResult, cast

BASE = Path(__file__).parent / "base"
LAYOUT = "prompt"
LAYOUT_WORDS = {
    "prompt": "The words decide where everything stands: groups in the order of mention, one row each; left, right, "
    "above and below are the outer columns and rows; objects beside each other take the two middle cells.",
    "free": "Objects stand anywhere that the words permit.",
}
# What the dataset's card says; without it, the card would say that the pictures come from GPT-4o.
ABOUT = """title: Shapes-4o
pictures: >-
  Small pictures of coloured shapes, drawn by a program with their instructions: a miniature of Echo-4o-Image that
  trains a tiny model in minutes.
from_openai: false
license: apache-2.0
"""
# Seconds of two parts on two quiet cores, to tell how long another machine will take.
REFERENCE = {"drawing": 8.0, "rest": 200.0}
# torch counts physical cores, and so leaves half of a small virtual machine idle; more than four gain nothing here.
THREADS = min(4, os.cpu_count() or 1)
REDRAWN = (0, 70)  # held-out prompts drawn again in a fresh process: one of text alone, one with two references


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    rows: dict[str, int]
    prompts_per_tag: int
    drawing_steps: int
    training: dict  # changes to the recipe


FULL = Size(ROWS, 10, STEPS, {})
SHORT = Size(
    {"surreal_fantasy": 90, "multi_reference": 90, "instruction_following": 600},
    3,
    8,
    {"steps": 60, "optimizer.warmup_steps": 10},
)


class Stages:
    """Says what is going on and how long it took."""

    def __init__(self, number: int):
        self.number, self.seconds = number, {}

    @property
    def last(self) -> float:
        """Seconds of the stage that was done last."""
        return [*self.seconds.values()][-1]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"[{len(self.seconds) + 1}/{self.number}] {name} ...", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        print(f"      {self.seconds[name]:.1f} s", flush=True)


def run(out: Path, short: bool = False, seed: int = 0, base: Path = BASE) -> dict:
    """Run the quickstart and write everything under `out`; returns what `result.json` holds.

    Args:
        out: folder; what an earlier run left in its `upstream`, `dataset` and `pipeline` is replaced.
        short: about a minute: a few steps and prompts, to see that everything works.
        seed: of the data, the training and the pictures.
        base: the pipeline folder to start from.

    Raises:
        ValueError: `base` is missing.
        RuntimeError: the reloaded pipeline draws something else than the one that was saved.
    """
    from echo4o.quickstart.quickstart_report import write_report

    start, out, size = time.monotonic(), Path(out), SHORT if short else FULL
    torch.set_num_threads(THREADS)
    if not (base / "model_index.json").is_file():
        raise ValueError(f"{base} holds no pipeline: make the base model first, with `make tiny-base`.")
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(7)
    with stages("rendering Shapes-4o in the upstream layout"):
        shutil.rmtree(out / "upstream", ignore_errors=True)
        written = render_upstream(out / "upstream", size.rows, seed, LAYOUT)
        (out / "upstream" / "about.yaml").write_text(ABOUT, "utf-8")
    with stages("reading it into a dataset"):
        dataset = read_upstream(out / "upstream", out / "dataset", out / "cache")
        print(f"      {len(dataset)} of {sum(written.values())} rows")
    prompts = chosen_prompts(size.prompts_per_tag)
    with stages(f"drawing {len(prompts)} held-out prompts with the base"):
        pipeline = Echo4oPipeline.from_pretrained(base, dtype=torch.float32)
        pipeline.set_progress_bar_config(desc="drawing", leave=False)
        before = generate_and_score(pipeline, prompts, seed, size.drawing_steps, out / "evaluation" / "before")
        own = generate_and_score(pipeline, single_object_prompts(3 * size.prompts_per_tag), seed, size.drawing_steps)
    if not short:
        print(f"      {pace(stages.last)}")
    with stages("fine-tuning and saving"):
        recipe = load_recipe(
            bundled_recipe("quickstart_cpu"),
            {"model": str(base), "output_dir": str(out), "data.path": str(out / "dataset"), "seed": seed}
            | size.training,
        )
        shutil.rmtree(out / "pipeline", ignore_errors=True)
        (out / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
        training = Trainer(recipe, pipeline, dataset).run()
        cast(pipeline, torch.float32)  # the saved 16-bit values, computed with in float32 as before
    with stages("drawing the same prompts after fine-tuning"):
        after = generate_and_score(pipeline, prompts, seed, size.drawing_steps, out / "evaluation" / "after")
    with stages("loading the saved pipeline in a fresh process"):
        difference = redraw_difference(pipeline, training.pipeline_dir, out, seed, size.drawing_steps)
        print(f"      the same pictures: largest difference {difference} of 255")
    result = summary(training, before, after, own, size, base)
    result |= {"short": short, "seed": seed, "rows": written, "reloaded_difference": difference}
    with stages("writing the report"):
        result["stages"] = {name: round(seconds, 1) for name, seconds in stages.seconds.items()}
        result["seconds"] = round(time.monotonic() - start, 1)
        write_json(out / "result.json", result)
        write_report(out / "report.html", result, before, after, training.log)
    print_ending(out, before, after, result)
    return result


def pace(drawing: float) -> str:
    """How fast this machine is and how long the rest will take, judged by the seconds of the first drawing.

    The steps of training are the same on every machine, so a slow one takes longer and learns as much.
    """
    factor = drawing / REFERENCE["drawing"]
    minutes = max(1, round(factor * REFERENCE["rest"] / 60))
    words = f"about {factor:.1f}x slower than" if factor > 1.25 else "as fast as" if factor > 0.8 else "faster than"
    return f"this machine is {words} the reference (2 cores, nothing else running): about {minutes} minutes to go"


def read_upstream(upstream: Path, folder: Path, cache: Path):
    """Build the rendered release into `folder`, as any release is built, and open it from there."""
    from datasets import load_dataset

    from echo4o.dataset_scripts.build import build

    shutil.rmtree(folder, ignore_errors=True)
    build(str(upstream), folder)
    return load_dataset(str(folder), "all", split="train", cache_dir=str(cache))


def chosen_prompts(per_tag: int):
    """The first held-out prompts of each tag."""
    prompts = held_out_prompts()
    return [prompt for tag in TAGS for prompt in [p for p in prompts if p.tag == tag][:per_tag]]


def redraw_difference(pipeline, folder: Path, out: Path, seed: int, steps: int) -> int:
    """Draw two prompts here and, from the saved folder, in a fresh process; largest difference of a colour value.

    Raises RuntimeError when it is more than rounding.
    """
    work = out / "redrawn"
    work.mkdir(exist_ok=True)
    request = {"prompts": REDRAWN, "seed": seed, "steps": steps, "threads": torch.get_num_threads()}
    (work / "request.json").write_text(json.dumps(request), "utf-8")
    every = held_out_prompts()
    here = generate_images(pipeline, [every[i] for i in REDRAWN], seed, steps)
    command = [
        sys.executable,
        "-m",
        "echo4o.quickstart.regenerate",
        str(folder),
        str(work / "request.json"),
        str(work),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The saved pipeline does not load in a fresh process:\n{done.stderr[-2000:]}")
    there = [Image.open(work / f"{index}.png") for index in range(len(REDRAWN))]
    difference = max(int(np.abs(np.subtract(a, b, dtype=np.int16)).max()) for a, b in zip(here, there))
    if difference > 2:
        raise RuntimeError(f"The reloaded pipeline draws other pictures: they differ by up to {difference} of 255.")
    return difference


def score_table(drawn: GeneratedImages) -> dict[str, dict]:
    """Scores by tag as plain values: right, of, mean, low, high (95%)."""
    return {
        tag: {
            "right": score.right,
            "of": score.of,
            "mean": round(score.mean, 4),
            "low": round(score.interval[0], 4),
            "high": round(score.interval[1], 4),
        }
        for tag, score in drawn.scores.items()
    }


def summary(
    training: TrainingResult,
    before: GeneratedImages,
    after: GeneratedImages,
    own: GeneratedImages,
    size: Size,
    base: Path,
) -> dict:
    """Everything measured, as plain values."""
    samples = int(training.log[-1]["samples"])
    notes = {name: base / f"{name}.json" for name in ("base", "control")}
    return {
        **{name: json.loads(file.read_text("utf-8")) if file.is_file() else None for name, file in notes.items()},
        "scores": {"before": score_table(before), "after": score_table(after)},
        "base_on_single_objects": score_table(own)["overall"],
        "layout": LAYOUT,
        "layout_words": LAYOUT_WORDS[LAYOUT],
        "chance_of_references": round(chance_of_references(), 4),
        "prompts": len(before.prompts),
        "drawing_steps": size.drawing_steps,
        "training": {
            "steps": len(training.log),
            "samples": samples,
            "seconds": round(training.seconds, 1),
            "samples_per_second": round(samples / training.log[-1]["seconds"], 1),
            "last_loss": round(float(np.mean([entry["loss"] for entry in training.log[-50:]])), 4),
        },
        "sizes_mb": {
            "pipeline": round(sum(f.stat().st_size for f in training.pipeline_dir.rglob("*") if f.is_file()) / 1e6, 2)
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def print_ending(out: Path, before: GeneratedImages, after: GeneratedImages, result: dict) -> None:
    """Scores on the terminal, what to compare them with, and where everything is."""
    print(f"\n{'right pictures':18}{'before':>26}{'after':>26}   (95% intervals)")
    for tag, score in after.scores.items():
        print(f"{tag:18}{str(before.scores[tag]):>26}{str(score):>26}")
    own, control = result["base_on_single_objects"], result["control"]
    print(f"\nThe base on single objects, its own domain: {written(own)}.")
    print(f"Multi-reference by chance: {chance_of_references():.3f}.")
    if control:
        print(f"Control, measured once: the same fine-tuning from random weights gets {written(control)}.")
    print(f"\nDone in {result['seconds']:.0f} s. Report: {out / 'report.html'}")
    print(f'Next: echo4o generate "a photo of two red stars" --model {out / "pipeline"}')


def written(score: dict) -> str:
    """A score of `score_table` as on the terminal."""
    return str(Accuracy(score["right"], score["of"]))
