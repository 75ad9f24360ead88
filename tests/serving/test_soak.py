"""2,000 requests of all kinds, a part of them wrong, from many clients at once: the server stays up and its memory bounded."""

import base64
import itertools
import os
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")

import httpx

from echo4o.serving.limits import Limits
from tests.serving.running import png, serving
from tests.serving.test_bad_requests import bomb

REQUESTS = int(os.environ.get("ECHO4O_SOAK_REQUESTS", "2000"))
SECONDS = 900  # the whole test, at most
CLIENTS = 12


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bodies():
    """Kinds of requests in turn: (path, options of httpx, allowed statuses)."""
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    image = {"prompt": "a photo of a red circle", "steps": 1, "size": "32x32"}
    question = {"messages": [{"role": "user", "content": "what is this?"}], "max_tokens": 2}
    upload = [("image", ("a.png", png(), "image/png"))]
    return [
        ("images/generations", {"json": image}, {200, 429}),
        ("images/generations", {"json": image | {"n": 2}}, {200, 429}),
        ("images/generations", {"json": image | {"images": [url]}}, {200, 429}),
        ("images/edits", {"files": upload, "data": {"prompt": "a", "steps": "1"}}, {200, 429}),
        ("chat/completions", {"json": question}, {200, 429}),
        ("chat/completions", {"json": question | {"stream": True}}, {200, 429}),
        ("images/generations", {"json": image | {"model": "other"}}, {404, 429}),
        ("images/generations", {"content": b"{"}, {400, 429}),
        ("images/edits", {"files": [("image", ("a.png", bomb(), "image/png"))], "data": {"prompt": "a"}}, {400, 429}),
        ("images/generations", {"json": image | {"steps": 250}, "timeout": 0.05}, {None, 200}),  # the client leaves
    ]


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_two_thousand_requests(tiny):
    from echo4o.serving.served_model import ServedModel

    numbers, wrong, statuses, memory = itertools.count(), [], [], []
    kinds, deadline = bodies(), time.monotonic() + SECONDS
    with serving(ServedModel(tiny, limits=Limits(queue=8, batch=8))) as running:

        def client():
            with httpx.Client(base_url=running.url, timeout=120) as http:
                while (number := next(numbers)) < REQUESTS and time.monotonic() < deadline:
                    path, options, allowed = kinds[number % len(kinds)]
                    try:
                        status = http.post(f"/{path}", **options).status_code
                    except httpx.TransportError as error:
                        status, reason = None, repr(error)
                    statuses.append(status)
                    if status not in allowed | {429}:
                        wrong.append((path, options.keys(), status or reason))
                    if number % 100 == 0:
                        memory.append(resident_bytes())
                    if status == 429:
                        time.sleep(0.2)

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        running.wait_until_idle()
        answer = httpx.post(f"{running.url}/images/generations", json={"prompt": "a dot", "steps": 1}, timeout=60)
        assert answer.status_code == 200
        metrics = running.engine.metrics
        print({status: statuses.count(status) for status in set(statuses)}, metrics.batch_sizes)
    assert len(statuses) == REQUESTS, f"only {len(statuses)} requests within {SECONDS} s"
    assert not wrong, wrong[:10]
    assert statuses.count(200) > REQUESTS // 10
    # After the first quarter the caches are warm: what follows must not add up.
    assert memory[-1] - memory[len(memory) // 4] < 150 * 2**20, [each // 2**20 for each in memory]
