"""Publishes a pipeline: all weights, with the code that loads them where the package is not installed."""

import inspect
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from math import prod
from pathlib import Path

import torch

from echo4o.hub.facts import base_of, eval_result_files, is_repository, read_results, read_sample_images, read_training
from echo4o.hub.kinds.base import SMALL_BYTES, Kind, Read
from echo4o.hub.remote import Source
from echo4o.model_cards.cards import pipeline_card
from echo4o.model_cards.facts import read_family
from echo4o.modeling.common.publishing import INDEX_NAME, PIPELINE_FILE
from echo4o.modeling.common.weights import DTYPES, StoredTensor, component_tensors, read_json, shortened
from echo4o.modeling.pipelines import pipeline_class


class PipelineKind(Kind):
    name = "pipeline"

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        return super().files(published) | sample_image_files(self) | eval_results(self)

    def check(self) -> str:
        """Checks the code for remote loading; loads small weights, and compares names and shapes of large ones."""
        require_code(self.folder)
        stored = stored_tensors(self.folder)
        if sum(t.nbytes for tensors in stored.values() for t in tensors.values()) <= SMALL_BYTES:
            pipeline_class(self.folder).from_pretrained(self.folder)
            return "it loads"
        for component, tensors in stored.items():
            require_same_tensors(component, empty_component(self.folder, component), tensors)
        return "names and shapes of all weights match the configurations; too large to load here"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        return pipeline_card(
            repo,
            read_family(pipeline_class(self.folder)._card_family),
            weights_table(self.folder),
            has_released_sizes(self.folder),
            base_model=hub_base(self),
            datasets=hub_datasets(self),
            training=read_training(self.run),
            results=read_results(self.details.results, self.folder, repo),
            widget=widget(self),
        )


def require_code(folder: Path) -> None:
    """Raises ValueError unless the folder has the file of every class that is not from a library."""
    index = read_json(folder / INDEX_NAME)
    components = {k: v[0] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    libraries = ("diffusers", "transformers", None)
    wanted = [PIPELINE_FILE] + [f"{k}/{stem}.py" for k, stem in components.items() if stem not in libraries]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, so it would not load with trust_remote_code=True: save it "
            "again with echo4o.load_pipeline(FOLDER).save_pretrained(NEW)"
        )


def stored_tensors(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Returns the tensors of each component, read from the headers of the files."""
    return {part.name: component_tensors(part) for part in sorted(folder.iterdir()) if any(part.glob("*.safetensors"))}


def weights_table(folder: Path) -> dict[str, dict]:
    """Returns the number of parameters and the most common dtype of each component."""
    table = {}
    for component, tensors in stored_tensors(folder).items():
        dtypes = Counter()
        for tensor in tensors.values():
            dtypes[str(DTYPES[tensor.dtype]).removeprefix("torch.")] += tensor.nbytes
        parameters = sum(prod(tensor.shape) for tensor in tensors.values())
        table[component] = {"parameters": parameters, "dtype": dtypes.most_common(1)[0][0]}
    return table


def has_released_sizes(folder: Path) -> bool:
    """Whether the transformer has the sizes of the released checkpoint, which are the defaults of its class."""
    config = read_json(folder / "transformer" / "config.json")
    parameters = inspect.signature(component_class(folder, "transformer").__init__).parameters
    sizes = {name: p.default for name, p in parameters.items() if isinstance(p.default, int)}
    return all(config.get(name, default) == default for name, default in sizes.items())


def component_class(folder: Path, component: str) -> type:
    """Returns the class of a component from the index of the folder. Raises ValueError if the index does not name it."""
    entry = pipeline_class(folder).load_config(folder).get(component)
    if not isinstance(entry, (list, tuple)) or not all(isinstance(name, str) for name in entry):
        raise ValueError(f"{folder / component} holds weights of a component that {INDEX_NAME} does not name")
    return getattr(import_module(entry[0]), entry[1])


def empty_component(folder: Path, component: str) -> torch.nn.Module:
    """Returns a component with its weights on the meta device, from its configuration."""
    cls = component_class(folder, component)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder / component))


def require_same_tensors(component: str, model: torch.nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raises ValueError unless the stored tensors of a component have the names and shapes of the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{component}: missing {name}" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"{component}: unexpected {name}" for name in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{component}: {name} has the shape {stored[name].shape}, not {expected[name]}"
        for name in sorted(expected.keys() & stored.keys())
        if stored[name].shape != expected[name]
    ]
    if problems:
        raise ValueError(f"The weights cannot be used:\n  {shortened(problems, limit=8)}")


# --- shared by pipelines and adapters ---------------------------------------------------------------------------------


def sample_image_files(kind: Kind) -> dict[str, Path]:
    """Returns the sample images of the card, by their path in the repository."""
    samples = read_sample_images(kind.run, kind.details.results)
    return {f"samples/{number}{file.suffix}": file for number, (_, file) in enumerate(samples, start=1)}


def eval_results(kind: Kind) -> dict[str, Source]:
    """Returns the results in the Hub's form for leaderboards, by their path in the repository."""
    return dict(eval_result_files(kind.details.results, kind.details.benchmark_datasets))


def widget(kind: Kind) -> tuple[dict, ...]:
    """Returns the sample images as the `widget` field of a card, which the Hub shows as a gallery."""
    samples = read_sample_images(kind.run, kind.details.results)
    return tuple({"text": text, "output": {"url": url}} for (text, _), url in zip(samples, sample_image_files(kind)))


def hub_base(kind: Kind) -> str | None:
    """Returns the Hub repository of the base model: the one that the user passed, else the one in the recipe.

    Raises:
        ValueError: the repository that the user passed does not exist.
    """
    if kind.details.base_model:
        return kind.hub.require(kind.details.base_model)
    base = base_of(kind.run)
    return base if base and is_repository(base) and kind.hub.exists(base) else None


def hub_datasets(kind: Kind) -> tuple[str, ...]:
    """Returns the Hub datasets that the model was trained on, likewise."""
    if kind.details.datasets:
        return tuple(kind.hub.require(name, "dataset") for name in kind.details.datasets)
    training = read_training(kind.run)
    named = [data.name for data in training.data if is_repository(data.name)] if training else []
    return tuple(name for name in named if kind.hub.exists(name, "dataset"))
