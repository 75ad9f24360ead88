"""``echo4o serve``."""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echo4o.cli.evaluate_options import spread
from echo4o.cli.frame import say
from echo4o.cli.generate_options import Adapter, Cache, ModelOptions, Offload, Quantize
from echo4o.cli.models import Model, check_model, choose_device

if TYPE_CHECKING:
    import torch

    from echo4o.serving.limits import Limits
    from echo4o.serving.served_model import ServedModel

KEY_VARIABLE = "ECHO4O_API_KEY"
_SCALED = re.compile(r"(.+):(-?\d+(?:\.\d+)?)")


@spread
def serve(
    *,
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
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Most images that run together in one call of the pipeline.",
            show_default="8; 1 with --cache first-block",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, max=10_000, help="Most images that wait; further requests get status 429.")
    ] = 64,
    max_upload: Annotated[int, typer.Option(min=1, help="Most MiB of a request, its images included.")] = 64,
    app: Annotated[bool, typer.Option("--app/--no-app", help="Serve the web app at /, or the API alone.")] = True,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Keep the images of the app in this folder, so that its history outlives the server.",
            show_default="until the server ends",
        ),
    ] = None,
    loading: ModelOptions,
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
    if len({adapter.name for adapter in adapters}) < len(adapters):
        raise ValueError("--lora: two adapters have the same name; write NAME=WHERE")
    if history is not None and not app:
        raise ValueError("--history keeps the images of the app, which --no-app leaves out")
    batch = batch_limit(max_batch, loading)
    check_model(model)
    where = choose_device(loading.device)
    loading.check(where)
    check_together(loading, adapters)

    from echo4o.serving.server import bind

    listening = bind(host, port)  # before the model is loaded, which can take minutes

    from echo4o.serving.app.history import History
    from echo4o.serving.engine import Engine
    from echo4o.serving.limits import Limits
    from echo4o.serving.server import build_server, run

    kept = History(history) if app else None
    limits = Limits(batch=batch, queue=max_queue, upload_bytes=max_upload * 2**20)
    served = load_served(model, name, where, loading, adapters, limits)
    local = is_loopback(host)
    if not local and key is None:
        say(f"warning: everybody who reaches {host} can use this server; set {KEY_VARIABLE} to require a key")
    engine = Engine(served)
    server = build_server(engine, key=key, local=local, with_app=app, history=kept)
    address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{listening.getsockname()[1]}"
    say(f"serving {model} as {name!r}" + (f"; the app is at {address}" if app else "") + "; Ctrl-C ends it")
    print(f"{address}/v1", flush=True)
    run(engine, listening, server)


def load_served(
    model: str,
    name: str,
    device: "torch.device",
    loading: ModelOptions,
    adapters: Sequence[Adapter],
    limits: "Limits | None" = None,
) -> "ServedModel":
    """Load a pipeline with its adapters, and describe where it comes from for the metadata of its images."""
    from echo4o.cli.generate_loading import load_for_generation
    from echo4o.common.revisions import model_revision, public_name
    from echo4o.serving.served_model import ModelOrigin, ServedModel

    pipe = load_for_generation(model, device, loading, adapters)
    say(pipe.placement().line)
    origin = ModelOrigin(
        revision=model_revision(model, None if Path(model).exists() else pipe),
        adapters={
            each.name: {"name": public_name(each.place), "revision": model_revision(each.place)} for each in adapters
        },
        loading=loading.description(device),
    )
    scales = tuple((each.name, each.scale) for each in adapters)
    # With --offload model, a preview would move the transformer off the GPU and back.
    previews = loading.offload is not Offload.model
    return ServedModel(pipe, name, public_name(model), scales, limits, origin, previews)


def check_together(loading: ModelOptions, adapters: Sequence[Adapter]) -> None:
    """Raise ValueError for options that cannot work together in a server, whose requests select adapters."""
    if adapters and loading.compile:
        raise ValueError(
            "--lora and --compile cannot be combined: each change of adapters would compile the model again"
        )
    if adapters and loading.quantize is not Quantize.none:
        raise ValueError(
            f"--lora and --quantize {loading.quantize} cannot be combined: adapters are not changed on quantized weights"
        )


def batch_limit(given: int | None, loading: ModelOptions) -> int:
    """Most images of a batch. Raises ValueError for several with a cache that would mix the images of a batch."""
    alone = loading.cache is Cache.first_block
    if alone and given is not None and given > 1:
        raise ValueError(
            "--max-batch and --cache first-block cannot be combined: this cache decides once for a whole batch, so that "
            "an image would depend on the requests beside it"
        )
    return given or (1 if alone else 8)


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


def read_adapter(text: str) -> Adapter:
    """The adapter of `[NAME=]WHERE[:SCALE]`. Without a name, it gets that of its folder, file or repository."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name:
        name, place = "", text
    match = None if Path(place).exists() else _SCALED.fullmatch(place)
    scale = float(match[2]) if match else 1.0
    place = match[1] if match else place
    name = name or re.sub(r"[^\w-]", "-", Path(place).name.removesuffix(".safetensors"))
    if not re.fullmatch(r"[\w-]{1,64}", name):
        raise ValueError(f"--lora {text}: the name {name!r} must consist of letters, digits, '-' and '_'")
    return Adapter(name, place, scale)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host == "localhost" or host.startswith("127.") or host == "::1"
