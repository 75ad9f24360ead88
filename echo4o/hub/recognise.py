"""Finds out what a folder is: by its files, never by its name."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from echo4o.evaluation.metrics import METRICS, metric_path
from echo4o.hub.facts import LOG, RECIPE, run_of

# In this order: a kind's marks may be among the files of one below it.
KINDS = {"pipeline": "Pipeline", "adapter": "Adapter", "dataset": "Dataset", "results": "Results", "metric": "Metric"}
_HARMLESS = {"README.md", ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt"}


@dataclass(frozen=True)
class Found:
    """What to publish, and how it was found."""

    kind: type
    folder: Path
    run: Path | None
    told: str  # to the one who pushes


def kind_class(name: str) -> type:
    """The class of a kind; imported when it is needed, because some take seconds."""
    return getattr(import_module(f"echo4o.hub.kinds.{name}"), KINDS[name])


def kind_of(names: set[str]) -> str | None:
    """The kind of a folder or repository with these files; "other" is none of ours, None nothing at all."""
    for kind, marks in _MARKS.items():
        if any(all(name in names for name in mark) for mark in marks):
            return kind
    return "other" if names - _HARMLESS else None


# Any of these; each is a set of files that are there together.
_MARKS = {
    "pipeline": [("model_index.json",)],
    "adapter": [("pytorch_lora_weights.safetensors",), ("adapter_model.safetensors", "adapter_config.json")],
    "dataset": [("manifest.json",)],
    "results": [("result.json", "records.jsonl"), ("result.json", "metadata.jsonl")],
    "metric": [("app.py", "formula.py"), ("app.py", "requirements.txt")],
}


def recognise(target: str | Path) -> Found:
    """What a folder is, or the metric of a name; a finished run stands for what it exported.

    Raises:
        ValueError: nothing that can be published.
        FileNotFoundError: no such folder.
    """
    folder = Path(target)
    if not folder.exists() and str(target) in METRICS:
        folder = Path(metric_path(str(target)))
    if not folder.is_dir():
        raise FileNotFoundError(f"{target}: there is no such folder (nor metric: {', '.join(METRICS)})")
    if (folder / RECIPE).is_file() and (folder / LOG).is_file():
        for export in ("adapter", "pipeline"):
            if (folder / export).is_dir():
                told = f"{folder} is a training run; what it made is the {export} {folder / export}"
                return Found(kind_class(export), folder / export, folder, told)
        raise ValueError(
            f"{folder} is a training run that has not ended: `echo4o export {folder} --out DIR`, and push DIR"
        )
    kind = kind_of({path.name for path in folder.iterdir()})
    if kind in KINDS:
        return Found(kind_class(kind), folder, run_of(folder), f"{folder} is a {kind.removesuffix('s')}")
    raise ValueError(f"{folder} is nothing that can be published: {_hint(folder)}")


def _hint(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if {"ema.safetensors", "llm_config.json"} & names:
        return f"it looks like an original checkpoint; `echo4o convert {folder} NEW` makes a pipeline of it"
    if {"dataset_info.json", "state.json", "dataset_dict.json"} & names or any(n.endswith(".parquet") for n in names):
        return "it looks like rows of `datasets`, whose own push_to_hub publishes them"
    if any(folder.glob("*/*.jsonl")):
        return f"it looks like a release in the published layout; `echo4o dataset build {folder} --out NEW` makes a dataset of it"
    return (
        "a pipeline has model_index.json, an adapter pytorch_lora_weights.safetensors, a dataset manifest.json, a "
        "benchmark's result result.json, a metric app.py and formula.py, a training run recipe.yaml and train_log.jsonl"
    )
