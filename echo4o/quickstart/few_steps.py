"""Measures few-step adapters on tiny models: the tables of docs/few_steps.md.

`python -m echo4o.quickstart.few_steps QUICKSTART OUT` takes the fine-tuned pipeline and the dataset of a finished
quickstart, makes the teacher's trajectories, trains adapters, and scores all ways of sampling on held-out prompts. It
does the same with a model of single objects at any place, whose images of a prompt differ from each other. Both take
about an hour on one core. After an interruption the same command continues.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo4o.common.files import read_json, write_json
from echo4o.evaluation.benchmarks.shapes4o.accuracy import Accuracy
from echo4o.evaluation.benchmarks.shapes4o.grammar import ShapesPrompt, held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.rendering import render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import lay_out
from echo4o.evaluation.statistics import bootstrap
from echo4o.modeling.pipelines import pipeline_class
from echo4o.quickstart.generation import STEPS, generate_images, judge
from echo4o.quickstart.imperfect_rows import TINTS, single_object_prompts, training_dataset
from echo4o.quickstart.run import BASE
from echo4o.training.precompute import run as precompute
from echo4o.training.recipe_files import bundled_recipe, load_recipe
from echo4o.training.teacher import TeacherSettings
from echo4o.training.train import Trainer, train

SEGMENTS = 8
PROMPTS = 1536  # of the quickstart's training rows, whose trajectories the adapters learn from
SINGLE_OBJECTS = 60  # at most
FREE_STEPS = 300  # fine-tuning of the base into the model of single objects at any place
VARIANTS = (1, 2, 3)  # of the 90 held-out contents: 270 prompts
SEEDS = (0, 1, 2)  # of the images' noise
BATCH = 45  # prompts per call


@dataclass(frozen=True)
class Student:
    """An adapter to train."""

    updates: int
    steps: int  # of the optimizer
    start: int | None = None  # begin with the adapter of so many updates
    seed: int = 0

    @property
    def name(self) -> str:
        return f"student-{self.updates}" + (f"-seed-{self.seed}" if self.seed else "")


STUDENTS, FREE_STUDENTS = (
    (Student(4, 600), Student(8, 100, start=4), Student(2, 500, start=4)),
    (Student(4, 600), Student(2, 600, start=4), Student(1, 600, start=2)),
)


@dataclass(frozen=True)
class Way:
    """A way of sampling: a number of updates, with the checkpoint's guidance, without, or by an adapter's preset."""

    name: str
    updates: int | None = None  # None: the adapter's
    guided: bool = True
    adapter: Path | None = None

    def options(self) -> dict:
        """Arguments of the pipeline's call."""
        return {} if self.guided or self.adapter else {"guidance_scale": 1.0}


@dataclass(frozen=True)
class Experiment:
    """A teacher, its adapters, and the prompts that they are scored on.

    Args:
        model: pipeline folder of the teacher.
        rows: makes the dataset whose prompts the adapters learn from.
        images_per_prompt: trajectories of each row.
        batch_size: of the training.
    """

    model: Path
    out: Path
    rows: Callable[[], Any]
    prompts: Sequence[ShapesPrompt]
    students: Sequence[Student]
    images_per_prompt: int = 1
    batch_size: int = 32


def of_quickstart(quickstart: Path, out: Path) -> Experiment:
    """The fine-tuned model of a finished quickstart, with references among its prompts."""

    def rows():
        from datasets import load_dataset

        dataset = load_dataset(str(quickstart / "dataset"), "all", split="train", cache_dir=str(out / "cache"))
        chosen = dataset.shuffle(seed=0).select(range(PROMPTS))
        return chosen.select_columns(["id", "instruction", "reference_images"])

    prompts = [prompt for variant in VARIANTS for prompt in held_out_prompts(variant=variant)]
    return Experiment(quickstart / "pipeline", out, rows, prompts, STUDENTS)


def of_free_objects(out: Path) -> Experiment:
    """A model that generates single objects in any cell: the base, fine-tuned for it first."""
    prompts = single_object_prompts(SINGLE_OBJECTS)

    def rows():
        from datasets import Dataset

        return Dataset.from_list([{"id": f"single-{i}", "instruction": p.text} for i, p in enumerate(prompts)])

    model = out / "teacher" / "pipeline"
    return Experiment(model, out, rows, prompts, FREE_STUDENTS, images_per_prompt=20, batch_size=16)


def train_free_objects_model(out: Path) -> Path:
    """Fine-tune the base on single objects in any cell, or return the folder of the model that is there."""
    run = out / "teacher"
    if (run / "pipeline").is_dir():
        return run / "pipeline"
    rng, batch = np.random.default_rng(7), 32
    prompts = single_object_prompts(SINGLE_OBJECTS)
    rows = []
    for number in range(FREE_STEPS * batch):
        prompt = prompts[number % len(prompts)]
        image = render(lay_out(prompt.groups, "free", rng), tint(int(rng.integers(TINTS))))
        row = {"id": f"free-{number}", "instruction": prompt.text, "reference_images": [], "image": image}
        rows.append(row | {"answer": None})
    settings = {"output_dir": str(run), "steps": FREE_STEPS, "batch_size": batch, "validation": None}
    settings |= {"checkpoints": {"every": 100}, "resume": True}
    pipeline = pipeline_class(BASE).from_pretrained(BASE, dtype=torch.float32)
    recipe = load_recipe(bundled_recipe("quickstart_cpu"), settings)
    return Trainer(recipe, pipeline, training_dataset(rows)).run().pipeline_dir


# --- making the adapters --------------------------------------------------------------------------------------------


def make_trajectories(experiment: Experiment) -> None:
    """Store the teacher's trajectories."""
    out, copies = experiment.out, experiment.images_per_prompt
    if not (out / "prompts").is_dir():
        experiment.rows().save_to_disk(out / "prompts")
    batch = max(1, 80 // copies) if copies > 1 else 32
    settings = TeacherSettings(updates=STEPS, segments=SEGMENTS, batch_size=batch, images_per_prompt=copies)
    precompute(str(out / "prompts"), str(experiment.model), out / "trajectories", teacher=settings)


def train_student(student: Student, experiment: Experiment) -> Path:
    """Train an adapter, or return the folder of the one that is there."""
    out = experiment.out
    folder = out / student.name
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    settings = {
        "model": str(experiment.model),
        "output_dir": str(folder),
        "data.path": str(out / "prompts"),
        "distill": {"teacher": str(out / "trajectories"), "steps": student.updates},
        "optimizer": {"lr": 2e-3, "warmup_steps": 20, "schedule": "linear"},
        "steps": student.steps,
        "batch_size": experiment.batch_size,
        "packing": None,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "device": "cpu",
        "validation": {"every": 100, "share": 0.1 if experiment.images_per_prompt > 1 else 0.02, "max_rows": 32},
        "checkpoints": {"every": 100},
        "resume": True,
        "seed": student.seed,
    }
    if student.start is not None:
        settings["tune.init_adapter"] = str(out / f"student-{student.start}" / "adapter")
    return train(load_recipe(bundled_recipe("distill_lora"), settings)).pipeline_dir


# --- measuring ------------------------------------------------------------------------------------------------------


class RowCounter:
    """Counts the rows of all updates: one for each image and guidance branch that the transformer evaluates."""

    def __init__(self, pipeline):
        self.pipeline, self.rows = pipeline, 0
        self.hook = pipeline.transformer.register_forward_pre_hook(self._count)

    def _count(self, module, arguments: tuple) -> None:
        if self.pipeline.current_timestep is not None:  # not while contexts are read
            self.rows += len(arguments[2].spans)


def score(pipeline, way: Way, prompts: Sequence[ShapesPrompt], seed: int) -> dict:
    """Generate the images of all prompts and judge them: {"right": list of bool, "rows": row-updates per image}."""
    counter, images = RowCounter(pipeline), []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        images += generate_images(pipeline, part, seed * 1000 + start, way.updates, **way.options())
    counter.hook.remove()
    return {"right": [not reasons for reasons in judge(prompts, images)], "rows": counter.rows / len(prompts)}


def load(folder: Path, way: Way):
    """The pipeline, with the way's adapter."""
    pipeline = pipeline_class(folder).from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if way.adapter is not None:
        pipeline.load_lora_weights(way.adapter)
    return pipeline


def measure(experiment: Experiment, ways: Sequence[Way]) -> dict:
    """Scores by way and seed, kept in `out/scores.json`; measured ones are not measured again."""
    prompts, file = experiment.prompts, experiment.out / "scores.json"
    scores = read_json(file) or {}
    for way in ways:
        pipeline = None
        for seed in SEEDS:
            if str(seed) not in scores.setdefault(way.name, {}):
                pipeline = pipeline or load(experiment.model, way)
                scores[way.name][str(seed)] = score(pipeline, way, prompts, seed)
                write_json(file, scores)
                print(
                    f"{way.name}, seed {seed}: {sum(scores[way.name][str(seed)]['right'])}/{len(prompts)}", flush=True
                )
    return scores


def seconds(experiment: Experiment, ways: Sequence[Way], rounds: int = 5) -> dict[str, float]:
    """Median seconds of one call with 8 prompts, the ways taking turns."""
    prompts = experiment.prompts[:: len(experiment.prompts) // 8][:8]
    pipelines = [load(experiment.model, way) for way in ways]
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(rounds + 1):
        for way, pipeline in zip(ways, pipelines, strict=True):
            start = time.perf_counter()
            generate_images(pipeline, prompts, 0, way.updates, **way.options())
            if turn:  # the first one warms up
                times[way.name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(scores: dict, times: dict[str, float], teacher: str, prompts: Sequence[ShapesPrompt]) -> str:
    """The results as a Markdown table; differences to the teacher with paired 95% intervals over contents."""
    contents = [f"{prompt.tag} {sorted(map(str, prompt.groups))}" for prompt in prompts]
    with_references = [bool(prompt.references) for prompt in prompts]
    lines = [
        "| sampling | right (95%) | minus teacher (95%, paired) | with references | row-updates | fewer | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in scores.items():
        runs = list(by_seed.values())
        every = [ok for run in runs for ok in run["right"]]
        referenced = [ok for run in runs for ok, has in zip(run["right"], with_references, strict=True) if has]
        rows, base = runs[0]["rows"], scores[teacher]["0"]["rows"]
        faster = f"{times[teacher] / times[name]:.1f}x" if name in times else ""
        cells = [name, _share(every), _difference(runs, list(scores[teacher].values()), contents), _share(referenced)]
        lines.append(f"| {' | '.join(cells)} | {rows:.1f} | {base / rows:.1f}x | {faster} |")
    return "\n".join(lines)


def _share(right: Sequence[bool]) -> str:
    if not right:
        return ""
    accuracy = Accuracy(sum(right), len(right))
    low, high = accuracy.interval
    return f"{accuracy.mean:.3f} [{low:.3f}, {high:.3f}]"


def _difference(runs: Sequence[dict], teacher: Sequence[dict], contents: Sequence[str]) -> str:
    """The mean difference and its interval. The unit is a content: its wordings and seeds are averaged first."""
    by_content: dict[str, list[float]] = {}
    for run, other in zip(runs, teacher):  # as many seeds as both have
        for content, a, b in zip(contents, run["right"], other["right"], strict=True):
            by_content.setdefault(content, []).append(float(a) - float(b))
    means = [statistics.mean(values) for values in by_content.values()]
    intervals, _ = bootstrap({"all": means}, lambda sizes: {"all": {"all": 1.0}})
    low, high = intervals["all"]
    return f"{statistics.mean(means):+.3f} [{low:+.3f}, {high:+.3f}]"


def run(experiment: Experiment, updates: Sequence[int]) -> str:
    """Make and measure everything; returns the table, which is also written to `out/table.md`.

    Args:
        updates: numbers of updates at which the teacher is measured without training, with and without guidance.
    """
    out = experiment.out
    out.mkdir(parents=True, exist_ok=True)
    make_trajectories(experiment)
    teacher = Way(f"teacher, {STEPS} updates, guidance", STEPS)
    untrained = [Way(f"teacher, {_counted(k)}, guidance", k) for k in updates]
    untrained += [Way(f"teacher, {_counted(k)}, no guidance", k, guided=False) for k in updates]
    adapters = {student: train_student(student, experiment) for student in experiment.students}
    students = [Way(f"student, {_counted(s.updates)}", adapter=adapters[s]) for s in experiment.students]
    ways = [teacher, *untrained, *students]
    scores = measure(experiment, ways)
    result = table(scores, seconds(experiment, ways), teacher.name, experiment.prompts)
    (out / "table.md").write_text(result + "\n", "utf-8")
    return result


def _counted(updates: int) -> str:
    return f"{updates} update{'s' if updates > 1 else ''}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures few-step adapters on tiny models.")
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("out", type=Path, help="the folder to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(run(of_quickstart(given.quickstart, given.out / "quickstart"), (4, 2, 1)))
    train_free_objects_model(given.out / "free")
    print(run(of_free_objects(given.out / "free"), (4, 2, 1)))
