"""The dataset card: which files are which configuration, and their features; the text is in `model_cards`."""

from pathlib import Path

from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from echo4o.common.files import write_text
from echo4o.dataset_scripts.features import features
from echo4o.dataset_scripts.names import ALL, PARTS, SPLIT
from echo4o.model_cards.cards import dataset_card
from echo4o.model_cards.facts import About


def write_card(path: Path, manifest: dict) -> None:
    """Write README.md of a dataset with this manifest."""
    write_text(path, make_card(manifest))


def make_card(manifest: dict, repo: str = "echo-4o-image") -> str:
    """The card of a dataset with this manifest."""
    data = DatasetCardData()
    _configurations(manifest).to_dataset_card_data(data)
    _infos(manifest).to_dataset_card_data(data)
    infos = data["dataset_info"]
    infos = infos if isinstance(infos, list) else [infos]
    return dataset_card(repo, manifest, about_of(manifest), data["configs"], infos)


def about_of(manifest: dict) -> About:
    """The description from the release's about.yaml; the default describes Echo-4o-Image."""
    return About.model_validate(manifest["source"].get("about") or {})


def _present(manifest: dict):
    return (name for name in PARTS if name in manifest["configurations"])


def _configurations(manifest: dict) -> MetadataConfigs:
    files = {name: f"data/{name}/{SPLIT}-*" for name in _present(manifest)}
    entries: dict[str, dict] = {name: {"data_files": [{"split": SPLIT, "path": path}]} for name, path in files.items()}
    entries[ALL] = {"data_files": [{"split": SPLIT, "path": list(files.values())}], "default": True}
    return MetadataConfigs(entries)


def _infos(manifest: dict) -> DatasetInfosDict:
    facts = {name: manifest["configurations"][name] for name in _present(manifest)}
    total = {key: sum(f[key] for f in facts.values()) for key in ("rows", "bytes", "content_bytes")}
    infos = DatasetInfosDict()
    for name, sums in (facts | {ALL: total}).items():
        split = SplitInfo(SPLIT, num_bytes=sums["content_bytes"], num_examples=sums["rows"])
        infos[name] = DatasetInfo(
            features=features(),
            config_name=name,
            splits=SplitDict({SPLIT: split}),
            download_size=sums["bytes"],
            dataset_size=sums["content_bytes"],
        )
    return infos
