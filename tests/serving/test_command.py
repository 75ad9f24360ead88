"""`echo4o serve` as a command: what it says when it cannot start, and that it ends cleanly."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.cli.serve import is_loopback, read_adapter, read_key
from tests.serving.running import BASE


def run(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "200"})


def test_adapters_are_named_placed_and_scaled(tmp_path):
    assert read_adapter("style=runs/a:0.5") == ("style", "runs/a", 0.5)
    assert read_adapter("owner/my.lora") == ("my-lora", "owner/my.lora", 1.0)
    folder = tmp_path / "a:0.5"
    folder.mkdir()
    assert read_adapter(str(folder)) == ("a-0-5", str(folder), 1.0)
    with pytest.raises(ValueError, match="letters, digits"):
        read_adapter("my style=runs/a")


def test_the_key_comes_from_the_environment_and_is_not_repeated(monkeypatch):
    monkeypatch.delenv("ECHO4O_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("ECHO4O_API_KEY", "sk-1")
    monkeypatch.setenv("MY_KEY", "sk-2")
    assert (read_key(None), read_key("MY_KEY")) == ("sk-1", "sk-2")
    with pytest.raises(ValueError, match="not set") as error:
        read_key("sk-secret")
    assert "sk-secret" not in str(error.value)


def test_hosts_of_this_machine():
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and not is_loopback("0.0.0.0")


def test_mistakes_are_one_line(tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")
    lines = {
        ("--model", str(tmp_path / "absent")): "there is no such folder",
        ("--model", str(BASE), "--device", "cuda:7"): "not available",
        ("--model", str(BASE), "--lora", "a=x", "--lora", "a=y"): "same name",
        ("--model", str(BASE), "--host", "no.such.host.invalid"): "cannot listen",
    }
    for arguments, words in lines.items():
        result = run(*arguments)
        assert result.exit_code == 2 and words in result.stderr, (arguments, result.output)
        assert result.stderr.strip().count("\n") == 0


def test_options_that_cannot_work_together_are_one_error(tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")
    (tmp_path / "file").write_text("x")
    for options, words in {
        "--lora a --quantize int8": "--lora and --quantize int8 cannot be combined",
        "--lora a --compile": "--lora and --compile cannot be combined",
        "--cache first-block --max-batch 4": "--max-batch and --cache first-block cannot be combined",
        "--quantize int8 --compile": "--compile and --quantize cannot be combined",
        "--quantize nf4 --device cpu": "--quantize nf4 needs a CUDA GPU",
        "--offload model --device cpu": "--offload model moves weights",
        "--no-app --history kept": "--history keeps the images of the app",
        f"--history {tmp_path / 'file'}": "cannot be used",
    }.items():
        result = run("--model", str(BASE), "--port", "0", *options.split())
        assert result.exit_code == 2 and words in result.stderr, (options, result.output)
        assert result.stderr.strip().count("\n") == 0


@pytest.mark.long
@pytest.mark.parametrize("options", [{"cache": "first-block"}, {"cache": "taylorseer"}, {"offload": "disk"}])
def test_ways_to_run_the_model_serve_batches(options):
    """What `generate` gives with these options, and a batched image equals the single one."""
    import torch

    from echo4o.cli.generate_options import Cache, ModelOptions, Offload
    from echo4o.cli.models import Dtype
    from echo4o.cli.serve import batch_limit, load_served
    from echo4o.serving.limits import Limits

    kinds = {"cache": Cache, "offload": Offload}
    in_float32 = ModelOptions(dtype=Dtype.float32)
    loading = replace(in_float32, **{name: kinds[name](value) for name, value in options.items()})
    limits = Limits(batch=batch_limit(None, loading))
    model = load_served(str(BASE), "echo4o", torch.device("cpu"), loading, [], limits)
    plain = load_served(str(BASE), "echo4o", torch.device("cpu"), in_float32, [])
    tasks = [
        model.image_tasks([text], seed=seed, options={"num_inference_steps": 8})[0]
        for seed, text in enumerate(["a photo of a red circle", "a photo of a blue star"])
    ]
    assert limits.batch == (1 if loading.cache is Cache.first_block else 8)
    alone = [np.asarray(model.generate([task])[0].image, dtype=int) for task in tasks]
    if limits.batch > 1:
        together = [np.asarray(each.image, dtype=int) for each in model.generate(tasks)]
        assert all(np.abs(a - b).max() <= 2 for a, b in zip(alone, together, strict=True))
    exact = np.asarray(plain.generate(tasks[:1])[0].image, dtype=int)
    difference = np.abs(exact - alone[0]).max()
    if loading.cache is Cache.taylorseer:
        assert difference > 0, "layers were skipped"
    if loading.offload is not Offload.none:
        assert difference <= 1  # from disk within 1e-5, see docs/memory.md
    assert model.generate(tasks[:1])[0].metadata.loading[next(iter(options))] == next(iter(options.values()))


def test_a_port_that_is_in_use_is_told_before_the_model_is_loaded():
    pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("--model", str(BASE), "--port", str(port))
    assert result.exit_code == 2 and f"127.0.0.1:{port}" in result.stderr and "another server" in result.stderr


def test_missing_libraries_are_told(monkeypatch):
    from echo4o.cli import serve

    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    result = run("--model", str(BASE))
    assert result.exit_code == 2 and "pip install 'echo4o[app]'" in result.stderr


@pytest.mark.long
def test_the_command_serves_until_it_is_interrupted():
    pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")
    import openai

    command = subprocess.Popen(
        [sys.executable, "-m", "echo4o", "serve", "--model", str(BASE), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"ECHO4O_API_KEY": "sk-of-the-test"},
    )
    try:
        url = command.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url), url
        client = openai.OpenAI(base_url=url, api_key="sk-of-the-test")
        assert client.images.generate(prompt="a dot", extra_body={"steps": 1}).data[0].b64_json
        time.sleep(0.1)
    finally:
        command.send_signal(signal.SIGINT)
        errors = command.communicate(timeout=60)[1]
    assert command.returncode in (0, 130) and "Traceback" not in errors and "sk-of" not in errors, errors
