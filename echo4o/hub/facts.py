"""Reads the facts for the card of a model from its run and its evaluations: recipe, log, results, sample images."""

import json
from pathlib import Path
from typing import Any, Literal

import yaml

from echo4o.common.files import read_json
from echo4o.common.hub_names import is_repository_name
from echo4o.common.json_lines import JsonLines
from echo4o.dataset_scripts.manifest import MANIFEST
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.folder import IMAGES, PROMPTS, RESULT
from echo4o.model_cards.eval_results import DATASETS, eval_results_path, eval_results_yaml
from echo4o.model_cards.facts import About, Dataset, Result, Training, Validation
from echo4o.training.recipe_files import load_recipe
from echo4o.training.validation_result import ValidationResult, read_validations

RECIPE, LOG = "recipe.yaml", "train_log.jsonl"
MAX_SAMPLE_IMAGES = 4  # of a card
_LOCAL_SETTINGS = ("output_dir", "resume", "trackers", "cache_mb", "checkpoints", "images")


def run_of(folder: Path) -> Path | None:
    """Returns the finished training run that exported this folder; None if there is none."""
    run = folder.resolve().parent
    is_export = folder.name in ("pipeline", "adapter")
    return run if is_export and (run / RECIPE).is_file() and (run / LOG).is_file() else None


def base_of(run: Path | None) -> str | None:
    """Returns the model that a run started from: a folder or a Hub repository."""
    return load_recipe(run / RECIPE).model if run else None


def read_training(run: Path | None) -> Training | None:
    """Reads recipe and log of a training run for its card. Local paths are reduced to names."""
    if run is None:
        return None
    recipe = load_recipe(run / RECIPE)
    log = [json.loads(line) for line in (run / LOG).read_text("utf-8").split("\n") if line]
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _LOCAL_SETTINGS}
    values["model"] = _public_name(values["model"])
    values["latents"] = values["latents"] and _public_name(values["latents"])
    values["data"] = [entry | {"path": _public_name(entry["path"])} for entry in values["data"]]
    if values["validation"] and values["validation"]["data"]:
        data = [entry | {"path": _public_name(entry["path"])} for entry in values["validation"]["data"]]
        values["validation"]["data"] = data
    validations = read_validations(run)
    return Training(
        recipe=yaml.safe_dump(values, sort_keys=False),
        method=recipe.tune.describe(),
        steps=len(log),
        samples=int(log[-1]["samples"]),
        seconds=log[-1]["seconds"],
        data=[_dataset(entry.path) for entry in recipe.data],
        validation=_validation(validations) if validations else None,
    )


def _validation(results: list[ValidationResult]) -> Validation:
    """The first and the last validation of a run, number by number."""
    before, after = results[0].flat(), results[-1].flat()
    names = [name for name in after if not name.startswith("time_")]
    return Validation(results[-1].rows, results[-1].step, {name: (before.get(name), after[name]) for name in names})


def _dataset(path: str) -> Dataset:
    """Reads name, size and origin of a dataset; the origin is in its manifest only."""
    manifest = read_json(Path(path) / MANIFEST) if Path(path).is_dir() else None
    if not manifest:
        return Dataset(_public_name(path))
    rows = sum(facts["rows"] for facts in manifest["configurations"].values())
    return Dataset(_public_name(path), rows, About.model_validate(manifest["source"].get("about") or {}))


def _public_name(path: str) -> str:
    """Returns the name of a Hub repository, or the last part of a local path."""
    return path if is_repository(path) else Path(path).name


def is_repository(name: str) -> bool:
    """Whether this names a Hub repository and not a local folder."""
    return not Path(name).exists() and is_repository_name(name)


def read_results(
    places: tuple[Path, ...], model: Path, repo: str, kind: Literal["model", "adapter"] = "model"
) -> tuple[Result, ...]:
    """Reads the results of `echo4o evaluate` about a model or an adapter.

    Args:
        places: evaluation folders, or their result.json files.
        model: folder of the model, or of the adapter.
        repo: the Hub repository that it is published to.
        kind: whether `model` is a model or an adapter.

    Raises:
        ValueError: a result is about another model or adapter.
    """
    found = []
    for place in places:
        values = result_values(place)
        used = {key: values.get(key) for key in ("model", "adapter")}  # both None: images of another program
        other = _is_other(used[kind], model, repo) or (kind == "model" and used["adapter"])
        if any(used.values()) and other:
            names = " with the adapter ".join(str(name) for name in used.values() if name)
            raise ValueError(f"{place}: its images were generated with {names}, not with {model} or {repo}")
        found.append(Result(get_benchmark(values["benchmark"]).title, values))
    return tuple(found)


def eval_result_files(places: tuple[Path, ...], datasets: tuple[str, ...]) -> dict[str, bytes]:
    """Returns `.eval_results/<benchmark>.yaml` of the results whose benchmark has a known dataset on the Hub.

    Args:
        places: evaluation folders, or their result.json files.
        datasets: BENCHMARK=DATASET or BENCHMARK=DATASET#TASK, beside those that are known.

    Raises:
        ValueError: an entry of `datasets` is malformed, or names a benchmark without a result.
    """
    known, results = dict(DATASETS), {}
    for place in places:
        values = result_values(place)
        if values["score"] is not None:
            results[values["benchmark"]] = Result(get_benchmark(values["benchmark"]).title, values)
    for given in datasets:
        name, equals, dataset = given.partition("=")
        if not equals or name not in results:
            scored = ", ".join(results) or "none"
            raise ValueError(f"{given}: needed is BENCHMARK=DATASET of a result with a score; there are {scored}")
        known[name] = dataset
    files = {}
    for name, result in results.items():
        if name in known:
            dataset, _, task = known[name].partition("#")
            files[eval_results_path(result)] = eval_results_yaml(result, dataset, task or "default").encode()
    return files


def result_values(place: Path) -> dict[str, Any]:
    """Reads `result.json`. Raises ValueError if the folder was not scored."""
    file = place / RESULT if place.is_dir() else place
    values = read_json(file)
    if not isinstance(values, dict) or not {"benchmark", "score", "coverage", "intervals"} <= values.keys():
        raise ValueError(f"{place} is not a result: run `echo4o evaluate score --out {file.parent}` first")
    return values


def _is_other(used: str | None, model: Path, repo: str) -> bool:
    return used != repo and Path(used or "").name != model.resolve().name


def read_sample_images(run: Path | None, places: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """Returns up to four sample images as (prompt, file), not selected by quality.

    They are the images of the last step of the run that has any; without these, the first images of a result.
    """
    folders = [run / name for name in ("images", "pictures")] if run else []  # 0.1 wrote `pictures`
    steps = sorted((step for folder in folders for step in folder.glob("step-*")), key=lambda step: step.name)
    if run and steps:
        settings = load_recipe(run / RECIPE).images
        files = sorted(steps[-1].glob("*.png"), key=lambda f: int(f.stem))
        texts = [sample.prompt for sample in settings.sample_prompts()] if settings else []
        if texts and len(files) >= len(texts):  # images of validation rows follow
            return list(zip(texts, files))[:MAX_SAMPLE_IMAGES]
    for place in places:
        folder = place if place.is_dir() else place.parent
        rows = [row for row in list(JsonLines(folder / PROMPTS))[1:] if not row["references"]]
        files = [(row["text"], image_of(folder, row["id"])) for row in rows]
        if found := [(text, file) for text, file in files if file]:
            return found[:MAX_SAMPLE_IMAGES]
    return []


def image_of(folder: Path, prompt_id: str) -> Path | None:
    """Returns the first image of a prompt in an evaluation folder; None if there is none."""
    names = [f"{prompt_id}{number}.{kind}" for number in ("", "_1") for kind in ("png", "jpg", "jpeg", "webp")]
    return next((folder / IMAGES / name for name in names if (folder / IMAGES / name).is_file()), None)
