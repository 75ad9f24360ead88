"""Recognises the kind of a folder by the files in it."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from echo4o.evaluation.metrics import METRICS, metric_path
from echo4o.hub.facts import LOG, RECIPE, run_of
from echo4o.hub.kinds.base import Kind

# In this order: the files that identify a kind may also occur in a folder of a later kind.
KINDS = {
    "pipeline": "PipelineKind",
    "adapter": "AdapterKind",
    "dataset": "DatasetKind",
    "results": "ResultsKind",
    "app": "AppKind",
    "metric": "MetricKind",
}
_HARMLESS = {"README.md", ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt"}


@dataclass(frozen=True)
class PublishableFolder:
    """A folder to publish, with its kind and the training run that exported it."""

    kind: type[Kind]
    folder: Path
    run: Path | None
    description: str  # a sentence for the user


def kind_class(name: str) -> type[Kind]:
    """Returns the class of a kind. Imported only now, because some of the modules take seconds to import."""
    return getattr(import_module(f"echo4o.hub.kinds.{name}"), KINDS[name])


def kind_of(names: set[str]) -> str | None:
    """Returns the kind of a folder or repository with these files, "other" for an unknown one, None for an empty one."""
    for kind, alternatives in _IDENTIFYING_FILES.items():
        if any(all(name in names for name in files) for files in alternatives):
            return kind
    return "other" if names - _HARMLESS else None


# kind -> sets of files; a folder is of this kind if it has all files of one set.
_IDENTIFYING_FILES = {
    "pipeline": [("model_index.json",)],
    "adapter": [("pytorch_lora_weights.safetensors",), ("adapter_model.safetensors", "adapter_config.json")],
    "dataset": [("manifest.json",)],
    "results": [("result.json", "records.jsonl"), ("result.json", "metadata.jsonl")],
    "app": [("app.py", "echo4o_app.json")],
    "metric": [("app.py", "formula.py"), ("app.py", "requirements.txt")],
}


def recognise(target: str | Path) -> PublishableFolder:
    """Recognises a folder to publish.

    Args:
        target: a folder, or the name of a bundled metric. For a finished training run, its exported adapter or pipeline
            is returned.

    Raises:
        ValueError: the folder is not of a kind that can be published.
        FileNotFoundError: there is no such folder.
    """
    folder = Path(target)
    if not folder.exists() and str(target) in METRICS:
        folder = Path(metric_path(str(target)))
    if not folder.is_dir():
        raise FileNotFoundError(f"{target}: there is no such folder (nor metric: {', '.join(METRICS)})")
    if (folder / RECIPE).is_file() and (folder / LOG).is_file():
        for export in ("adapter", "pipeline"):
            if (folder / export).is_dir():
                description = f"{folder} is a training run that exported the {export} {folder / export}"
                return PublishableFolder(kind_class(export), folder / export, folder, description)
        raise ValueError(
            f"{folder} is a training run that has not finished: run `echo4o export {folder} --out DIR`, then push DIR"
        )
    kind = kind_of({path.name for path in folder.iterdir()})
    if kind in KINDS:
        return PublishableFolder(kind_class(kind), folder, run_of(folder), f"{folder} is a {kind.removesuffix('s')}")
    raise ValueError(f"{folder} cannot be published: {_hint(folder)}")


def _hint(folder: Path) -> str:
    """Explains what an unknown folder seems to be, or which files identify each kind."""
    names = {path.name for path in folder.iterdir()}
    if {"ema.safetensors", "llm_config.json"} & names:
        return f"it looks like an original checkpoint; convert it to a pipeline with `echo4o convert {folder} NEW`"
    if {"dataset_info.json", "state.json", "dataset_dict.json"} & names or any(n.endswith(".parquet") for n in names):
        return "it looks like a dataset of the `datasets` library; publish it with its push_to_hub method"
    if any(folder.glob("*/*.jsonl")):
        return f"it looks like a release in the layout of Echo-4o-Image; build a dataset with `echo4o dataset build {folder} --out NEW`"
    return (
        "a pipeline has model_index.json, an adapter pytorch_lora_weights.safetensors, a dataset manifest.json, a "
        "benchmark's result result.json, a metric app.py and formula.py, a training run recipe.yaml and train_log.jsonl"
    )
