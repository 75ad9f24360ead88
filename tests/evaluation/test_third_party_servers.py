# ruff: noqa: F811
"""Servers that others wrote, as judges: llm-katan's echo server with a rate limit, and `transformers serve`.

The first is installed with `pip install llm-katan`, in the environment of the tests or elsewhere on the PATH.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echo4o.endpoints.limits import CallPolicy
from tests.evaluation.test_faults import judge
from tests.evaluation.test_local_judges import tiny_llava  # noqa: F401

START_SECONDS = 30  # until the server has to answer
pytestmark = pytest.mark.long


@pytest.fixture
def katan(tmp_path):
    """The address of a server that answers three calls and refuses all others with 429."""
    command = shutil.which("llm-katan", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("llm-katan is not installed: pip install llm-katan")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-m judge -b echo -h 127.0.0.1 -p {port} --rate-limit-after 3 --providers openai,azure_openai".split()
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen([command, *options, "--stats-file", tmp_path / "stats"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def test_an_echo_does_not_see_and_its_rate_limit_is_told(katan, prompts, pictures, tmp_path):
    addresses = [f"{katan}/v1", f"{katan}/openai/deployments/judge?api-version=2024-10-21", f"{katan}/v1"]
    for number, url in enumerate(addresses):
        with pytest.raises(ValueError, match="does not seem to see images"):
            judge(None, prompts, pictures, tmp_path / str(number), url=url)
    with pytest.raises(ValueError, match=r"rate limit exceeded.*http_429|http_429.*rate limit exceeded"):
        judge(None, prompts, pictures, tmp_path / "limited", CallPolicy(tries=2, first_wait=0.01), url=addresses[0])


@pytest.fixture
def transformers_server(tiny_llava, tmp_path):
    """The address of `transformers serve` with a vision-language model of random weights, and the model's name."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        pytest.skip("transformers serve needs more packages: pip install fastapi uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    arguments = f"serve {tiny_llava} --host 127.0.0.1 --port {port} --device cpu --dtype float32".split()
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 4 * START_SECONDS  # imports torch and loads the model
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > end or server.poll() is not None:
                    raise AssertionError((tmp_path / "log").read_text()[-2000:]) from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(tiny_llava)
    finally:
        server.terminate()
        server.wait(10)


def test_a_model_of_random_weights_is_not_taken_for_a_judge(transformers_server, prompts, pictures, tmp_path):
    """transformers' own server: its answers and its refusals are understood, and nothing is scored."""
    url, model = transformers_server
    with pytest.raises(ValueError, match="(?s)stopped at the length limit.*cut_off.*--max-tokens"):
        judge(None, prompts, pictures, tmp_path / "out", CallPolicy(tries=1), timeout=60.0, url=url, model=model)
