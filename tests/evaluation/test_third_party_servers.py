# ruff: noqa: F811
"""Servers that others wrote, as judges: llm-katan's echo server with a rate limit, and `transformers serve`.

The first is installed with `pip install llm-katan`, in the environment of the tests or elsewhere on the PATH.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from echo4o.endpoints.limits import CallPolicy
from tests.evaluation.test_command import run
from tests.evaluation.test_faults import judge
from tests.evaluation.test_local_judges import tiny_llava  # noqa: F401

START_SECONDS = 120  # until the server has to answer; its imports take long on a busy machine
pytestmark = pytest.mark.long


def wait_for(server: subprocess.Popen, port: int, log: Path) -> None:
    """Wait until a server accepts connections; an error with the end of its log if it does not."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                raise AssertionError(f"no server after {START_SECONDS} s: {log.read_text()[-2000:]}") from None
            time.sleep(0.2)


@contextmanager
def serving(folder, *options):
    """The address of a server that repeats what it is asked."""
    command = shutil.which("llm-katan", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("llm-katan is not installed: pip install llm-katan")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = f"-m judge -b echo -h 127.0.0.1 -p {port} --providers openai,azure_openai".split()
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [command, *start, *options, "--stats-file", folder / "stats"], stdout=log, stderr=log
        )
    try:
        wait_for(server, port, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def katan(tmp_path):
    """The address of a server that answers three calls and refuses all others with 429."""
    with serving(tmp_path, "--rate-limit-after", "3") as address:
        yield address


@pytest.mark.parametrize("benchmark", ["dpg", "dpg_one_call", "geneval"])
def test_an_echo_judges_what_its_question_says(benchmark, tmp_path):
    """The question holds its answer, which the server repeats: the judgements of both benchmarks pass through it."""
    answers = {
        "dpg": '{"answer": "yes"}',
        "dpg_one_call": '{"q1": "yes", "q2": "no"}',
        "geneval": '{"reason": "echoed", "correct": 1}',
    }
    table = tmp_path / "questions.csv"
    header = "item_id,text,proposition_id,dependency,tuple,question_natural_language"
    table.write_text(f"{header}\n1,A dog,1,0,entity - whole (dog),A dog?\n1,A dog,2,1,global - (red),Red?\n")
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    (tmp_path / "question.md").write_text(f"About {{{{ instruction }}}}: {answers[benchmark]}")
    source = ["--prompts", tmp_path / "prompts.jsonl"] if benchmark == "geneval" else ["--questions", table]
    (tmp_path / "images").mkdir()
    for number in range(1, 5):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / f"1_{number}.png")
    with serving(tmp_path) as address:
        judging = ["--judge", "openai:judge", "--judge-url", f"{address}/v1", "--no-probe", "--no-cache"]
        judging += ["--judge-prompt", tmp_path / "question.md", "--images", tmp_path / "images"]
        done = run(benchmark, *source, *judging, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["statuses"]["scored"] == 4
    assert result["score"] == {"dpg": 100.0, "dpg_one_call": 50.0, "geneval": 1.0}[benchmark]


def test_an_echo_fails_the_vision_probe_and_its_rate_limit_is_reported(katan, prompts, pictures, tmp_path):
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
        wait_for(server, port, tmp_path / "log")
        yield f"http://127.0.0.1:{port}/v1", str(tiny_llava)
    finally:
        server.terminate()
        server.wait(10)


def test_a_model_of_random_weights_is_not_taken_for_a_judge(transformers_server, prompts, pictures, tmp_path):
    """transformers' own server: its answers and its refusals are understood, and nothing is scored."""
    url, model = transformers_server
    with pytest.raises(ValueError, match="(?s)stopped at the length limit.*cut_off.*--max-tokens"):
        judge(None, prompts, pictures, tmp_path / "out", CallPolicy(tries=1), timeout=60.0, url=url, model=model)
