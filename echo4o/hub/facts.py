"""Reads what a card says about a model from the files that say it: recipe, log, results, pictures."""

import json
from pathlib import Path
from typing import Any

import yaml

from echo4o.common.files import read_json
from echo4o.common.hub_names import is_repository_name
from echo4o.common.json_lines import JsonLines
from echo4o.dataset_scripts.manifest import MANIFEST
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.folder import IMAGES, PROMPTS, RESULT
from echo4o.model_cards.facts import About, Dataset, Result, Training
from echo4o.training.recipe_files import load_recipe

RECIPE, LOG = "recipe.yaml", "train_log.jsonl"
SHOWN = 4  # pictures of a card
_NOT_SHOWN = ("output_dir", "resume", "trackers", "cache_mb", "checkpoints", "images")


def run_of(folder: Path) -> Path | None:
    """The finished run that left this folder."""
    run = folder.resolve().parent
    named = folder.name in ("pipeline", "adapter")
    return run if named and (run / RECIPE).is_file() and (run / LOG).is_file() else None


def base_of(run: Path | None) -> str | None:
    """The model that a run started from: a folder or a Hub repository."""
    return load_recipe(run / RECIPE).model if run else None


def read_training(run: Path | None) -> Training | None:
    """A run in the words of its card; no path of this machine is among them."""
    if run is None:
        return None
    recipe = load_recipe(run / RECIPE)
    log = [json.loads(line) for line in (run / LOG).read_text("utf-8").splitlines()]
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _NOT_SHOWN}
    values["model"] = _without_place(values["model"])
    values["latents"] = values["latents"] and _without_place(values["latents"])
    values["data"] = [entry | {"path": _without_place(entry["path"])} for entry in values["data"]]
    return Training(
        recipe=yaml.safe_dump(values, sort_keys=False),
        method=recipe.tune.describe(),
        steps=len(log),
        samples=int(log[-1]["samples"]),
        seconds=log[-1]["seconds"],
        data=[_dataset(entry.path) for entry in recipe.data],
    )


def _dataset(path: str) -> Dataset:
    """What is known of a dataset; only its manifest says where its pictures come from."""
    manifest = read_json(Path(path) / MANIFEST) if Path(path).is_dir() else None
    if not manifest:
        return Dataset(_without_place(path))
    rows = sum(facts["rows"] for facts in manifest["configurations"].values())
    return Dataset(_without_place(path), rows, About.model_validate(manifest["source"].get("about") or {}))


def _without_place(path: str) -> str:
    """A Hub repository as it is, a folder without where it lies."""
    return path if is_repository(path) else Path(path).name


def is_repository(name: str) -> bool:
    """Whether this is a Hub repository rather than a folder."""
    return not Path(name).exists() and is_repository_name(name)


def read_results(places: tuple[Path, ...], model: Path, repo: str, what: str = "model") -> tuple[Result, ...]:
    """Results of `echo4o evaluate` about this model; `what` is "model" or "adapter".

    Raises:
        ValueError: one is about another model, or about the model with an adapter, or without this one.
    """
    found = []
    for place in places:
        values = result_values(place)
        drawn_with = {key: values.get(key) for key in ("model", "adapter")}  # both None: pictures made elsewhere
        known = any(drawn_with.values())
        if known and (_is_other(drawn_with[what], model, repo) or (what == "model" and drawn_with["adapter"])):
            named = " with the adapter ".join(str(name) for name in drawn_with.values() if name)
            raise ValueError(f"{place}: its pictures were drawn with {named}, not with {model} or {repo}")
        found.append(Result(get_benchmark(values["benchmark"]).title, values))
    return tuple(found)


def result_values(place: Path) -> dict[str, Any]:
    """What `result.json` holds; ValueError when the folder was not scored."""
    file = place / RESULT if place.is_dir() else place
    values = read_json(file)
    if not isinstance(values, dict) or not {"benchmark", "score", "coverage", "intervals"} <= values.keys():
        raise ValueError(f"{place} is no result: run `echo4o evaluate score --out {file.parent}` first")
    return values


def _is_other(drawn_with: str | None, model: Path, repo: str) -> bool:
    return drawn_with != repo and Path(drawn_with or "").name != model.resolve().name


def read_pictures(run: Path | None, places: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """(prompt, file) of up to four pictures: the run's last ones, else the first ones of a result; none is chosen."""
    folders = [run / name for name in ("images", "pictures")] if run else []  # 0.1 wrote `pictures`
    steps = sorted((step for folder in folders for step in folder.glob("step-*")), key=lambda step: step.name)
    if run and steps:
        settings = load_recipe(run / RECIPE).images
        files = sorted(steps[-1].glob("*.png"), key=lambda f: int(f.stem))
        if settings and len(files) == len(settings.prompts):
            return list(zip(settings.prompts, files))[:SHOWN]
    for place in places:
        folder = place if place.is_dir() else place.parent
        rows = [row for row in list(JsonLines(folder / PROMPTS))[1:] if not row["references"]]
        files = [(row["text"], picture_of(folder, row["id"])) for row in rows]
        if found := [(text, file) for text, file in files if file]:
            return found[:SHOWN]
    return []


def picture_of(folder: Path, prompt_id: str) -> Path | None:
    """The first picture of a prompt in an evaluated folder."""
    names = [f"{prompt_id}{number}.{kind}" for number in ("", "_1") for kind in ("png", "jpg", "jpeg", "webp")]
    return next((folder / IMAGES / name for name in names if (folder / IMAGES / name).is_file()), None)
