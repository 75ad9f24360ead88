"""`echo4o push app`: the Space is published to a loopback Hub, downloaded, installed from its own wheel, and started."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
import types
import zipfile

import pytest

pytest.importorskip("gradio", reason="pip install 'echo4o[app]'")

import httpx

from echo4o.hub.kinds.app import write_app
from echo4o.testing.hub import LoopbackHub
from tests.serving.browser import chromium, keep_screenshot
from tests.serving.running import BASE


@pytest.mark.long
def test_the_wheel_is_complete_and_repeatable(tmp_path):
    first, second = (write_app(tmp_path / name, "owner/tiny") for name in "ab")
    (wheel,) = first.glob("*.whl")
    assert wheel.read_bytes() == (second / wheel.name).read_bytes()
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        assert content.testzip() is None
    for name in (
        "echo4o/serving/space.py",
        "echo4o/modeling/bagel/pipeline_echo4o.py",
        "echo4o/model_cards/app.md.j2",
    ):
        assert name in names
    assert not any(name.startswith("echo4o/testing/") for name in names)


def test_on_zero_gpu_calls_can_be_pickled(tiny, monkeypatch):
    """ZeroGPU runs a decorated function in another process: arguments and results are pickled."""
    from echo4o.serving.served_model import ServedModel
    from echo4o.serving.space import use_zero_gpu

    calls = []

    def gpu(duration):
        def decorate(function):
            def call(*args, **kwargs):
                calls.append(function.__name__)
                args, kwargs = pickle.loads(pickle.dumps((args, kwargs)))
                return pickle.loads(pickle.dumps(function(*args, **kwargs)))

            return call

        return decorate

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    model, plain = ServedModel(tiny), ServedModel(tiny)
    use_zero_gpu(model)
    options = {"options": {"num_inference_steps": 2}, "seed": 3}
    (on_zero,) = model.generate(model.image_tasks(["a dot"], **options))
    (direct,) = plain.generate(plain.image_tasks(["a dot"], **options))
    assert on_zero.image.tobytes() == direct.image.tobytes() and on_zero.settings == direct.settings
    task = {"options": {"max_new_tokens": 3}}
    assert model.chat([model.chat_task("hi", [], **task)]) == plain.chat([plain.chat_task("hi", [], **task)])
    assert calls == ["generate", "answer"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_was_published_starts(tmp_path):
    with LoopbackHub(user="owner") as hub:
        hub.add_folder("owner/tiny", BASE)
        (tmp_path / "home").mkdir()
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        push = [sys.executable, "-m", "echo4o", "push", "app", "owner/tiny-app", "--model", "owner/tiny"]
        done = subprocess.run(push, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = hub.repo("owner/tiny-app", "spaces").files
        assert {"app.py", "requirements.txt", "README.md", "echo4o_app.json"} <= set(files)
        assert "sdk: gradio" in files["README.md"].data.decode()
        again = subprocess.run(push, env=environment, capture_output=True, text=True)
        assert "up to date" in again.stderr
        space, site = tmp_path / "space", tmp_path / "site"
        download = (
            "import sys; from huggingface_hub import snapshot_download as get;"
            "get('owner/tiny-app', repo_type='space', local_dir=sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", download, str(space)], env=environment, check=True)
        (wheel,) = space.glob("*.whl")
        assert f"./{wheel.name}" in (space / "requirements.txt").read_text()
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*install, str(wheel)], check=True)
        start_and_look(space, site, environment)


def start_and_look(space, site, environment: dict[str, str]) -> None:
    """Start the Space with its own copy of the package, and generate an image in a browser."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = environment | {
        "PYTHONPATH": str(site),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
    }
    code = (
        "import echo4o, runpy, sys; print(echo4o.__file__, flush=True); runpy.run_path('app.py', run_name='__main__')"
    )
    app = subprocess.Popen([sys.executable, "-c", code], cwd=space, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert app.stdout.readline().startswith(str(site)), "the package is that of the wheel"
        deadline = time.monotonic() + 300
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/", timeout=10).status_code == 200
                break
            except httpx.TransportError:
                assert app.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        with chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.goto(f"http://127.0.0.1:{port}/")
            page.fill("#generate-prompt textarea", "a photo of a red circle")
            page.click("#generate-start")
            page.locator("#generate-status").filter(has_text="Done. Seed").wait_for()
            keep_screenshot(page, "space")
    finally:
        app.kill()
        app.wait()


@pytest.mark.long
def test_mistakes_are_told(tmp_path):
    from typer.testing import CliRunner

    from echo4o.cli import app

    for arguments, words in (
        (["app", "owner/app", "--model", str(tmp_path)], "owner/name"),
        (["runs/x", "owner/app", "--model", "owner/m"], "belong to an app"),
    ):
        result = CliRunner().invoke(app, ["push", *arguments])
        assert result.exit_code == 2 and words in result.stderr
    assert json.loads((write_app(tmp_path / "a", "o/m", [("x", "o/l", 0.5)]) / "echo4o_app.json").read_text()) == {
        "model": "o/m",
        "adapters": [{"name": "x", "source": "o/l", "scale": 0.5}],
    }
    assert os.path.isfile(tmp_path / "a" / "requirements.txt")
