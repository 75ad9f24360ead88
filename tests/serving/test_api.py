"""The API as the official client and plain HTTP see it, on the quickstart's model."""

import base64
import io
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")

import httpx
import numpy as np
import openai
from PIL import Image

from tests.serving.running import png, serving

FAST = {"steps": 2, "seed": 5}


def opened(entry) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max())


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def test_an_image_has_its_seed_and_settings_and_can_be_made_again(client, tiny):
    import torch

    answer = client.images.generate(model="echo4o", prompt="a photo of a red circle", n=2, extra_body={"steps": 3})
    first, second = answer.data
    seed = first.model_extra["seed"]
    assert second.model_extra["seed"] == seed + 1
    settings = second.model_extra["settings"]
    assert settings["num_inference_steps"] == 3 and settings["guidance_scale"] == 2.0
    assert (settings["height"], settings["width"]) == opened(first).size == (64, 64)
    again = client.images.generate(
        model="echo4o", prompt="a photo of a red circle", extra_body={"steps": 3, "seed": seed + 1}
    ).data[0]
    assert difference(opened(again), opened(second)) <= 1
    direct = tiny(
        "a photo of a red circle", num_inference_steps=3, generator=torch.Generator().manual_seed(seed + 1)
    ).images[0]
    assert difference(opened(again), direct) == 0


def test_png_files_store_what_they_were_generated_from(client, tmp_path):
    from echo4o.common.image_metadata import read_metadata

    entry = client.images.edit(image=("a.png", png(), "image/png"), prompt="like this", extra_body=FAST).data[0]
    (tmp_path / "a.png").write_bytes(base64.b64decode(entry.b64_json))
    stored = read_metadata(tmp_path / "a.png")
    assert (stored.prompt, stored.seed, stored.settings) == ("like this", 5, {"num_inference_steps": 2})
    assert len(stored.references) == 1


def test_settings_reach_the_pipeline(client):
    def generate(**options):
        body = FAST | options
        return client.images.generate(model="echo4o", prompt="a photo of a blue star", extra_body=body).data[0]

    plain = generate()
    assert opened(generate(size="48x32")).size == (48, 32)
    assert opened(generate(height=32, width=64)).size == (64, 32)
    guided = generate(guidance_scale=4.0)
    assert guided.model_extra["settings"]["guidance_scale"] == 4.0
    assert difference(opened(guided), opened(plain)) > 1
    assert opened(generate(output_format="webp", output_compression=80)).format == "WEBP"
    assert generate(think=True, max_think_tokens=4).model_extra["plan"] is not None


def test_edits_take_several_references_in_order(client):
    files = [("a.png", png("#c02020"), "image/png"), ("b.png", png("#2020c0", (80, 48)), "image/png")]
    options = {"model": "echo4o", "prompt": "both", "extra_body": FAST}
    both = client.images.edit(image=files, **options).data[0]
    swapped = client.images.edit(image=files[::-1], **options).data[0]
    assert opened(both).size != (0, 0) and difference_or_size(opened(both), opened(swapped))
    one = client.images.edit(image=files[0], **options).data[0]
    assert one.model_extra["seed"] == 5


def difference_or_size(a: Image.Image, b: Image.Image) -> bool:
    return a.size != b.size or difference(a, b) > 0


def test_interleaved_inputs_equal_references_in_that_order(server, client):
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    body = {"prompt": "like this", "images": [url], **FAST}
    by_images = httpx.post(f"{server.url}/images/generations", json=body).json()["data"][0]
    parts = [{"type": "image_url", "image_url": {"url": url}}, "like this"]
    by_inputs = httpx.post(f"{server.url}/images/generations", json={"inputs": parts, **FAST}).json()["data"][0]
    assert by_images["b64_json"] == by_inputs["b64_json"]
    edited = client.images.edit(image=("a.png", png(), "image/png"), prompt="like this", extra_body=FAST).data[0]
    assert edited.b64_json == by_images["b64_json"]


@pytest.mark.long
def test_requests_that_wait_together_run_as_one_batch_and_equal_single_ones(server):
    """Different prompts, sizes, references and seeds in one call; each image equals the one of a single request."""
    bodies = [
        {"prompt": "a photo of a red circle", "seed": 1, "steps": 4},
        {"prompt": "a photo of a blue star", "seed": 2, "steps": 4, "size": "48x32"},
        {"prompt": "like this", "seed": 3, "steps": 4, "images": [f"data:image/png;base64,{base64.b64encode(png()).decode()}"]},
        {"prompt": "a photo of a green cross", "seed": 4, "steps": 4},
    ]  # fmt: skip

    def generate(body):
        answer = httpx.post(f"{server.url}/images/generations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))

    alone = [generate(body) for body in bodies]
    before = server.engine.metrics.batch_sizes
    together: list = [None] * len(bodies)

    def worker(index):
        together[index] = generate(bodies[index])

    blocker = threading.Thread(target=generate, args=({"prompt": "wait", "steps": 30},))
    blocker.start()
    while not server.engine.running:
        time.sleep(0.001)
    threads = [threading.Thread(target=worker, args=(index,)) for index in range(len(bodies))]
    for thread in [*threads]:
        thread.start()
    for thread in [*threads, blocker]:
        thread.join()
    after = server.engine.metrics.batch_sizes
    assert after.get(4, 0) == before.get(4, 0) + 1, "the four requests ran in one call"
    for one, many in zip(alone, together):
        assert one.size == many.size and difference(one, many) <= 2


def test_images_are_streamed_with_partial_images(client):
    """As the official client reads it; its own types check every event."""
    from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent

    options = {"model": "echo4o", "prompt": "a photo of a red circle", "extra_body": {"steps": 8, "seed": 5}}
    *partial, completed = client.images.generate(stream=True, partial_images=2, size="48x32", **options)
    assert [event.partial_image_index for event in partial] == [0, 1]
    for event in partial:
        ImageGenPartialImageEvent.model_validate(event.to_dict(), strict=True)
        assert opened(event).size == (48, 32) and event.size == "48x32"
    ImageGenCompletedEvent.model_validate(completed.to_dict(), strict=True)
    assert completed.usage.input_tokens > 0
    whole = client.images.generate(size="48x32", **options).data[0]
    assert completed.b64_json == whole.b64_json
    for name in ("seed", "settings"):
        assert completed.model_extra[name] == whole.model_extra[name]
    far, near = (mean_difference(opened(event), opened(completed)) for event in partial)
    assert far >= near > 0, "previews come closer to the image"
    (only,) = client.images.generate(stream=True, **options, output_format="webp")
    assert only.type == "image_generation.completed" and opened(only).format == "WEBP"


def test_edits_are_streamed(client):
    from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent

    image, options = ("a.png", png(), "image/png"), {"prompt": "like this", "extra_body": {"steps": 6, "seed": 5}}
    partial, completed = client.images.edit(image=image, stream=True, partial_images=1, **options)
    ImageEditPartialImageEvent.model_validate(partial.to_dict(), strict=True)
    ImageEditCompletedEvent.model_validate(completed.to_dict(), strict=True)
    assert completed.b64_json == client.images.edit(image=image, **options).data[0].b64_json


def test_a_client_that_leaves_a_stream_cancels_its_image(server, client):
    before = server.engine.metrics["cancelled"]
    stream = client.images.generate(prompt="a dot", stream=True, partial_images=3, extra_body={"steps": 200})
    assert next(iter(stream)).type == "image_generation.partial_image"
    stream.close()
    server.wait_until_idle()
    assert server.engine.metrics["cancelled"] == before + 1


def test_streams_that_cannot_be_honoured_are_errors(client):
    for fields, words in (
        ({"partial_images": 1}, 'needs "stream": true'),
        ({"partial_images": 4, "stream": True}, "from 0 to 3"),
        ({"n": 2, "stream": True}, "a stream holds one image"),
        ({"stream": "yes"}, "stream: must be true or false"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.images.generate(prompt="a dot", extra_body=fields)
    with pytest.raises(openai.APIError, match="multiples of 16"):  # the pipeline refuses it, after the stream began
        list(client.images.generate(prompt="a dot", stream=True, size="47x33"))


def test_previews_are_spaced_evenly():
    from echo4o.serving.watching import preview_steps

    assert preview_steps(100, 3) == {25, 50, 75} and preview_steps(49, 1) == {24}
    assert preview_steps(4, 8) == {2, 3} and preview_steps(2, 3) == set() == preview_steps(50, 0)


def test_questions_are_answered_streamed_and_not(client, tiny):
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="echo4o", messages=messages, max_tokens=8)
    want = tiny.chat("what is this?", image=Image.open(io.BytesIO(png())), max_new_tokens=8)
    assert answer.choices[0].message.content == want and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(tiny.tokenizer.encode(want))
    chunks = list(
        client.chat.completions.create(
            model="echo4o", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == want
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) >= 3, "token by token"
    short = client.chat.completions.create(model="echo4o", messages=messages, max_tokens=1)
    assert short.choices[0].finish_reason == "length"
    stopped = client.chat.completions.create(model="echo4o", messages=messages, max_tokens=8, stop=want[2])
    assert stopped.choices[0].message.content == want[: want.index(want[2])]


def test_conversations_become_a_transcript(tiny):
    from echo4o.serving.chat_api import read_messages
    from echo4o.serving.served_model import ServedModel

    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    text, images = read_messages(messages, ServedModel(tiny))
    assert text == "Be short.\nUser: Hi\nAssistant: Hello\nUser: And now?\nAssistant:" and images == []
    assert read_messages(messages[:2], ServedModel(tiny))[0] == "Be short.\nHi"


def test_models_health_and_metrics(server, client):
    (model,) = client.models.list().data
    assert model.id == "echo4o" and "num_inference_steps" in model.model_extra["image_fields"]
    assert client.models.retrieve("echo4o").id == "echo4o"
    assert httpx.get(f"{server.root}/health").json()["status"] == "ok"
    client.images.generate(prompt="a dot", extra_body=FAST)
    text = httpx.get(f"{server.root}/metrics").text
    assert 'echo4o_requests_total{path="/v1/images/generations",status="200"}' in text
    assert "echo4o_waiting 0" in text and 'echo4o_batch_size_bucket{le="+Inf"}' in text


def test_a_key_is_required_where_there_is_one(tiny):
    from echo4o.serving.served_model import ServedModel

    with serving(ServedModel(tiny), key="sk-secret") as running:
        assert running.client("sk-secret").models.list().data[0].id == "echo4o"
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            running.client("sk-wrong").images.generate(prompt="a dot")
        for path in ("/v1/models", "/metrics"):
            answer = httpx.get(f"{running.root}{path}")
            assert answer.status_code == 401 and "sk-" not in answer.text
        assert httpx.get(f"{running.root}/health").status_code == 200


def test_answers_stream_and_end_at_a_stop(tiny):
    """The text so far is sent after each token; what may belong to a stop is held back."""
    from echo4o.serving.served_model import ServedModel
    from echo4o.serving.tasks import Text

    model, events = ServedModel(tiny), []
    options = model.read_options({"max_new_tokens": 12}, chat=True)
    image = Image.open(io.BytesIO(png()))
    whole = model.chat([model.chat_task("what is this?", [image], options=options)])[0].text
    task = model.chat_task("what is this?", [image], options=options, stops=[whole[-3:]])
    task.on_event = events.append
    other = model.chat_task("what is this?", [image], options=options)
    stopped, beside = model.chat([task, other])
    assert beside.text == whole and stopped.text == whole[: whole.index(whole[-3:])] and not stopped.cut
    assert all(isinstance(event, Text) and stopped.text.startswith(event.text) for event in events)
    assert len({event.text for event in events}) >= 3
