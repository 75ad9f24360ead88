"""A server in this process, for tests."""

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

BASE = Path(__file__).parents[2] / "echo4o" / "quickstart" / "base"


def load_tiny():
    """The quickstart's model, in float32."""
    from echo4o import Echo4oPipeline

    return Echo4oPipeline.from_pretrained(BASE, dtype="float32")


class Running:
    """A running server: its `url`, its `engine` and its `port`."""

    def __init__(self, engine, port: int):
        self.engine, self.port = engine, port
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def client(self, key: str = "none", **options):
        import openai

        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **options)

    def wait_until_idle(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while self.engine.waiting or self.engine.running:
            assert time.monotonic() < deadline, "the engine is still busy"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(model, key: str | None = None, with_app: bool = False, history=None, port: int = 0) -> Iterator[Running]:
    """Serve a `ServedModel` on a port; 0 takes a free one."""
    import uvicorn

    from echo4o.serving.engine import Engine
    from echo4o.serving.server import bind, build_server

    engine = Engine(model)
    listening = bind("127.0.0.1", port)
    app = build_server(engine, key=key, with_app=with_app, history=history)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(engine, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close()
        listening.close()


def png(colour: str = "#c02020", size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()
