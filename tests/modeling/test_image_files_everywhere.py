"""Every place that opens an image sees the same pixels: upright, on white, 16-bit grey scaled to 8 bits."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo4o.dataset_scripts import stats, stats_page
from echo4o.dataset_scripts.images import MAX_PIXELS, check_image
from echo4o.dataset_scripts.synthesis.gates import tiny_thumbnail
from echo4o.endpoints.chat_endpoint import ChatRequest, ImageFile, LabelledImage
from echo4o.endpoints.image_endpoint import holds_image
from echo4o.evaluation import generate, images, score_report
from echo4o.modeling.common.image_files import open_image, to_rgb

SIZE = (96, 48)


def turned() -> Image.Image:
    """Red left, blue right; a viewer shows red above blue."""
    image = Image.new("RGB", SIZE, "blue")
    image.paste("red", (0, 0, SIZE[0] // 2, SIZE[1]))
    return image


def transparent() -> Image.Image:
    """Black and invisible, but for an opaque green quarter; a viewer shows green on white."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    image.paste((0, 128, 0, 255), (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    return image


def deep_grey() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16))


KINDS = {"turned": turned, "transparent": transparent, "16-bit grey": deep_grey}


@pytest.fixture(params=KINDS)
def file(request, tmp_path) -> Path:
    """An image that a plain `Image.open(...).convert("RGB")` shows in another way than a viewer."""
    exif = Image.Exif()
    if request.param == "turned":
        exif[0x0112] = 6
    path = tmp_path / "1.png"
    KINDS[request.param]().save(path, exif=exif)
    with Image.open(path) as plainly:
        assert not same(plainly.convert("RGB"), open_image(path))
    return path


def same(first: Image.Image, second: Image.Image, tolerance: int = 0) -> bool:
    if first.size != second.size or first.mode != second.mode:
        return False
    return int(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max()) <= tolerance


class Recorder:
    """Stands for a pipeline or a processor, and keeps the images that it is given."""

    def chat(self, prompt, image, max_new_tokens):
        self.images = image
        return "{}"

    def apply_chat_template(self, messages, **options):
        self.images = [part["image"] for part in messages[-1]["content"] if part["type"] == "image"]
        raise InterruptedError


def request_of(file: Path) -> ChatRequest:
    return ChatRequest("what is it?", images=(LabelledImage("image", ImageFile.read(file)),))


def test_local_judges_and_references_of_benchmarks(file):
    from echo4o.evaluation.judges.local import PipelineJudge, TransformersJudge

    recorder, want = Recorder(), open_image(file)
    judge = PipelineJudge("model")
    judge._pipe = recorder
    judge.answer(request_of(file))
    assert same(recorder.images[0], want)
    local = TransformersJudge.__new__(TransformersJudge)
    local._processor = Recorder()
    with pytest.raises(InterruptedError):
        local.answer(request_of(file))
    assert same(local._processor.images[0], want)
    assert same(generate._open([file])[0], want)


def test_the_pixels_judge(file, monkeypatch):
    import asyncio

    from echo4o.evaluation.benchmarks.shapes4o import detector
    from echo4o.evaluation.judges.base import Question, Verdict
    from echo4o.evaluation.judges.pixels import PixelsJudge

    given = []
    monkeypatch.setattr(detector, "detect", lambda image: given.append(image) or [])
    plain = request_of(file)
    question = Question(plain.text, images=plain.images, verdict=Verdict, facts={"include": []})
    asyncio.run(PixelsJudge().ask(question, "key"))
    assert same(given[0], open_image(file))


def test_what_is_sent_to_a_judge(file, tmp_path, monkeypatch):
    from echo4o.endpoints.chat_endpoint import ChatEndpoint

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    endpoint = ChatEndpoint("model", "http://127.0.0.1:9")
    sent = sent_by(endpoint, file)
    assert same(sent.convert("RGB"), open_image(file)) and sent.mode == "RGB"
    Image.new("RGB", SIZE, "red").save(tmp_path / "plain.jpg", quality=95)
    body = endpoint._body(request_of(tmp_path / "plain.jpg"), False)
    link = body["messages"][-1]["content"][1]["image_url"]["url"]
    data = base64.b64encode((tmp_path / "plain.jpg").read_bytes()).decode()
    assert link == f"data:image/jpeg;base64,{data}"  # the file itself


def sent_by(endpoint, file: Path) -> Image.Image:
    link = endpoint._body(request_of(file), False)["messages"][-1]["content"][1]["image_url"]["url"]
    head, _, data = link.partition("base64,")
    assert head == "data:image/png;"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_command_line(file):
    from echo4o.cli.generate import open_images

    assert same(open_images([file])[0], open_image(file))


def test_reports_and_galleries(file):
    want = open_image(file)
    for uri in (score_report._thumbnail(file), stats_page.thumbnail_uri(open_image(file.read_bytes()), 200)):
        shown = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
        assert same(shown, want, tolerance=90)  # a JPEG; what is wrong differs by 128 and more


def test_contact_sheets(file):
    from echo4o.common.contact_sheet import contact_sheet

    sheet, want = contact_sheet([(file, "")], open_image), open_image(file)
    left = (256 - want.width) // 2
    assert same(sheet.crop((left, 4, left + want.width, 4 + want.height)), want)


def test_sizes_and_looks_of_datasets(file):
    data, want = file.read_bytes(), open_image(file)
    checked = check_image(data)
    assert checked.reason is None and (checked.width, checked.height) == want.size
    facts = stats._read_facts({"image": {"bytes": data}, "reference_images": None})["image"]
    assert (facts["width"], facts["height"]) == want.size
    assert tiny_thumbnail(data) == want.resize((8, 8), Image.Resampling.BOX).tobytes()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_an_image_of_unknown_range_is_missing_before_anything_is_paid(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "1.tiff")
    (tmp_path / "1.tiff").rename(tmp_path / "1.png")
    assert images.why_unreadable(tmp_path / "1.png").startswith(f"it has mode '{mode}'")
    assert not holds_image(type("Answer", (), {"text": base64.b64encode((tmp_path / "1.png").read_bytes()).decode()}))


def test_validation_and_training_have_the_same_limit_of_size(pipe):
    from echo4o.training.row_images import decoded

    image = Image.new("1", (MAX_PIXELS // 4096 + 1, 4096))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    assert check_image(stream.getvalue()).reason is not None
    with pytest.raises(ValueError, match="images have between 1 and 33554432"):
        to_rgb(image, "image of a", MAX_PIXELS)
    stored = {"bytes": stream.getvalue(), "path": None}
    with pytest.raises(ValueError, match="at most 33,554,432 are decoded"):
        decoded({"id": "a", "image": stored, "reference_images": []})
    to_rgb(image)  # a photo of a large camera is a reference like any other
