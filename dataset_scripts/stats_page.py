"""The statistics of a dataset as one HTML page, with plots and a gallery; nothing is fetched from elsewhere."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from jinja2 import Environment

from echo4o.common.files import write_text
from echo4o.common.thumbnails import figure_uri, thumbnail_uri
from echo4o.dataset_scripts.row_groups import open_file
from echo4o.dataset_scripts.stats import ConfigurationStats, DatasetStats, GalleryRow
from echo4o.modeling.common.image_files import open_image

TEMPLATE = Path(__file__).with_name("stats_page.html.j2")
_THUMBNAIL = 256
_MATCHES = 200


def write_page(path: Path, stats: DatasetStats, title: str) -> None:
    """Write the page; plots and images are embedded."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text("utf-8")
    )
    galleries = {name: [_card(sample) for sample in samples] for name, samples in stats.samples.items()}
    plots = {name: _plots(numbers) for name, numbers in stats.numbers.items()}
    text = template.render(
        title=title,
        summary=stats.summary(),
        plots=plots,
        galleries=galleries,
        matches=stats.matches[:_MATCHES],
        more=max(0, len(stats.matches) - _MATCHES),
        checked=sum(stats.prompts.values()),
    )
    write_text(path, text)


def _card(sample: GalleryRow) -> dict:
    with open_file(sample.file) as stream:
        table = pq.ParquetFile(stream).read_row_group(sample.group, columns=["image", "reference_images"])
    stored = table.slice(sample.index, 1).to_pylist()[0]
    return {
        "row": sample.row,
        "image": thumbnail_uri(open_image(stored["image"]["bytes"]), _THUMBNAIL),
        "references": [thumbnail_uri(open_image(r["bytes"]), _THUMBNAIL) for r in stored["reference_images"] or []],
    }


def _plots(numbers: ConfigurationStats) -> str:
    """Lengths, categories, sizes and references side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.8), layout="constrained")
    words, categories, sizes, references = figure.subplots(1, 4)
    words.hist(list(numbers.words), weights=list(numbers.words.values()), bins=30, color="#4c78a8")
    words.set_title("words per instruction")
    _bars(categories, numbers.categories, "categories")
    _bars(sizes, Counter({f"{w} x {h}": n for (w, h), n in numbers.sizes.items()}), "image sizes")
    _bars(references, Counter({str(n): rows for n, rows in numbers.references.items()}), "reference images")
    return figure_uri(figure, dpi=80)


def _bars(axes, counts: Counter, title: str) -> None:
    shown = counts.most_common(12)[::-1]
    axes.barh([name[:24] for name, _ in shown], [count for _, count in shown], color="#4c78a8")
    axes.set_title(title + (f" (12 of {len(counts)})" if len(counts) > 12 else ""))
