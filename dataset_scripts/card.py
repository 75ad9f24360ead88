"""The dataset card: which files are which configuration, their features, and a few words for people."""

from pathlib import Path

from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment

from echo4o.dataset_scripts.features import features
from echo4o.dataset_scripts.files import write_file
from echo4o.dataset_scripts.names import ALL, PARTS, SPLIT

TEMPLATE = Path(__file__).with_name("dataset_card.md.j2")
BEGIN, END = "<!-- echo4o: written by the builder, replaced at the next publication -->", "<!-- echo4o: end -->"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(path: Path, manifest: dict) -> None:
    """Write README.md of a dataset with this manifest."""
    write_file(path, str(make_card(manifest)))


def make_card(manifest: dict, before: str | None = None, repo: str = "echo-4o-image") -> DatasetCard:
    """The card of a dataset; of the text `before`, what people wrote around the builder's part is kept."""
    data = DatasetCardData(
        pretty_name="Echo-4o-Image",
        language=["en"],
        task_categories=["text-to-image", "image-to-image"],
        tags=["echo-4o", "synthetic", "multi-reference", "instruction-following"],
        size_categories=[_size_category(manifest["rows"]["accepted"])],
    )
    text = _text(manifest, repo)
    if before:
        old = DatasetCard(before, ignore_metadata_errors=True)
        data = DatasetCardData(**(data.to_dict() | old.data.to_dict()))
        for key in ("configs", "dataset_info"):
            data.__dict__.pop(key, None)
        start, end = old.text.find(BEGIN), old.text.find(END)
        inside = 0 <= start < end
        text = old.text[:start] + text.strip() + old.text[end + len(END) :] if inside else text + old.text
    _configurations(manifest).to_dataset_card_data(data)
    _infos(manifest).to_dataset_card_data(data)
    return DatasetCard(f"---\n{data}\n---\n\n{text.strip()}\n")


def _text(manifest: dict, repo: str) -> str:
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text("utf-8"))
    return template.render(manifest=manifest, repo=repo, begin=BEGIN, end=END, first=next(_present(manifest), ALL))


def _present(manifest: dict):
    return (name for name in PARTS if name in manifest["configurations"])


def _configurations(manifest: dict) -> MetadataConfigs:
    files = {name: f"data/{name}/{SPLIT}-*.parquet" for name in _present(manifest)}
    entries = {name: {"data_files": [{"split": SPLIT, "path": path}]} for name, path in files.items()}
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


def _size_category(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "1M<n<10M")
