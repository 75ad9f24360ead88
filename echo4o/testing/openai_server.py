"""An OpenAI-compatible server on 127.0.0.1, for tests of judges, image endpoints and synthesis recipes.

    from echo4o.testing.openai_server import API_KEY, EndpointFault, OpenAIServer

    os.environ["OPENAI_API_KEY"] = API_KEY                      # any other key is refused
    with OpenAIServer() as server:
        server.verdict = lambda call: {"reason": "two cups", "correct": 1}
        server.inject(EndpointFault("http_429", retry_after=0.1, times=3))
        evaluate_images("genevalpp", images, OpenAIJudge("judge", url=server.url), out, rows=rows)
        assert len(server.judged) == 4

`server.verdict` answers chat requests with images, `server.text` chat requests without images, `server.image`
images/generations and images/edits; `server.models` is the list of models.

Billing follows endpoints that honour `Idempotency-Key`: an answer is paid for once per key, when it has been delivered
to a client that is still connected.
"""

import base64
import email.message
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
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from PIL.Image import Image

API_KEY = "sk-loopback-0123456789-secret"
_PROBE_COLOURS = {(29, 62, 214): "blue", (255, 217, 15): "yellow"}


@dataclass(frozen=True)
class RecordedCall:
    """One request that the server received.

    Attributes:
        text: all text of the messages, or the prompt of an image request.
        images: the image files of the request, in order.
        kind: "chat", "generate" or "edit".
    """

    model: str
    text: str
    images: tuple[bytes, ...]
    body: dict[str, Any]
    headers: dict[str, str]
    kind: str = "chat"

    @property
    def key(self) -> str:
        """The `Idempotency-Key`, or an empty string."""
        return self.headers.get("idempotency-key", "")

    @property
    def is_probe(self) -> bool:
        """Whether this is the vision probe that comes before judging."""
        return "test picture" in self.text

    def open_image(self, index: int = -1) -> "Image":
        """One image of the request, decoded; by default the last one."""
        from PIL import Image

        return Image.open(io.BytesIO(self.images[index])).convert("RGB")


@dataclass
class EndpointFault:
    """A fault for the next `times` matching calls.

    Args:
        kind: for all calls: http_NNN (with `retry_after` or `headers`), late (by `delay` seconds), nothing (the
            connection closes), not_json. For chat: empty, half (of a JSON object), fence, prose, refusal, filtered, cut,
            wrong_fields, out_of_range, two_verdicts, no_choices, no_schema (400 if structured outputs are requested),
            echo_key. For images: moderation (400 with its code), no_image, half_image, link.
        match: only calls whose text contains this.
        call_kind: only calls of this kind: "chat", "generate" or "edit".
        retry_after: value of the header Retry-After.
        delay: seconds to wait before the answer.
        message, code: of the error.
        probe: whether the vision probe is affected, too.
    """

    kind: str
    times: int = 1
    match: str = ""
    call_kind: str = ""
    retry_after: float | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    message: str = "the server was told to fail"
    code: str | None = None
    probe: bool = False


class OpenAIServer:
    """The server; it runs inside a `with` block.

    Args:
        latency: seconds before every answer.
        vision: whether the model sees images (False: the vision probe fails).

    Attributes:
        url: the address, for OPENAI_BASE_URL.
        verdict, text, image: functions that answer a [`RecordedCall`]; assign your own.
        models: names that the server offers; None: it has no list of models and accepts every name.
        calls: every request; `judged` leaves out the vision probes.
        paid: number of billed answers by key.
        open, peak: calls that are open now, and most calls that were open at once.
    """

    def __init__(self, latency: float = 0.0, vision: bool = True):
        self.latency, self.vision = latency, vision
        self.verdict: Callable[[RecordedCall], dict] = lambda call: {"reason": "as asked", "correct": 1}
        self.text: Callable[[RecordedCall], str] | None = None
        self.image: Callable[[RecordedCall], bytes] = lambda call: _plain_image()
        self.models: list[str] | None = None
        self.calls: list[RecordedCall] = []
        self.paid: Counter[str] = Counter()
        self.open = self.peak = 0
        self._faults: list[EndpointFault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_EndpointHandler,), {"endpoint": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "OpenAIServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(self, *faults: EndpointFault) -> None:
        """Make matching calls fail as the faults describe."""
        self._faults += faults

    @property
    def judged(self) -> list[RecordedCall]:
        """The calls that are not vision probes."""
        return [call for call in self.calls if not call.is_probe]

    def take_fault(self, call: RecordedCall) -> EndpointFault | None:
        with self._lock:
            for fault in self._faults:
                matches = fault.match in call.text and fault.call_kind in ("", call.kind)
                if fault.times > 0 and matches and (fault.probe or not call.is_probe):
                    fault.times -= 1
                    return fault
        return None

    def begin(self, call: RecordedCall) -> None:
        with self._lock:
            self.calls.append(call)
            self.open += 1
            self.peak = max(self.peak, self.open)

    def end(self, call: RecordedCall, delivered: bool) -> None:
        with self._lock:
            self.open -= 1
            if delivered:
                self.paid[call.key] = 1 if call.key else self.paid[call.key] + 1

    def judge_answer(self, call: RecordedCall) -> dict[str, Any]:
        """The answer of a judge without faults."""
        if not call.is_probe:
            return self.verdict(call)
        if not self.vision:
            return {"reason": "I believe it is", "left": "red", "right": "green"}
        image = call.open_image()
        pixels = [cast(tuple[int, int, int], image.getpixel((x, 8))) for x in (8, image.width - 8)]
        left, right = (_PROBE_COLOURS.get(pixel, "unknown") for pixel in pixels)
        return {"reason": "two halves", "left": left, "right": right}


def _plain_image() -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (64, 64), "#f4f4f4").save(data, "PNG")
    return data.getvalue()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        """Print nothing when a client has closed the connection."""


def read_chat_request(body: dict, headers) -> RecordedCall:
    """A request to chat/completions."""
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
    return RecordedCall(body["model"], "\n".join(texts), tuple(images), body, lower)


def read_image_request(path: str, data: bytes, headers) -> RecordedCall:
    """A request to images/generations (JSON) or images/edits (a form with the reference images)."""
    lower = {name.lower(): value for name, value in headers.items()}
    if path.endswith("/images/generations"):
        body = json.loads(data)
        return RecordedCall(body["model"], body["prompt"], (), body, lower, "generate")
    form = email.message_from_bytes(f"Content-Type: {lower['content-type']}\r\n\r\n".encode() + data)
    body, images = {}, []
    for part in cast(list[email.message.Message], form.get_payload()):
        name = str(part.get_param("name", header="content-disposition"))
        content = cast(bytes, part.get_payload(decode=True))
        if name.startswith("image"):
            images.append(content)
        else:
            body[name] = content.decode()
    return RecordedCall(body["model"], body["prompt"], tuple(images), body, lower, "edit")


def image_response(image: bytes | None) -> dict:
    """The answer of images/generations and images/edits."""
    data = [] if image is None else [{"b64_json": base64.b64encode(image).decode()}]
    usage: dict[str, Any] = {"input_tokens": 50, "output_tokens": 1000, "total_tokens": 1050}
    usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 50}
    return {"created": 0, "data": data, "usage": usage}


def chat_response(call: RecordedCall, content: str | None, refusal: str | None = None, finish: str = "stop") -> dict:
    """The answer of chat/completions."""
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


def _faulty_completion(fault: EndpointFault, call: RecordedCall, answer: dict) -> dict:
    """The completion with the fault instead of the right answer."""
    good = json.dumps(answer)
    numbers = {name: value for name, value in answer.items() if name != "reason"}
    contents = {
        "late": good,
        "empty": "",
        "half": good[: len(good) // 2],
        "fence": f"Here is my verdict:\n```json\n{json.dumps(answer, indent=2)}\n```\n",
        "prose": f"After a close look {{as asked}} I would say {good}, all in all.",
        "wrong_fields": json.dumps({"explanation": "other fields", "verdict": "yes"}),
        "out_of_range": json.dumps({"reason": "too good"} | dict.fromkeys(numbers, 11)),
        "two_verdicts": good + "\n" + json.dumps({"reason": "or not"} | dict.fromkeys(numbers, 0)),
        "echo_key": json.dumps(answer | {"reason": f"you sent {call.headers.get('authorization')}"}),
        "no_schema": good,
    }
    if fault.kind == "refusal":
        return chat_response(call, None, refusal="I cannot help with that.")
    if fault.kind == "filtered":
        return chat_response(call, None, finish="content_filter")
    if fault.kind == "cut":
        return chat_response(call, good[: len(good) // 2], finish="length")
    if fault.kind == "no_choices":
        return chat_response(call, good) | {"choices": []}
    return chat_response(call, contents[fault.kind])


def _faulty_image(fault: EndpointFault, image: bytes) -> dict:
    answers = {
        "late": image_response(image),
        "no_image": image_response(None),
        "half_image": image_response(image[: len(image) // 2]),
        "link": image_response(None) | {"data": [{"url": "https://images.invalid/1.png"}]},
    }
    return answers[fault.kind]


class _EndpointHandler(http.server.BaseHTTPRequestHandler):
    """Answers the requests to an `OpenAIServer`; a subclass sets `endpoint`."""

    endpoint: OpenAIServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer: no waiting for acknowledgements
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "/images/" in self.path:
            call = read_image_request(self.path, data, self.headers)
        else:
            call = read_chat_request(json.loads(data), self.headers)
        if self.headers.get("Authorization") != f"Bearer {API_KEY}":
            self._fail(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", {})
            return
        self.endpoint.begin(call)
        delivered = False
        try:
            delivered = self._answer(call)
        finally:
            self.endpoint.end(call, delivered)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {API_KEY}":
            self._fail(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", {})
        elif not self.path.endswith("/models") or self.endpoint.models is None:
            self._fail(404, "not found", {})
        else:
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in self.endpoint.models]
            self._send(200, {"object": "list", "data": data})

    def _answer(self, call: RecordedCall) -> bool:
        fault = self.endpoint.take_fault(call)
        time.sleep(self.endpoint.latency + (fault.delay if fault else 0.0))
        if self._client_is_gone():
            self.close_connection = True
            return False
        if self.endpoint.models is not None and call.model not in self.endpoint.models:
            return self._fail(404, f"The model {call.model} does not exist", {}, "model_not_found")
        if fault is None:
            return self._send(200, self._good(call))
        return self._answer_fault(call, fault)

    def _answer_fault(self, call: RecordedCall, fault: EndpointFault) -> bool:
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
            return self._send(200, _faulty_image(fault, self.endpoint.image(call)))
        if self.endpoint.text is not None and not call.images:
            return self._send(200, _faulty_completion(fault, call, {"said": self.endpoint.text(call)}))
        return self._send(200, _faulty_completion(fault, call, self.endpoint.judge_answer(call)))

    def _good(self, call: RecordedCall) -> dict:
        if call.kind != "chat":
            return image_response(self.endpoint.image(call))
        if self.endpoint.text is not None and not call.images:
            return chat_response(call, self.endpoint.text(call))
        return chat_response(call, json.dumps(self.endpoint.judge_answer(call)))

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
