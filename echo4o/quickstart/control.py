"""Measures what the quickstart's result is compared with, and records it in ``base/control.json``.

``python -m echo4o.quickstart.control OUT`` runs all experiments: each fine-tunes with the quickstart's recipe and scores
the held-out prompts. Its output ends with the tables of docs/quickstart.md. ``--only`` selects experiments and
``--seeds`` sets their seeds. A recorded experiment with the same seed is replaced.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import AutoTokenizer

from echo4o.common.files import write_json
from echo4o.evaluation.benchmarks.shapes4o.grammar import PARTS, held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.quickstart.base_model import build_pipeline
from echo4o.quickstart.comparison import comparison_table, parts_table, pooled
from echo4o.quickstart.generation import generate_and_score
from echo4o.quickstart.imperfect_rows import imperfect_rows, training_dataset
from echo4o.quickstart.run import ABOUT, BASE, FULL, LAYOUT, read_upstream, score_table
from echo4o.training.recipe_files import bundled_recipe, load_recipe
from echo4o.training.train import Trainer, cast

RECORD = "control.json"


@dataclass(frozen=True)
class Experiment:
    """A model to start from and rows to fine-tune it on.

    Attributes:
        start: "base" or "random", which has the base model's architecture, tokenizer and VAE.
        rows: "clean" (the quickstart's dataset), "loose" (more rows like those of the base model), or "none".
        without: a part of the clean rows to leave out.
    """

    start: str
    rows: str
    without: str | None = None


EXPERIMENTS = {
    "base": Experiment("base", "none"),
    "base + clean": Experiment("base", "clean"),
    "base + loose": Experiment("base", "loose"),
    "random + clean": Experiment("random", "clean"),
    **{f"base + clean without {part}": Experiment("base", "clean", part) for part in PARTS},
}


def measure(name: str, seed: int, out: Path, base: Path = BASE, changes: dict | None = None) -> dict:
    """Runs an experiment and returns its scores by tag, its number of steps and its processor time.

    Args:
        name: a key of `EXPERIMENTS`.
        seed: seed of the data, the training and the images.
        out: folder for the dataset and the run.
        base: the base model.
        changes: changes to the recipe.
    """
    experiment, start = EXPERIMENTS[name], time.process_time()
    pipeline = _start(experiment, seed, base)
    steps = 0
    if experiment.rows != "none":
        recipe = _recipe(experiment, seed, out, changes or {})
        rows = _clean_rows(out, seed, experiment.without) if experiment.rows == "clean" else _loose_rows(recipe)
        result = Trainer(recipe, pipeline, rows).run()
        cast(pipeline, torch.float32)
        steps = len(result.log)
    scores = score_table(generate_and_score(pipeline, held_out_prompts(), seed, out=out / "evaluation"))
    return {
        "scores": scores,
        "steps": steps,
        "processor_seconds": round(time.process_time() - start),
        "threads": torch.get_num_threads(),
    }


def _start(experiment: Experiment, seed: int, base: Path) -> Echo4oPipeline:
    if experiment.start == "base":
        pipeline = Echo4oPipeline.from_pretrained(base, dtype=torch.float32)
    else:
        vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32)
        pipeline = build_pipeline(AutoTokenizer.from_pretrained(base / "tokenizer"), vae, seed + 1)
    pipeline.set_progress_bar_config(desc="generating", leave=False)
    return pipeline


def _recipe(experiment: Experiment, seed: int, out: Path, changes: dict):
    own = {"output_dir": str(out / "run"), "data.path": str(out / "dataset"), "seed": seed}
    if experiment.rows == "loose":
        own["validation"] = None
    return load_recipe(bundled_recipe("quickstart_cpu"), own | changes)


def _clean_rows(out: Path, seed: int, without: str | None):
    """Returns the quickstart's dataset, without one part if it is named."""
    rows = {part: number for part, number in FULL.rows.items() if part != without}
    render_upstream(out / "upstream", rows, seed, LAYOUT)
    (out / "upstream" / "about.yaml").write_text(ABOUT, "utf-8")
    return read_upstream(out / "upstream", out / "dataset", out / "cache")


def _loose_rows(recipe) -> Dataset:
    """Returns new rows like those of the base model, one for each sample of the training."""
    return training_dataset(imperfect_rows(recipe.steps * recipe.batch_size, recipe.seed + 1000))


def record(name: str, seed: int, measured: dict, base: Path = BASE) -> None:
    """Stores a measurement in the base folder's record, by experiment and seed."""
    file = base / RECORD
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    known[name] = dict(sorted({**known.get(name, {}), str(seed): measured}.items()))
    write_json(file, {key: known[key] for key in EXPERIMENTS if key in known})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m echo4o.quickstart.control", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder for the runs")
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="the experiments; default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--base", type=Path, default=BASE, help="the base model's folder, which stores the record")
    options = parser.parse_args(arguments)
    for name in options.only:
        for seed in options.seeds:
            folder = options.out / f"{name.replace(' ', '_')}_{seed}"
            measured = measure(name, seed, folder, options.base)
            record(name, seed, measured, options.base)
            print(f"{name}, seed {seed}: {pooled({'': measured})}", flush=True)
    recorded = json.loads((options.base / RECORD).read_text("utf-8"))
    if recorded.keys() == EXPERIMENTS.keys():
        print(f"\n{comparison_table(recorded)}\n\n{parts_table(recorded)}")


if __name__ == "__main__":
    main()
