"""Building, validation, precomputation and training accept the same images, and refuse the others by name."""

import io
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from echo4o.dataset_scripts.build import build
from echo4o.dataset_scripts.images import check_image
from echo4o.dataset_scripts.validate import validate
from echo4o.modeling.common.image_files import open_image
from echo4o.training.data import PreparedRows, RowRef
from echo4o.training.row_images import DecodedRows, decoded, undecoded
from tests.dataset_scripts.layout import SURREAL, write_rows, write_tar


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_of(width: int, height: int, depth: int, colour: int, line: bytes, lines: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(line * lines)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


FRAMES = {"save_all": True, "append_images": [photo()], "duration": 50}
JPEG, PNG, WEBP = encoded(photo(), "JPEG"), encoded(photo(), "PNG"), encoded(photo(), "WEBP")
GOOD = {
    "JPEG": JPEG,
    "CMYK JPEG with an orientation": encoded(photo("CMYK"), "JPEG", exif=turned()),
    "JPEG with a note behind its end": JPEG + b"note",
    "1-bit PNG": encoded(photo("1"), "PNG"),
    "palette PNG": encoded(photo("P"), "PNG", transparency=3),
    "16-bit grey PNG with alpha": png_of(8, 4, 16, 4, b"\0" + b"\x80\x00\xff\xff" * 8, 4),
    "16-bit colour PNG": png_of(8, 4, 16, 2, b"\0" + b"\x80\x00" * 24, 4),
    "animated PNG": encoded(photo(), "PNG", **FRAMES),
    "animated WebP": encoded(photo(), "WEBP", **FRAMES),
    "several images in one JPEG": encoded(photo(), "MPO", save_all=True, append_images=[photo()]),
    "PNG with damaged EXIF": encoded(photo(), "PNG", exif=b"Exif\0\0II*\0\xff\xff"),
}
BAD = {
    "GIF": encoded(photo(), "GIF"),
    "TIFF": encoded(photo(), "TIFF"),
    "BMP": encoded(photo(), "BMP"),
    "AVIF with an orientation": encoded(photo(), "AVIF", exif=turned()),
    "animated GIF": encoded(photo(), "GIF", **FRAMES),
    "0 bytes": b"",
    "text": b"no image",
    "JPEG without its end": JPEG[:-2],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "half a PNG": PNG[: len(PNG) // 2],
    "PNG without its end": PNG[:-12],
    "WebP without its end": WEBP[:-8],
    "20000 x 20000 pixels": png_of(20000, 20000, 1, 0, b"\0" + b"\xff" * 2500, 20000),
    "40 million pixels": png_of(8000, 5000, 1, 0, b"\0" + b"\xff" * 1000, 5000),
}
ALL = GOOD | BAD


class Row(dict):
    nbytes = 0


class Plain:
    """A backbone that keeps the images that it is given."""

    def prepare(self, rows):
        return [Row(row) for row in rows]

    def sample(self, row, epoch):
        return row


def dataset_of(data: bytes) -> Dataset:
    stored = {"bytes": data, "path": None}
    text = {name: Value("string") for name in ("id", "instruction")}
    features = Features(text | {"image": ImageFeature(), "reference_images": List(ImageFeature())})
    row = {"id": "a", "instruction": "a dot", "image": stored, "reference_images": [stored]}
    return Dataset.from_list([row], features=features)


def trained(data: bytes):
    """The row as a backbone gets it in a run."""
    rows = PreparedRows([undecoded(dataset_of(data))], [1.0], DecodedRows(Plain()), seed=0, cache_bytes=0)
    return rows._prepare([rows.sources[0][0]])[0]


@pytest.mark.parametrize("name", ALL)
def test_the_check_precomputation_and_training_agree(name):
    data = ALL[name]
    assert (check_image(data).reason is None) == (name in GOOD)
    if name in GOOD:
        seen = open_image(data)
        for row in (decoded(undecoded(dataset_of(data))[0]), trained(data)):
            for image in (row["image"], *row["reference_images"]):
                assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(seen))
    else:
        with pytest.raises(ValueError, match="an image of a is refused"):
            decoded(undecoded(dataset_of(data))[0])
        with pytest.raises(ValueError, match="^Row a: an image of a is refused"):
            trained(data)


def test_building_and_validation_agree_with_them(tmp_path):
    source = tmp_path / "source"
    write_tar(source / SURREAL / "0.tar", [(f"{i}.png", data) for i, data in enumerate(ALL.values())], "w")
    write_rows(
        source / SURREAL / "rows.jsonl",
        [{"instruction": name, "output_image": f"{i}.png", "type": "x"} for i, name in enumerate(ALL)],
    )
    report, findings = validate(source)
    refused = {finding.row["instruction"] for finding in findings if finding.row}
    assert refused == BAD.keys()
    build(str(source), tmp_path / "built")
    (file,) = (tmp_path / "built").rglob("*.parquet")
    assert set(pq.read_table(file)["instruction"].to_pylist()) == GOOD.keys()
    rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert [row["id"] for row in map(decoded, undecoded(rows))] == rows["id"]
    report, findings = validate(tmp_path / "built")
    assert not list(findings) and report.accepted.total() == len(GOOD)


def test_an_unreadable_image_is_skipped_where_the_recipe_says_so():
    from datasets import concatenate_datasets

    told: list[str] = []
    rows = concatenate_datasets([dataset_of(BAD["20000 x 20000 pixels"]), dataset_of(PNG)])
    prepared = PreparedRows([undecoded(rows)], [1.0], DecodedRows(Plain()), 0, 0, on_bad=told.append)
    assert prepared.samples([RowRef(0, 0, 0)])[0]["image"].size == (64, 48)
    assert len(told) == 1 and "decompression bomb" in told[0]
