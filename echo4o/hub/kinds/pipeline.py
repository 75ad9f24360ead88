"""A pipeline folder: the whole model, with the code that loads it where the package is not installed."""

import inspect
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from math import prod
from pathlib import Path

import torch

from echo4o.hub.facts import base_of, is_repository, read_pictures, read_results, read_training
from echo4o.hub.kinds.base import SMALL_BYTES, Kind, Read
from echo4o.hub.remote import Source
from echo4o.model_cards.cards import pipeline_card
from echo4o.model_cards.facts import read_family
from echo4o.modeling.common.publishing import INDEX_NAME, PIPELINE_FILE
from echo4o.modeling.common.weights import DTYPES, StoredTensor, component_tensors, read_json, shortened
from echo4o.modeling.pipelines import pipeline_class


class Pipeline(Kind):
    name = "pipeline"

    def files(self, there: Mapping[str, Read]) -> dict[str, Source]:
        return super().files(there) | picture_files(self)

    def check(self) -> str:
        """The code for remote loading is complete; small weights are loaded, of large ones names and shapes compared."""
        require_code(self.folder)
        stored = stored_tensors(self.folder)
        if sum(t.nbytes for tensors in stored.values() for t in tensors.values()) <= SMALL_BYTES:
            pipeline_class(self.folder).from_pretrained(self.folder)
            return "it loads"
        for component, tensors in stored.items():
            require_same_tensors(component, empty_component(self.folder, component), tensors)
        return "configurations, names and shapes of all weights fit together; too large to be loaded here"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        return pipeline_card(
            repo,
            read_family(pipeline_class(self.folder)._card_family),
            weights_table(self.folder),
            has_released_sizes(self.folder),
            base_model=hub_base(self),
            datasets=hub_datasets(self),
            training=read_training(self.run),
            results=read_results(self.said.results, self.folder, repo),
            widget=widget(self),
        )


def require_code(folder: Path) -> None:
    """Raise ValueError unless each class that no library provides has its file in the folder."""
    index = read_json(folder / INDEX_NAME)
    components = {k: v[0] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    libraries = ("diffusers", "transformers", None)
    wanted = [PIPELINE_FILE] + [f"{k}/{stem}.py" for k, stem in components.items() if stem not in libraries]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, so that it would not load with trust_remote_code=True: save it "
            "again with echo4o.load_pipeline(FOLDER).save_pretrained(NEW)"
        )


def stored_tensors(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Component -> its tensors, from the headers of the files alone."""
    return {part.name: component_tensors(part) for part in sorted(folder.iterdir()) if any(part.glob("*.safetensors"))}


def weights_table(folder: Path) -> dict[str, dict]:
    """Component -> number of parameters, and the dtypes that most of them are stored in."""
    table = {}
    for component, tensors in stored_tensors(folder).items():
        dtypes = Counter()
        for tensor in tensors.values():
            dtypes[str(DTYPES[tensor.dtype]).removeprefix("torch.")] += tensor.nbytes
        parameters = sum(prod(tensor.shape) for tensor in tensors.values())
        table[component] = {"parameters": parameters, "dtype": dtypes.most_common(1)[0][0]}
    return table


def has_released_sizes(folder: Path) -> bool:
    """Whether the transformer has the sizes of the release, which are the defaults of its class."""
    config = read_json(folder / "transformer" / "config.json")
    parameters = inspect.signature(component_class(folder, "transformer").__init__).parameters
    sizes = {name: p.default for name, p in parameters.items() if isinstance(p.default, int)}
    return all(config.get(name, default) == default for name, default in sizes.items())


def component_class(folder: Path, component: str) -> type:
    """The class of a component, as the folder's index names it. Raises ValueError if it names none."""
    entry = pipeline_class(folder).load_config(folder).get(component)
    if not isinstance(entry, (list, tuple)) or not all(isinstance(name, str) for name in entry):
        raise ValueError(f"{folder / component} holds weights of a component that {INDEX_NAME} does not name")
    return getattr(import_module(entry[0]), entry[1])


def empty_component(folder: Path, component: str) -> torch.nn.Module:
    """The model that a component's configuration describes, without memory for its weights."""
    cls = component_class(folder, component)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder / component))


def require_same_tensors(component: str, model: torch.nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise ValueError unless a component's files hold what its configuration describes."""
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


# --- what pipelines and adapters share -------------------------------------------------------------------------------


def picture_files(kind: Kind) -> dict[str, Path]:
    """The pictures that the card shows, by their place in the repository."""
    shown = read_pictures(kind.run, kind.said.results)
    return {f"pictures/{number}{file.suffix}": file for number, (_, file) in enumerate(shown, start=1)}


def widget(kind: Kind) -> tuple[dict, ...]:
    """The same pictures as the Hub's gallery wants them."""
    shown = read_pictures(kind.run, kind.said.results)
    return tuple({"text": text, "output": {"url": url}} for (text, _), url in zip(shown, picture_files(kind)))


def hub_base(kind: Kind) -> str | None:
    """The Hub repository that it was trained from: as said, else as the recipe names it, if it is one.

    Raises:
        ValueError: what was said is not there.
    """
    if kind.said.base_model:
        return kind.hub.require(kind.said.base_model)
    base = base_of(kind.run)
    return base if base and is_repository(base) and kind.hub.exists(base) else None


def hub_datasets(kind: Kind) -> tuple[str, ...]:
    """The datasets on the Hub that it was trained on, likewise."""
    if kind.said.datasets:
        return tuple(kind.hub.require(name, "dataset") for name in kind.said.datasets)
    training = read_training(kind.run)
    named = [data.name for data in training.data if is_repository(data.name)] if training else []
    return tuple(name for name in named if kind.hub.exists(name, "dataset"))
