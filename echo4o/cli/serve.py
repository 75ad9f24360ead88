"""``echo4o serve``."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import say
from echo4o.cli.models import Device, Dtype, DtypeOption, Model, check_model, choose_device, load_pipeline

KEY_VARIABLE = "ECHO4O_API_KEY"
_SCALED = re.compile(r"(.+):(-?\d+(?:\.\d+)?)")


def serve(
    model: Model,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="[NAME=]WHERE[:SCALE]",
            help="A LoRA adapter: a folder, a file or a Hub repository. Repeatable; all act together unless a request "
            "selects others by NAME.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0 makes the server visible to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 7860,
    name: Annotated[str, typer.Option(help="The model name that clients of the API use.")] = "echo4o",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="VARIABLE",
            help="The environment variable that holds the key of the API, which is the password of the app, too.",
            show_default=f"{KEY_VARIABLE}, if it is set",
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=64, help="Most images that run together in one call of the pipeline.")
    ] = 8,
    max_queue: Annotated[
        int, typer.Option(min=1, max=10_000, help="Most images that wait; further requests get status 429.")
    ] = 64,
    max_upload: Annotated[int, typer.Option(min=1, help="Most MiB of a request, its images included.")] = 64,
    app: Annotated[bool, typer.Option("--app/--no-app", help="Serve the web app at /, or the API alone.")] = True,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Serve a model: a web app at / and an OpenAI-compatible API under /v1.

    Example: [bold]echo4o serve --model DIR[/bold]
    With two adapters, one at half strength: [bold]echo4o serve --model DIR --lora style=runs/a --lora runs/b:0.5[/bold]

    The model is loaded once. Requests that wait together run as one batch. From Python:

        client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
        client.images.generate(model="echo4o", prompt="a lighthouse", size="512x512", extra_body={"seed": 1, "steps": 30})

    Other commands of echo4o use it with --judge openai:echo4o --judge-url http://127.0.0.1:7860/v1. GET /health and /metrics
    describe its state. Ctrl-C ends the server and cancels its work.
    """
    require_serving(app)
    key = read_key(api_key)
    adapters = [read_adapter(text) for text in lora or []]
    if len({adapter[0] for adapter in adapters}) < len(adapters):
        raise ValueError("--lora: two adapters have the same name; write NAME=WHERE")
    check_model(model)
    where = choose_device(device)

    from echo4o.serving.server import bind

    listening = bind(host, port)  # before the model is loaded, which can take minutes

    from echo4o.common.revisions import model_revision, public_name
    from echo4o.serving.engine import Engine
    from echo4o.serving.limits import Limits
    from echo4o.serving.served_model import ModelOrigin, ServedModel
    from echo4o.serving.server import build_server, run

    pipe = load_pipeline(model, where, dtype)
    say(pipe.placement().line)
    for adapter, place, _ in adapters:
        pipe.load_lora_weights(place, adapter_name=adapter)
    limits = Limits(batch=max_batch, queue=max_queue, upload_bytes=max_upload * 2**20)
    scales = tuple((adapter, scale) for adapter, _, scale in adapters)
    origin = ModelOrigin(
        revision=model_revision(model, None if Path(model).exists() else pipe),
        adapters={
            adapter: {"name": public_name(place), "revision": model_revision(place)} for adapter, place, _ in adapters
        },
        loading={"dtype": dtype.value, "device": where.type},
    )
    served = ServedModel(pipe, name, public_name(model), scales, limits, origin)
    local = is_loopback(host)
    if not local and key is None:
        say(f"warning: everybody who reaches {host} can use this server; set {KEY_VARIABLE} to require a key")
    engine = Engine(served)
    server = build_server(engine, key=key, local=local, with_app=app)
    address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{listening.getsockname()[1]}"
    say(f"serving {model} as {name!r}" + (f"; the app is at {address}" if app else "") + "; Ctrl-C ends it")
    print(f"{address}/v1", flush=True)
    run(engine, listening, server)


def require_serving(app: bool) -> None:
    """Raise ValueError if the libraries of the extra `app` are missing; only the app needs gradio."""
    names = ["fastapi", "uvicorn", "python_multipart", *(["gradio"] if app else [])]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"echo4o serve needs {', '.join(missing)}: pip install 'echo4o[app]'")


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None if none is asked for. A given name that is not set is an error.

    The value of the option is never repeated: it may be the key itself.
    """
    if variable is None:
        return os.environ.get(KEY_VARIABLE) or None
    key = os.environ.get(variable)
    if not key:
        raise ValueError("--api-key: names an environment variable that is not set; the key itself is not an argument")
    return key


def read_adapter(text: str) -> tuple[str, str, float]:
    """(name, place, scale) of `[NAME=]WHERE[:SCALE]`."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name:
        name, place = "", text
    match = None if Path(place).exists() else _SCALED.fullmatch(place)
    scale = float(match[2]) if match else 1.0
    place = match[1] if match else place
    name = name or re.sub(r"[^\w-]", "-", Path(place).name.removesuffix(".safetensors"))
    if not re.fullmatch(r"[\w-]{1,64}", name):
        raise ValueError(f"--lora {text}: the name {name!r} must consist of letters, digits, '-' and '_'")
    return name, place, scale


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host == "localhost" or host.startswith("127.") or host == "::1"
