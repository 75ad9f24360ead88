"""The app in a real browser, as a person uses it. Screenshots are kept in build/screenshots."""

import io
import json
import re

import pytest

pytest.importorskip("gradio", reason="pip install 'echo4o[app]'")

from PIL import Image

from echo4o.common.image_metadata import ImageMetadata
from echo4o.serving.limits import Limits
from tests.serving.browser import chromium, keep_screenshot
from tests.serving.running import BASE, png, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def app(tiny):
    """One image per batch, so that a cancelled run has finished images."""
    from echo4o.serving.served_model import ServedModel

    with serving(ServedModel(tiny, source="tiny", limits=Limits(batch=1)), with_app=True) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(app, browser):
    """The app in a fresh profile; every error of the page fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page, errors = context.new_page(), []
    page.set_default_timeout(WAIT)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(app.root)
    page.wait_for_selector("#generate-prompt textarea")
    yield page
    context.close()
    assert not errors, errors


def status(page, tab: str, words: str) -> str:
    """The line of a tab, once it contains these words."""
    place = page.locator(f"#{tab}-status")
    place.filter(has_text=re.compile(words)).wait_for()
    return place.inner_text()


def images(page, gallery: str):
    return page.locator(f"#{gallery} img")


def set_number(page, name: str, value: int) -> None:
    field = page.locator(f"#{name} input[type=number]").first
    field.fill(str(value))
    field.press("Enter")


def open_settings(page, tab: str = "generate") -> None:
    page.locator(f"#{tab}-settings").get_by_role("button", name="Settings").click()


def shown_settings(page, *lines: str) -> None:
    """Wait until the settings of the history show these lines: the editor draws only lines near the window."""
    settings = page.locator("#history-settings")
    settings.scroll_into_view_if_needed()
    for line in lines:
        settings.filter(has_text=line).wait_for()


def test_generate_reload_and_make_it_again(page, app):
    page.fill("#generate-prompt textarea", "a photo of a red circle")
    open_settings(page)
    set_number(page, "generate-num_inference_steps", 12)
    page.click("#generate-start")
    line = status(page, "generate", r"Done\. Seed: \d+")
    seed = re.search(r"Seed: (\d+)", line)[1]
    images(page, "generate-results").first.wait_for()
    keep_screenshot(page, "generate")
    page.reload()
    images(page, "history").first.wait_for()  # the history is still there
    images(page, "history").first.click()
    shown_settings(page, f'"seed": {seed}', '"num_inference_steps": 12')
    with page.expect_download() as download:
        page.click("#history-download")
    with Image.open(download.value.path()) as first:
        assert first.format == "PNG" and first.size == (64, 64)
        pixels, stored = first.tobytes(), ImageMetadata.from_json(json.loads(first.info["echo4o"]), "the download")
    assert stored.prompt == "a photo of a red circle" and stored.seeds == (int(seed),) and stored.model == "tiny"
    assert stored.settings["num_inference_steps"] == 12  # set just before the click
    page.click("#history-reuse")
    page.wait_for_function(
        f"document.querySelector('#generate-seed input, #generate-seed textarea').value === '{seed}'"
    )
    assert page.input_value("#generate-prompt textarea") == "a photo of a red circle"
    page.click("#generate-start")
    status(page, "generate", rf"Done\. Seed: {seed}")
    page.wait_for_function("document.querySelectorAll('#history .thumbnail-item, #history button img').length >= 2")
    keep_screenshot(page, "history")
    images(page, "history").first.click()
    with page.expect_download() as again:
        page.click("#history-download")
    with Image.open(again.value.path()) as second:
        assert second.tobytes() == pixels


def test_preview_progress_and_cancel_that_keeps_what_is_finished(page):
    page.fill("#generate-prompt textarea", "a photo of a blue star")
    open_settings(page)
    set_number(page, "generate-num_inference_steps", 100)
    set_number(page, "generate-count", 3)
    page.click("#generate-start")
    assert "about" in status(page, "generate", r"Update \d+ of 100, about \d+ s left")
    page.locator("#generate-preview img").wait_for()
    keep_screenshot(page, "preview")
    status(page, "generate", r"1 of 3 images done")
    page.click("#generate-cancel")
    line = status(page, "generate", r"Cancelled; [12] of 3 images kept\. Seed: \d+")
    kept = int(re.search(r"(\d) of 3", line)[1])
    page.wait_for_function(f"document.querySelectorAll('#generate-results img').length >= {kept}")
    keep_screenshot(page, "cancelled")


def test_edit_with_two_references_in_an_order_that_is_changed(page, app):
    page.get_by_role("tab", name="Edit").click()
    files = [
        {"name": "red.png", "mimeType": "image/png", "buffer": png("#c02020")},
        {"name": "blue.png", "mimeType": "image/png", "buffer": png("#2020c0", (64, 48))},
    ]
    page.locator("#edit-files input[type=file]").set_input_files(files)
    page.wait_for_function("document.querySelectorAll('#edit-thumbnails img').length === 2")

    def order() -> list[str]:
        sources = page.locator("#edit-thumbnails img").evaluate_all("all => all.map(each => each.src)")
        return [re.search(r"(red|blue)", source)[1] for source in sources]

    assert order() == ["red", "blue"]
    page.click("#edit-later")
    page.wait_for_function("document.querySelector('#edit-thumbnails img').src.includes('blue')")
    assert order() == ["blue", "red"]
    page.fill("#edit-prompt textarea", "both")
    open_settings(page, "edit")
    set_number(page, "edit-num_inference_steps", 4)
    page.click("#edit-start")
    status(page, "edit", r"Done\. Seed: \d+")
    images(page, "edit-results").first.wait_for()
    keep_screenshot(page, "edit")
    images(page, "history").first.click()
    shown_settings(page, '"references": 2')


def test_chat_about_an_image(page):
    page.get_by_role("tab", name="Chat").click()
    upload = {"name": "red.png", "mimeType": "image/png", "buffer": png("#c02020")}
    page.locator("#chat-box input[type=file]").set_input_files(upload)
    page.locator("#chat-box .thumbnail-item, #chat-box img").first.wait_for()
    page.fill("#chat-box textarea", "what is this?")
    page.press("#chat-box textarea", "Enter")
    page.locator("#chat-talk [data-testid=bot]").first.wait_for()
    page.wait_for_function("document.querySelector('#chat-talk [data-testid=bot]').innerText.trim().length > 2")
    keep_screenshot(page, "chat")


def test_mistakes_are_shown_and_the_page_goes_on(page):
    page.fill("#generate-prompt textarea", "like [image 2]")
    page.click("#generate-start")
    page.get_by_text("there are 0 reference images").first.wait_for()
    page.locator("#generate-seed input, #generate-seed textarea").first.fill("seven")
    page.click("#generate-start")
    page.get_by_text("must be a whole number").first.wait_for()


def test_adapters_are_picked_and_the_history_outlives_the_server(browser, adapter_folders, tmp_path):
    import torch

    from echo4o.cli.generate_options import Adapter, ModelOptions
    from echo4o.cli.serve import load_served
    from echo4o.serving.app.history import History

    adapters = [Adapter(name, str(adapter_folders / name), scale) for name, scale in (("warm", 1.0), ("cold", 0.5))]
    model = load_served(str(BASE), "echo4o", torch.device("cpu"), ModelOptions(), adapters)
    history = History(tmp_path / "history")
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(WAIT)
    with serving(model, with_app=True, history=history) as running:
        page.goto(running.root)
        page.fill("#generate-prompt textarea", "a photo of a red circle")
        open_settings(page)
        set_number(page, "generate-num_inference_steps", 2)
        for wanted in ({"warm": 1.0, "cold": 0.5}, {"cold": 0.25}):
            if len(wanted) == 1:
                page.locator("#generate-adapters").get_by_label("warm").uncheck()
                page.locator("#generate-scale-cold input[type=number]").fill("0.25")
                keep_screenshot(page, "adapters")
            page.click("#generate-start")
            page.wait_for_function(f"document.querySelectorAll('#history img').length === {3 - len(wanted)}")
            kept = [entry for own in history._visitors.values() for entry in own]
            newest = max(kept, key=lambda entry: entry.file.name)
            assert {each["name"]: each["scale"] for each in newest.settings["adapters"]} == wanted
        port = running.port
        page.goto("about:blank")  # closes its connections
    with serving(model, with_app=True, history=History(tmp_path / "history"), port=port) as running:
        page.goto(running.root)
        images(page, "history").first.click()
        shown_settings(page, f'"seed": {newest.seed}', '"scale": 0.25')
        page.click("#history-reuse")
        page.wait_for_function("document.querySelector('#generate-seed input, #generate-seed textarea').value !== ''")
        open_settings(page)
        assert not page.locator("#generate-adapters").get_by_label("warm").is_checked()
        assert page.locator("#generate-scale-cold input[type=number]").input_value() == "0.25"
    page.context.close()


def test_the_keyboard_is_enough_and_a_phone_can_show_it(app, browser):
    context = browser.new_context(viewport={"width": 375, "height": 800}, device_scale_factor=2, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(app.root)
    page.wait_for_selector("#generate-prompt textarea")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380, "nothing is wider than the screen"
    page.focus("#generate-prompt textarea")
    page.keyboard.type("a photo of a green cross")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
        if reached[-1] == "generate-start":
            break
    assert reached[-1] == "generate-start", reached
    page.keyboard.press("Enter")
    status(page, "generate", r"Update|Done")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.click("#generate-cancel")
    status(page, "generate", r"Cancelled|Done")
    keep_screenshot(page, "phone")
    context.close()


def test_controls_that_a_model_lacks_are_absent(tiny):
    import gradio as gr

    from echo4o.serving.app.controls import build_controls
    from echo4o.serving.served_model import ServedModel

    class PlainPipeline:
        """Text to image of one size, without guidance."""

        config: dict = {}

        def __call__(self, prompt: str | list[str], num_inference_steps: int = 20, generator=None): ...
        def set_progress_bar_config(self, **options): ...

    model = ServedModel(PlainPipeline())
    assert not (model.can_chat or model.takes_references or model.takes_size)
    with gr.Blocks():
        plain, full = build_controls(model, "a"), build_controls(ServedModel(tiny), "b")
    assert set(plain.components) == {"count", "seed", "num_inference_steps"}
    assert set(full.components) > {"guidance_scale", "image_guidance_scale", "think", "size", "preset"}


def test_prompts_interleave_references():
    from echo4o.serving.app.handlers import interleave, move

    first, second = (Image.open(io.BytesIO(png(colour))) for colour in ("red", "blue"))
    assert interleave("both", [first, second]) == [first, second, "both"]
    assert interleave("like [image 2], but as [Image 1]!", [first, second]) == [
        "like", second, ", but as", first, "!",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="where image 2 belongs"):
        interleave("[image 1]", [first, second])
    assert move(["a", "b", "c"], 1, 1) == ["b", "a", "c"] and move(["a"], 1, -1) == ["a"]
