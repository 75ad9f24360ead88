"""Statistics of a built dataset. Images are read only if the metadata lacks their facts."""

import heapq
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from echo4o.dataset_scripts.contamination import PromptIndex, PromptMatch
from echo4o.dataset_scripts.loading import parquet_files
from echo4o.dataset_scripts.manifest import listed_shards, read_manifest
from echo4o.dataset_scripts.names import ALL
from echo4o.dataset_scripts.row_groups import open_file
from echo4o.dataset_scripts.validate import is_built
from echo4o.modeling.common.image_files import seen_size

_TEXTS = ["id", "instruction", "task", "category", "source", "metadata"]
_IMAGES = ["image", "reference_images"]
SAMPLES = 6  # of each configuration in the gallery


@dataclass
class ConfigurationStats:
    """The counts of one configuration."""

    rows: int = 0
    tasks: Counter = field(default_factory=Counter)
    categories: Counter = field(default_factory=Counter)
    words: Counter = field(default_factory=Counter)  # words of the instruction -> rows
    sizes: Counter = field(default_factory=Counter)  # (width, height) -> rows
    formats: Counter = field(default_factory=Counter)
    references: Counter = field(default_factory=Counter)  # number of reference images -> rows
    bytes: int = 0

    def summary(self) -> dict:
        """As JSON: counts, most frequent first, and the quartiles of the lengths."""
        return {
            "rows": self.rows,
            "tasks": dict(self.tasks.most_common()),
            "categories": dict(self.categories.most_common()),
            "instruction_words": quantiles(self.words),
            "image_sizes": {f"{w}x{h}": n for (w, h), n in self.sizes.most_common()},
            "formats": dict(self.formats.most_common()),
            "reference_images": {str(n): rows for n, rows in sorted(self.references.items())},
            "mean_image_bytes": round(self.bytes / self.rows) if self.rows else 0,
        }


@dataclass
class GalleryRow:
    """A row of the gallery and the position of its images."""

    file: str
    group: int
    index: int
    row: dict


@dataclass
class DatasetStats:
    """Statistics of all configurations, contamination, and example rows."""

    numbers: dict[str, ConfigurationStats] = field(default_factory=dict)
    matches: list[PromptMatch] = field(default_factory=list)
    prompts: Counter = field(default_factory=Counter)  # benchmark -> prompts compared with
    samples: dict[str, list[GalleryRow]] = field(default_factory=dict)

    def summary(self) -> dict:
        contamination = {
            "prompts": dict(self.prompts),
            "rows": len({m.id for m in self.matches}),
            "equal": sum(m.overlap == 1 for m in self.matches),
            "matches": [vars(m) for m in self.matches],
        }
        return {
            "configurations": {name: numbers.summary() for name, numbers in self.numbers.items()},
            "contamination": contamination if self.prompts else None,
        }


def quantiles(counts: Counter) -> dict[str, int]:
    """Smallest, quartiles and largest of counted values."""
    values, total = sorted(counts), counts.total()
    if not total:
        return {}
    result, passed, names = {}, 0, iter([("min", 0), ("25%", 0.25), ("50%", 0.5), ("75%", 0.75), ("max", 1)])
    name, share = next(names)
    for value in values:
        passed += counts[value]
        while passed >= max(1, share * total):
            result[name] = value
            name, share = next(names, (None, 2))
            if name is None:
                return result
    return result


def collect(
    data: str | Path,
    configuration: str = ALL,
    prompts: PromptIndex | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> DatasetStats:
    """Count the rows of a built folder or of a repository with Parquet files."""
    stats = DatasetStats(prompts=Counter(name for name, *_ in prompts.prompts) if prompts else Counter())
    smallest: dict[str, list] = {}
    for name, file in _files(data, configuration):
        numbers = stats.numbers.setdefault(name, ConfigurationStats())
        for group, rows in _groups(file):
            for index, row in enumerate(rows):
                _count(numbers, row)
                if prompts:
                    stats.matches += prompts.matches(row["id"], row["instruction"])
                # The rows with the smallest ids: an arbitrary but reproducible choice.
                entry = (_Descending(row["id"] or ""), GalleryRow(file, group, index, row))
                chosen = smallest.setdefault(name, [])
                (heapq.heappush if len(chosen) < SAMPLES else heapq.heappushpop)(chosen, entry)
            progress(len(rows))
    stats.matches.sort(key=lambda m: (-m.overlap, m.benchmark, m.prompt, m.id))
    stats.samples = {name: [s for _, s in sorted(chosen, reverse=True)] for name, chosen in smallest.items()}
    return stats


class _Descending(str):
    """A text with reversed order, so that a heap drops the largest."""

    def __lt__(self, other) -> bool:
        return str.__gt__(self, other)


def _files(data: str | Path, configuration: str) -> Iterator[tuple[str, str]]:
    if is_built(data):
        for name, shard in listed_shards(read_manifest(Path(data))):
            if configuration in (ALL, name):
                yield name, str(Path(data) / shard["file"])
        return
    for file in parquet_files(data, configuration):
        folder = file.split("/")[-2]
        yield (folder if configuration == ALL else configuration), file


def _groups(file: str) -> Iterator[tuple[int, list[dict]]]:
    with open_file(file) as stream:
        parquet = pq.ParquetFile(stream)
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=_TEXTS).to_pylist()
            facts = [_facts(row["metadata"]) for row in rows]
            if not all(facts):  # not in the metadata: read the images
                images = parquet.read_row_group(group, columns=_IMAGES).to_pylist()
                facts = [known or _read_facts(stored) for known, stored in zip(facts, images)]
            yield group, [row | {"facts": known} for row, known in zip(rows, facts)]


def _facts(metadata: str | None) -> dict | None:
    try:
        known = json.loads(metadata or "null")
        image = {key: known["image"][key] for key in ("format", "width", "height", "bytes")}
        return {"image": image, "references": len(known["reference_images"])}
    except (ValueError, KeyError, TypeError):
        return None


def _read_facts(stored: dict) -> dict:
    data = stored["image"]["bytes"]
    with Image.open(io.BytesIO(data)) as image:
        width, height = seen_size(image)
        facts = {"format": image.format, "width": width, "height": height, "bytes": len(data)}
    return {"image": facts, "references": len(stored["reference_images"] or [])}


def _count(numbers: ConfigurationStats, row: dict) -> None:
    image = row["facts"]["image"]
    numbers.rows += 1
    numbers.tasks[row["task"]] += 1
    numbers.categories[row["category"] or "(none)"] += 1
    numbers.words[len(row["instruction"].split())] += 1
    numbers.sizes[image["width"], image["height"]] += 1
    numbers.formats[image["format"]] += 1
    numbers.references[row["facts"]["references"]] += 1
    numbers.bytes += image["bytes"]
