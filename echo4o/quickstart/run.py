"""The quickstart: runs the whole workflow on a CPU, from data to scored images.

It renders Shapes-4o in the layout in which Echo-4o-Image is published, reads it into a `datasets` dataset, fine-tunes a
tiny BAGEL on it, generates images for held-out prompts before and after, scores them by their pixels with
`echo4o.evaluation`, saves the pipeline and loads it again in a new process.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
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
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream
from echo4o.modeling.pipelines import pipeline_class
from echo4o.quickstart.comparison import compared_scores
from echo4o.quickstart.generation import STEPS, GeneratedImages, generate_and_score, generate_images
from echo4o.training.recipe_files import bundled_recipe, dump_recipe, load_recipe
from echo4o.training.train import Trainer, TrainingResult, cast

BASE = Path(__file__).parent / "base"
LAYOUT = "prompt"  # a key of LAYOUT_WORDS
LAYOUT_WORDS = {
    "prompt": "The prompt determines the position of every object: groups in the order in which the prompt names them, "
    "one row each; left, right, above and below are the outer columns and rows; objects beside each other take the two "
    "middle cells.",
    "free": "Objects are at random positions that fit the prompt.",
}
# Facts for the dataset's card. Without them, the card would describe Echo-4o-Image.
ABOUT = """title: Shapes-4o
pictures: >-
  Small images of coloured shapes, rendered by a program together with their instructions: a miniature of
  Echo-4o-Image that trains a tiny model in minutes.
from_openai: false
license: apache-2.0
"""
# Seconds of the first generation and of everything after it, measured on two idle cores of an Intel Xeon with AVX-512.
# `pace` compares with them.
REFERENCE = {"generation": 8.4, "rest": 76.0}
# torch defaults to the number of physical cores, which is half of the virtual cores; more than four are not faster.
THREADS = min(4, os.cpu_count() or 1)
# Held-out prompts generated again in a new process: one without references, one with two.
REGENERATED = (0, 70)


@dataclass(frozen=True)
class QuickstartSize:
    """Amount of data, training and evaluation."""

    rows: dict[str, int]  # by configuration
    prompts_per_tag: int
    sampler_steps: int
    training: dict  # changes to the recipe


# The 120 steps of 32 samples see each row at most once.
ROWS = {"surreal_fantasy": 450, "multi_reference": 700, "instruction_following": 2850}
FULL = QuickstartSize(ROWS, 10, STEPS, {})
SHORT = QuickstartSize(
    {"surreal_fantasy": 90, "multi_reference": 90, "instruction_following": 600},
    3,
    8,
    {"steps": 60, "optimizer.warmup_steps": 10, "validation.share": 0.1},
)


class Stages:
    """Prints the name of each stage and measures its duration and its processor time, with that of ended processes."""

    def __init__(self, number: int):
        self.number = number
        self.seconds: dict[str, float] = {}  # by stage
        self.processor_seconds: dict[str, float] = {}  # by stage

    @property
    def last(self) -> float:
        """Seconds of the last finished stage."""
        return [*self.seconds.values()][-1]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"[{len(self.seconds) + 1}/{self.number}] {name} ...", flush=True)
        start, busy = time.monotonic(), _processor_seconds()
        yield
        self.seconds[name] = time.monotonic() - start
        self.processor_seconds[name] = _processor_seconds() - busy
        print(f"      {self.seconds[name]:.1f} s", flush=True)


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run(out: Path, short: bool = False, seed: int = 0, base: Path = BASE) -> dict:
    """Runs the quickstart and writes all results under `out`; returns the contents of `result.json`.

    Args:
        out: folder; its subfolders `upstream`, `dataset` and `pipeline` are replaced.
        short: run a few steps and prompts only, which takes about a minute, to check that everything works.
        seed: seed of the data, the training and the images.
        base: the pipeline folder to start from.

    Raises:
        ValueError: `base` is missing.
        RuntimeError: the reloaded pipeline generates other images than the pipeline that was saved.
    """
    from echo4o.quickstart.quickstart_report import write_report

    start, out, size = time.monotonic(), Path(out), SHORT if short else FULL
    torch.set_num_threads(THREADS)
    if not (base / "model_index.json").is_file():
        raise ValueError(f"{base} does not contain a pipeline: create the base model first with `make tiny-base`.")
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
    with stages(f"generating {len(prompts)} held-out prompts with the base model"):
        pipeline = pipeline_class(base).from_pretrained(base, dtype=torch.float32)
        pipeline.set_progress_bar_config(desc="generating", leave=False)
        before = generate_and_score(pipeline, prompts, seed, size.sampler_steps, out / "evaluation" / "before")
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
        cast(pipeline, torch.float32)  # the saved 16-bit values; compute in float32 as before
    with stages("generating the same prompts after fine-tuning"):
        after = generate_and_score(pipeline, prompts, seed, size.sampler_steps, out / "evaluation" / "after")
    with stages("loading the saved pipeline in a new process"):
        difference = regeneration_difference(pipeline, training.pipeline_dir, out, seed, size.sampler_steps)
        print(f"      the same images: largest difference {difference} of 255")
    result = summary(training, before, after, size, base)
    result["serve"] = shlex.join(["echo4o", "serve", "--model", str(out / "pipeline")])
    result |= {"short": short, "seed": seed, "rows": written, "reloaded_difference": difference}
    with stages("writing the report"):
        result["stages"] = {name: round(seconds, 1) for name, seconds in stages.seconds.items()}
        result["processor_seconds"] = {name: round(busy, 1) for name, busy in stages.processor_seconds.items()}
        result["seconds"] = round(time.monotonic() - start, 1)
        write_json(out / "result.json", result)
        write_report(out / "report.html", result, before, after, training.log, training.validations)
    print_ending(out, before, after, result)
    return result


def pace(generation: float) -> str:
    """Describes the speed of this machine and the remaining time.

    Args:
        generation: seconds of the first generation.

    The number of training steps is the same on every machine: a slow machine takes longer and learns as much.
    """
    factor = generation / REFERENCE["generation"]
    minutes = max(1, round(factor * REFERENCE["rest"] / 60))
    words = f"about {factor:.1f}x slower than" if factor > 1.25 else "as fast as" if factor > 0.8 else "faster than"
    return f"this machine is {words} the reference (2 cores, nothing else running): about {minutes} minute{'s' if minutes > 1 else ''} to go"


def read_upstream(upstream: Path, folder: Path, cache: Path):
    """Builds the rendered release into `folder`, like any release, and loads it from there."""
    from datasets import load_dataset

    from echo4o.dataset_scripts.build import build

    shutil.rmtree(folder, ignore_errors=True)
    build(str(upstream), folder)
    return load_dataset(str(folder), "all", split="train", cache_dir=str(cache))


def chosen_prompts(per_tag: int):
    """Returns the first held-out prompts of each tag."""
    prompts = held_out_prompts()
    return [prompt for tag in TAGS for prompt in [p for p in prompts if p.tag == tag][:per_tag]]


def regeneration_difference(pipeline, folder: Path, out: Path, seed: int, steps: int) -> int:
    """Generates two prompts in this process and in a new process from the saved folder.

    Returns the largest difference of a colour value (0 to 255). Raises RuntimeError if it is larger than rounding errors.
    """
    work = out / "regenerated"
    work.mkdir(exist_ok=True)
    request = {"prompts": REGENERATED, "seed": seed, "steps": steps, "threads": torch.get_num_threads()}
    (work / "request.json").write_text(json.dumps(request), "utf-8")
    held_out = held_out_prompts()
    expected = generate_images(pipeline, [held_out[i] for i in REGENERATED], seed, steps)
    command = [
        sys.executable,
        "-m",
        "echo4o.quickstart.regenerate",
        str(folder),
        str(work / "request.json"),
        str(work),
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"The saved pipeline does not load in a new process:\n{process.stderr[-2000:]}")
    reloaded = [Image.open(work / f"{index}.png") for index in range(len(REGENERATED))]
    difference = max(_largest_difference(a, b) for a, b in zip(expected, reloaded))
    if difference > 2:
        raise RuntimeError(f"The reloaded pipeline generates other images: they differ by up to {difference} of 255.")
    return difference


def _largest_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def score_table(generated: GeneratedImages) -> dict[str, dict]:
    """Returns the scores by tag: number of correct images, number of images, mean, and its 95% interval (low, high)."""
    return {
        tag: {
            "right": score.right,
            "of": score.of,
            "mean": round(score.mean, 4),
            "low": round(score.interval[0], 4),
            "high": round(score.interval[1], 4),
        }
        for tag, score in generated.scores.items()
    }


def summary(
    training: TrainingResult,
    before: GeneratedImages,
    after: GeneratedImages,
    size: QuickstartSize,
    base: Path,
) -> dict:
    """Returns all measured values for `result.json`."""
    samples = int(training.log[-1]["samples"])
    scores = {"before": score_table(before), "after": score_table(after)}
    control = recorded(base, "control")
    return {
        "base": recorded(base, "base"),
        "scores": scores,
        "compared": compared_scores(
            scores["before"]["overall"], scores["after"]["overall"], len(training.log), control
        ),
        "recorded": bool(control),
        "layout": LAYOUT,
        "layout_words": LAYOUT_WORDS[LAYOUT],
        "chance_of_references": round(chance_of_references(), 4),
        "prompts": len(before.prompts),
        "drawing_steps": size.sampler_steps,
        "training": {
            "steps": len(training.log),
            "samples": samples,
            "seconds": round(training.seconds, 1),
            "samples_per_second": round(samples / training.log[-1]["seconds"], 1),
            "validation": {str(result.step): round(result.loss, 4) for result in training.validations},
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


def recorded(base: Path, name: str) -> dict:
    """Returns the contents of a file of measurements in the base folder; empty if it is missing."""
    file = base / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def print_ending(out: Path, before: GeneratedImages, after: GeneratedImages, result: dict) -> None:
    """Prints the scores, values to compare them with, the path of the report and the next command."""
    print(f"\n{'correct images':18}{'before':>26}{'after':>26}   (95% intervals)")
    for tag, score in after.scores.items():
        print(f"{tag:18}{str(before.scores[tag]):>26}{str(score):>26}")
    print(f"\n{'all tags':46}{'correct':>27}   measured")
    for row in result["compared"]:
        print(f"{row['name']:46}{written(row):>27}   {row['measured']}")
    print(f"\nDone in {result['seconds']:.0f} s. Report: {out / 'report.html'}")
    print(f"Next, the app with this model: {result['serve']}")


def written(score: dict) -> str:
    """Formats a score of `score_table`."""
    return str(Accuracy(score["right"], score["of"]))
