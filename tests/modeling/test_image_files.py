"""One rule for opening images: upright, on white, scaled to 8 bits, wherever they are read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o.dataset_scripts.images import check_image
from echo4o.modeling.common.image_files import open_image, to_rgb

ROTATED = 6  # EXIF orientation: the camera was turned by 90 degrees


def encoded(image: Image.Image, kind: str, orientation: int | None = None) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


def halves(size=(64, 32)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_the_orientation_is_applied_to_files_bytes_and_opened_images(tmp_path, kind):
    data = encoded(halves(), kind, ROTATED)
    (tmp_path / "image").write_bytes(data)
    for image in (open_image(data), open_image(tmp_path / "image"), to_rgb(Image.open(io.BytesIO(data)))):
        assert image.size == (32, 64) and image.mode == "RGB"
        assert np.asarray(image)[5, 16, 0] > 200 and np.asarray(image)[60, 16, 2] > 200, "red is above blue"


@pytest.mark.parametrize("kind", ["AVIF", "TIFF"])
def test_a_reencoded_image_stays_upright(kind):
    stored = check_image(encoded(halves(), kind, ROTATED), reencode=True)
    assert (stored.format, stored.width, stored.height) == ("PNG", 32, 64)
    assert open_image(stored.data).size == (32, 64)


def test_an_image_in_inks_is_reencoded():
    stored = check_image(encoded(halves().convert("CMYK"), "TIFF"), reencode=True)
    assert stored.reason is None and np.asarray(open_image(stored.data))[5, 5, 0] > 200


def test_16_bit_grey_is_scaled_to_its_whole_range():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    image = open_image(stream.getvalue())
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    assert np.asarray(to_rgb(image)).min() == 255


@pytest.mark.parametrize("mode", ["F", "I"])
def test_an_unknown_range_is_refused(mode):
    with pytest.raises(ValueError, match=f"row 3 has mode '{mode}', whose range is unknown"):
        to_rgb(Image.new(mode, (4, 4)), "row 3")


def test_what_does_not_decode_is_named():
    for data in (b"no image", encoded(halves(), "PNG")[:60]):
        with pytest.raises(ValueError, match="reference 1 does not decode"):
            open_image(data, "reference 1")


def test_a_precomputed_row_is_the_row_that_training_reads(tmp_path):
    """`datasets` turns images upright when it decodes them; a cache that did not would hold others."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    from echo4o.training.row_images import decoded, undecoded

    features = Features({"id": Value("string"), "image": ImageFeature(), "reference_images": List(ImageFeature())})
    stored = {"bytes": encoded(halves(), "JPEG", ROTATED), "path": None}
    rows = Dataset.from_list([{"id": "a", "image": stored, "reference_images": [stored]}], features=features)
    plain, cached = rows[0], decoded(undecoded(rows)[0])
    for one, other in (
        (plain["image"], cached["image"]),
        (plain["reference_images"][0], cached["reference_images"][0]),
    ):
        assert np.array_equal(np.asarray(to_rgb(one)), np.asarray(other))


def test_the_pipeline_sees_a_reference_as_people_do(pipe):
    data = encoded(halves(), "PNG", ROTATED)
    turned, upright = Image.open(io.BytesIO(data)), open_image(data)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    results = [
        pipe("a dot", image=image, generator=torch.Generator().manual_seed(0), **options).images
        for image in (turned, upright)
    ]
    assert results[0].shape == results[1].shape and torch.equal(*results)
