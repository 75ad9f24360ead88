"""Small rules that the whole project shares: Hub names, sizes, configuration, thumbnails."""

import base64
import io

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from pydantic import ValidationError

from echo4o.common.configuration import StrictModel, describe
from echo4o.common.hub_names import is_repository_name, require_repository_name
from echo4o.common.sizes import format_bytes, parse_bytes
from echo4o.common.thumbnails import png_uri, thumbnail_uri

NAMES = [
    "owner/name",
    "o/n",
    "Owner-1/na_me.2",
    "owner",
    "owner/name/more",
    "/name",
    "owner/",
    "./name",
    "../name",
    "~/name",
]
NAMES += [
    "-owner/name",
    "owner/name-",
    "owner/.name",
    "owner/na--me",
    "owner/na..me",
    "owner/name.git",
    "owner/na me",
    "",
]
NAMES += [
    f"owner/{'n' * 96}",
    f"owner/{'n' * 97}",
    f"{'o' * 97}/n",
    "owner/name\n",
    "hf://owner/name",
    "C:\\owner/name",
    "_a/_b",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_for_names_is_the_hubs_with_an_owner(name):
    try:
        validate_repo_id(name)
        allowed = name.count("/") == 1
    except HFValidationError:
        allowed = False
    assert is_repository_name(name) == allowed


def test_a_wrong_name_is_explained():
    assert require_repository_name("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="'name' is not the name of a Hub repository: write owner/name"):
        require_repository_name("name")


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 8e10), ("16 GiB", 2**34), ("1.5t", 1.5e12), (" .5MiB ", 2**19), ("3k", 3000.0)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["lots", "24", "", "GB", "-1GB", "0GB", "1.2.3GB", "1XB", "infGB", "٣GB"])
def test_other_sizes_are_errors(text):
    with pytest.raises(ValueError, match="is not an amount of memory"):
        parse_bytes(text)


def test_sizes_are_written():
    assert [format_bytes(size) for size in (1.6e10, 1e8, 1.5e6, 0)] == ["16.00 GB", "0.10 GB", "1.50 MB", "0.00 MB"]


class Inner(StrictModel):
    number: float = 1.0


class Outer(StrictModel):
    inner: Inner = Inner()
    pair: tuple[int, int] = (1, 2)


def test_configuration_is_strict_and_does_not_change():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"number": float("inf"), "kye": "secret"}, "pair": 3})
    lines = describe(caught.value, known_keys=lambda location: Inner.model_fields).splitlines()
    assert lines[0].startswith("  inner.number: Input should be a finite number (given: inf)")
    assert lines[1] == "  inner.kye: unknown key; known here: number"
    assert lines[2] == "  pair: Input should be a list (given: 3)"
    with pytest.raises(ValidationError):
        Outer().pair = (3, 4)


def test_thumbnails():
    image = Image.new("RGBA", (300, 100), "red")
    head, _, data = thumbnail_uri(image.convert("RGB"), 64).partition(",")
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and small.size == (64, 21) and small.format == "JPEG"
    assert image.size == (300, 100)
    head, _, data = png_uri(image).partition(",")
    assert head == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (300, 100)
