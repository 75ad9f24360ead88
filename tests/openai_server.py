"""An OpenAI-compatible judge on the loopback interface, for tests: it sees pictures, and goes wrong on request.

    with OpenAIServer() as server:
        server.verdict = lambda call: {"reason": "two cups", "correct": 1}
        server.inject(Fault("http_429", retry_after=0.1, times=3))
        judge = OpenAIJudge("judge", url=server.url)

It draws, too: `server.paint` answers images/generations and images/edits, `server.write` chats without pictures, and
`server.models` is what it offers.

It bills as endpoints do that know the header `Idempotency-Key`: an answer is paid for once per key, when it has been
handed to a client that is still there.
"""

import base64
import email
import http.server
import io
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

KEY = "sk-loopback-0123456789-secret"
_NAMED = {(29, 62, 214): "blue", (255, 217, 15): "yellow"}


@dataclass(frozen=True)
class Call:
    """One request, read."""

    model: str
    text: str
    images: tuple[bytes, ...]
    body: dict[str, Any]
    headers: dict[str, str]
    kind: str = "chat"  # or "generate", "edit"

    @property
    def key(self) -> str:
        return self.headers.get("idempotency-key", "")

    @property
    def is_probe(self) -> bool:
        return "test picture" in self.text

    def picture(self, index: int = -1) -> Image.Image:
        return Image.open(io.BytesIO(self.images[index])).convert("RGB")


@dataclass
class Fault:
    """What goes wrong with the next `times` matching calls (probes are spared unless `probe`).

    Kinds: http_NNN (with `retry_after` or `headers`), late (by `delay` seconds), nothing (the connection closes),
    empty, half (of a JSON object), fence, prose, refusal, filtered, cut, wrong_fields, out_of_range, two_verdicts,
    no_choices, not_json (the body), no_schema (400 if structured outputs are asked for), echo_key. Of pictures:
    moderation (400 with its code), no_picture, half_picture, link.
    """

    kind: str
    times: int = 1
    match: str = ""  # in the text of the question
    of: str = ""  # only this kind of call
    retry_after: float | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    message: str = "the server was told to fail"
    code: str | None = None
    probe: bool = False


class OpenAIServer:
    """See the module's docstring. `calls` holds every request, `paid` counts billed answers by key."""

    def __init__(self, latency: float = 0.0, vision: bool = True):
        self.latency, self.vision = latency, vision
        self.verdict: Callable[[Call], dict] = lambda call: {"reason": "as asked", "correct": 1}
        self.write: Callable[[Call], str] | None = None
        self.paint: Callable[[Call], bytes] = lambda call: _plain_picture()
        self.models: list[str] | None = None  # None: the server has no list of them
        self.calls: list[Call] = []
        self.paid: Counter[str] = Counter()
        self.open = self.peak = 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "OpenAIServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(self, *faults: Fault) -> None:
        self._faults += faults

    @property
    def judged(self) -> list[Call]:
        """The calls that were no probes."""
        return [call for call in self.calls if not call.is_probe]

    def take_fault(self, call: Call) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                matches = fault.match in call.text and fault.of in ("", call.kind)
                if fault.times > 0 and matches and (fault.probe or not call.is_probe):
                    fault.times -= 1
                    return fault
        return None

    def begin(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
            self.open += 1
            self.peak = max(self.peak, self.open)

    def end(self, call: Call, delivered: bool) -> None:
        with self._lock:
            self.open -= 1
            if delivered:
                self.paid[call.key] = 1 if call.key else self.paid[call.key] + 1

    def say(self, call: Call) -> dict[str, Any]:
        """What an honest judge answers."""
        if not call.is_probe:
            return self.verdict(call)
        if not self.vision:
            return {"reason": "I believe it is", "left": "red", "right": "green"}
        picture = call.picture()
        left, right = (_NAMED.get(picture.getpixel((x, 8)), "unknown") for x in (8, picture.width - 8))
        return {"reason": "two halves", "left": left, "right": right}


def _plain_picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "#f4f4f4").save(data, "PNG")
    return data.getvalue()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no event."""


def read_call(body: dict, headers) -> Call:
    texts, images = [], []
    for message in body["messages"]:
        content = message["content"]
        if isinstance(content, str):
            texts.append(content)
            continue
        for part in content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                images.append(base64.b64decode(part["image_url"]["url"].partition("base64,")[2]))
    lower = {name.lower(): value for name, value in headers.items()}
    return Call(body["model"], "\n".join(texts), tuple(images), body, lower)


def read_image_call(path: str, data: bytes, headers) -> Call:
    """A request to draw: JSON, or a form with the reference pictures."""
    lower = {name.lower(): value for name, value in headers.items()}
    if path.endswith("/images/generations"):
        body = json.loads(data)
        return Call(body["model"], body["prompt"], (), body, lower, "generate")
    form = email.message_from_bytes(f"Content-Type: {lower['content-type']}\r\n\r\n".encode() + data)
    body, images = {}, []
    for part in form.get_payload():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if name.startswith("image"):
            images.append(content)
        else:
            body[name] = content.decode()
    return Call(body["model"], body["prompt"], tuple(images), body, lower, "edit")


def drawn(picture: bytes | None) -> dict:
    """The answer of the images endpoints."""
    data = [] if picture is None else [{"b64_json": base64.b64encode(picture).decode()}]
    usage = {"input_tokens": 50, "output_tokens": 1000, "total_tokens": 1050}
    usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 50}
    return {"created": 0, "data": data, "usage": usage}


def completion(call: Call, content: str | None, refusal: str | None = None, finish: str = "stop") -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": call.model,
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, "refusal": refusal},
            }
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }


def _spoiled(fault: Fault, call: Call, said: dict) -> dict:
    """The completion that a fault makes of what would have been said."""
    good = json.dumps(said)
    numbers = {name: value for name, value in said.items() if name != "reason"}
    contents = {
        "late": good,
        "empty": "",
        "half": good[: len(good) // 2],
        "fence": f"Here is my verdict:\n```json\n{json.dumps(said, indent=2)}\n```\n",
        "prose": f"After a close look {{as asked}} I would say {good}, all in all.",
        "wrong_fields": json.dumps({"explanation": "other fields", "verdict": "yes"}),
        "out_of_range": json.dumps({"reason": "too good"} | dict.fromkeys(numbers, 11)),
        "two_verdicts": good + "\n" + json.dumps({"reason": "or not"} | dict.fromkeys(numbers, 0)),
        "echo_key": json.dumps(said | {"reason": f"you sent {call.headers.get('authorization')}"}),
        "no_schema": good,
    }
    if fault.kind == "refusal":
        return completion(call, None, refusal="I cannot help with that.")
    if fault.kind == "filtered":
        return completion(call, None, finish="content_filter")
    if fault.kind == "cut":
        return completion(call, good[: len(good) // 2], finish="length")
    if fault.kind == "no_choices":
        return completion(call, good) | {"choices": []}
    return completion(call, contents[fault.kind])


def _spoiled_picture(fault: Fault, picture: bytes) -> dict:
    answers = {
        "late": drawn(picture),
        "no_picture": drawn(None),
        "half_picture": drawn(picture[: len(picture) // 2]),
        "link": drawn(None) | {"data": [{"url": "https://pictures.invalid/1.png"}]},
    }
    return answers[fault.kind]


def _handler(server: OpenAIServer):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet per answer: no waiting for acknowledgements
        disable_nagle_algorithm = True

        def log_message(self, *_) -> None:
            pass

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if "/images/" in self.path:
                call = read_image_call(self.path, data, self.headers)
            else:
                call = read_call(json.loads(data), self.headers)
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                self._fail(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", {})
                return
            server.begin(call)
            delivered = False
            try:
                delivered = self._answer(call)
            finally:
                server.end(call, delivered)

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                self._fail(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", {})
            elif not self.path.endswith("/models") or server.models is None:
                self._fail(404, "there is no such page", {})
            else:
                data = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in server.models]
                self._send(200, {"object": "list", "data": data})

        def _answer(self, call: Call) -> bool:
            fault = server.take_fault(call)
            time.sleep(server.latency + (fault.delay if fault else 0.0))
            if self._client_is_gone():
                self.close_connection = True
                return False
            if server.models is not None and call.model not in server.models:
                return self._fail(404, f"The model {call.model} does not exist", {}, "model_not_found")
            if fault is None:
                return self._send(200, self._good(call))
            if fault.kind == "nothing":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return False
            if fault.kind == "no_schema" and "response_format" in call.body:
                fault.times += 1
                return self._fail(400, "response_format of type json_schema is not supported", {})
            if re.fullmatch(r"http_\d{3}", fault.kind):
                headers = dict(fault.headers)
                if fault.retry_after is not None:
                    headers["Retry-After"] = str(fault.retry_after)
                message = fault.message.replace("{key}", self.headers["Authorization"])
                return self._fail(int(fault.kind[5:]), message, headers, fault.code)
            if fault.kind == "not_json":
                return self._send(200, None, raw=b"<html>a proxy's login page</html>", content_type="text/html")
            if fault.kind == "moderation":
                return self._fail(400, "Your request was not accepted.", {}, "moderation_blocked")
            if call.kind != "chat":
                return self._send(200, _spoiled_picture(fault, server.paint(call)))
            if server.write is not None and not call.images:
                return self._send(200, _spoiled(fault, call, {"said": server.write(call)}))
            return self._send(200, _spoiled(fault, call, server.say(call)))

        def _good(self, call: Call) -> dict:
            if call.kind != "chat":
                return drawn(server.paint(call))
            if server.write is not None and not call.images:
                return completion(call, server.write(call))
            return completion(call, json.dumps(server.say(call)))

        def _client_is_gone(self) -> bool:
            try:
                self.connection.setblocking(False)
                return self.connection.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True
            finally:
                self.connection.setblocking(True)

        def _fail(self, status: int, message: str, headers: dict[str, str], code: str | None = None) -> bool:
            error = {"message": message, "type": "error", "code": code, "param": None}
            self._send(status, {"error": error}, headers=headers)
            return False

        def _send(self, status: int, value, headers=None, raw: bytes | None = None, content_type="application/json"):
            data = raw if raw is not None else json.dumps(value).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(data)))
                for name, content in (headers or {}).items():
                    self.send_header(name, content)
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()
            except OSError:
                self.close_connection = True
                return False
            return True

    return Handler
