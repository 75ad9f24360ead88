"""examples/ray_serve/app.py with two replicas of the quickstart's model on the CPU."""

import io
import threading

import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")
pytest.importorskip("ray", reason="pip install 'echo4o[ray]'")

import httpx
import ray
from PIL import Image
from ray import serve

from tests.serving.running import BASE

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url():
    from examples.ray_serve.app import app

    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(app({"model": str(BASE), "replicas": "2"}), name="images", route_prefix="/")
    yield "http://127.0.0.1:8123/"
    serve.shutdown()
    ray.shutdown()


def test_two_replicas_share_the_requests_and_batch_them(url):
    bodies = [{"prompt": "a photo of a red circle", "seed": seed, "steps": 2} for seed in range(16)]
    answers: list = [None] * len(bodies)

    def ask(index: int) -> None:
        answers[index] = httpx.post(url, json=bodies[index], timeout=300)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    assert [answer.headers["X-Seed"] for answer in answers] == [str(body["seed"]) for body in bodies]
    assert max(int(answer.headers["X-Batch"]) for answer in answers) > 1
    assert Image.open(io.BytesIO(answers[0].content)).size == (64, 64)
    states = serve.status().applications["images"].deployments["Images"].replica_states
    assert sum(states.values()) == 2


def test_mistakes_are_400(url):
    for body, words in (({"prompt": ""}, "empty"), ({"prompt": "a", "colour": 1}, "colour"), ({}, "prompt")):
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
