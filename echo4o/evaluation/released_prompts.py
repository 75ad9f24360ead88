"""`--judge-prompt released`: asks a judge as the script that was released with a benchmark does.

The script is fetched at a pinned revision, checked, and read as a syntax tree. It is never executed. Taken from it are
the messages, how the image is encoded, the temperature and the token limit.
"""

import ast
import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import create_model, model_validator

from echo4o.common import strict_json
from echo4o.endpoints.chat_endpoint import ImageFile, LabelledImage
from echo4o.evaluation.benchmarks.base import Aspect, Benchmark, BenchmarkPrompt, PromptSource, Verdict
from echo4o.evaluation.judges.base import Question

RELEASED = "released"
_REVISION = "28f36d76558e5f53b9deceda78bf025ef0d0ea24"
_URL = "https://raw.githubusercontent.com/yejy53/Echo-4o/{revision}/test_scripts/"
SCRIPTS = {
    "genevalpp": PromptSource(
        f"{_URL}Eval-gpt-4.1-geneval%2B%2B.py",
        _REVISION,
        "59329c7db829f4ee9837a33d90b2e111297752348217401c362407b20bdd6f83",
        1,
    ),
    "imagine_bench": PromptSource(
        f"{_URL}Eval-gpt-4.1-Imagine.py",
        _REVISION,
        "0dd6a1214c6b1fa9007d915bcf5cc7c3cf4a900db5b3de3c8d83c20af0d844d3",
        1,
    ),
}
_IMAGE = ("b64", "base64", "image", "img")
_LIMITS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class _Gap:
    """A place in a text that the script fills with a value; `expression` is its source."""

    expression: str


_Text = list[str | _Gap]


@dataclass(frozen=True)
class ReleasedScript:
    """What a released script sends.

    Attributes:
        messages: role and parts; a part is a text, or None for the image.
        settings: temperature and token limit, where the script sets them.
        encoding: "JPEG" where the script encodes the image anew, else None.
        quality: of the JPEG; None: Pillow's default.
        detail: of the image; None: the endpoint's default.
    """

    sha256: str
    messages: tuple[tuple[str, tuple[_Text | None, ...] | _Text], ...]
    settings: dict[str, float] = field(default_factory=dict)
    encoding: str | None = None
    quality: int | None = None
    detail: str | None = None

    @classmethod
    def read(cls, source: str, sha256: str) -> "ReleasedScript":
        """Take the constant texts out of a script. Raises ValueError if it has another shape."""
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise ValueError(f"the released script is not Python ({error})") from None
        return _ScriptReader(tree).read(sha256)


class _ScriptReader:
    """Finds the call of a chat model in a syntax tree, and what its arguments are made of."""

    def __init__(self, tree: ast.Module):
        self.tree = tree
        self.values: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.values[node.targets[0].id] = node.value

    def read(self, sha256: str) -> ReleasedScript:
        for node in ast.walk(self.tree):
            arguments = _arguments(node)
            if "messages" in arguments:
                messages = self._messages(arguments["messages"])
                settings: dict[str, float] = {
                    name: value
                    for name in ("temperature", *_LIMITS)
                    if name in arguments and isinstance(value := self._constant(arguments[name]), (int, float))
                }
                encoding, quality = self._encoding()
                return ReleasedScript(sha256, messages, settings, encoding, quality, self._detail)
        raise ValueError("the released script does not call a chat model with messages")

    _detail: str | None = None

    def _constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in self.values:
            node = self.values[node.id]
        return node.value if isinstance(node, ast.Constant) else None

    def _resolve(self, node: ast.expr) -> ast.expr:
        return self.values[node.id] if isinstance(node, ast.Name) and node.id in self.values else node

    def _messages(self, node: ast.expr):
        listed = self._resolve(node)
        if not isinstance(listed, ast.List):
            raise ValueError("the messages of the released script are not a list")
        return tuple(self._message(self._resolve(entry)) for entry in listed.elts)

    def _message(self, node: ast.expr):
        entries = _arguments(node)
        role = self._constant(entries["role"]) if "role" in entries else None
        if not isinstance(role, str) or "content" not in entries:
            raise ValueError("a message of the released script has no role or content")
        content = self._resolve(entries["content"])
        if isinstance(content, ast.List):
            return role, tuple(self._part(self._resolve(part)) for part in content.elts)
        return role, self.text(content)

    def _part(self, node: ast.expr) -> _Text | None:
        entries = _arguments(node)
        if "text" in entries:
            return self.text(entries["text"])
        if "image_url" in entries:
            image = _arguments(self._resolve(entries["image_url"]))
            detail = self._constant(image["detail"]) if "detail" in image else None
            self._detail = detail if isinstance(detail, str) else None
            return None
        raise ValueError("a part of a message of the released script is neither a text nor an image")

    def text(self, node: ast.expr) -> _Text:
        """A text as constant pieces and gaps."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            return [piece for value in node.values for piece in self.text(value)]
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left) + self.text(node.right)
        if isinstance(node, ast.Name) and node.id in self.values and self._is_text(self.values[node.id]):
            return self.text(self.values[node.id])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self._of_method(node, node.func)
        return [_Gap(ast.unparse(node))]

    def _is_text(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inner = node.func.value
            return node.func.attr in ("format", "replace", "strip") and self._is_text(self._resolve(inner))
        is_sum = isinstance(node, ast.BinOp) and self._is_text(self._resolve(node.left))
        return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str) or is_sum

    def _of_method(self, node: ast.Call, function: ast.Attribute) -> _Text:
        """Texts that are filled with `format` or `replace`, or stripped."""
        if function.attr == "dumps" and node.args:
            return [_Gap(ast.unparse(node.args[0]))]
        if function.attr not in ("format", "replace", "strip") or not self._is_text(self._resolve(function.value)):
            return [_Gap(ast.unparse(node))]
        pieces = self.text(function.value)
        if function.attr == "strip":
            return _stripped(pieces)
        if function.attr == "replace":
            mark = self._constant(node.args[0])
            return _filled(pieces, {str(mark): self.text(node.args[1])})
        marks = {f"{{{keyword.arg}}}": self.text(keyword.value) for keyword in node.keywords if keyword.arg}
        marks |= {"{}": self.text(node.args[0])} if len(node.args) == 1 else {}
        filled = _filled(pieces, marks)
        return [p if isinstance(p, _Gap) else p.replace("{{", "{").replace("}}", "}") for p in filled]

    def _encoding(self) -> tuple[str | None, int | None]:
        """How the script encodes the image: the format and quality of its call of `save`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save":
                given = {keyword.arg: self._constant(keyword.value) for keyword in node.keywords}
                name = given.get("format") or (self._constant(node.args[1]) if len(node.args) > 1 else None)
                if isinstance(name, str) and name.upper() in ("JPEG", "JPG"):
                    quality = given.get("quality")
                    return "JPEG", quality if isinstance(quality, int) else None
        return None, None


def _arguments(node: ast.AST) -> dict[str, ast.expr]:
    """The keyword arguments of a call, or the entries of a dict display."""
    if isinstance(node, ast.Call):
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        return {str(key.value): value for key, value in zip(node.keys, node.values) if isinstance(key, ast.Constant)}
    return {}


def _stripped(pieces: _Text) -> _Text:
    pieces = list(pieces)
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return pieces


def _filled(pieces: _Text, marks: Mapping[str, _Text]) -> _Text:
    for mark, value in marks.items():
        filled: _Text = []
        for piece in pieces:
            if isinstance(piece, _Gap):
                filled.append(piece)
                continue
            first, *rest = piece.split(mark)
            filled.append(first)
            for part in rest:
                filled += [*value, part]
        pieces = filled
    return pieces


@dataclass(frozen=True)
class ReleasedPrompt:
    """The judge prompt of a released script; used like a [`JudgePrompt`](judge_prompts.py)."""

    script: ReleasedScript

    @property
    def sha256(self) -> str:
        return f"{RELEASED}:{self.script.sha256}"

    def ask(self, benchmark: Benchmark, aspect: Aspect, prompt: BenchmarkPrompt, image: ImageFile) -> Question:
        """The question about one image, as the script asks it."""
        rendered: list[tuple[str, Any]] = [
            (role, _render(parts, prompt) if isinstance(parts, list) else [p and _render(p, prompt) for p in parts])
            for role, parts in self.script.messages
        ]
        texts = [text for _, parts in rendered for text in ([parts] if isinstance(parts, str) else parts) if text]
        return Question(
            "\n".join(texts),
            images=(LabelledImage(self.sha256, image),),
            verdict=_lenient(aspect.verdict),
            facts=prompt.facts,
            make_body=lambda: self._body(rendered, image.path),
        )

    def _body(self, rendered: Sequence[tuple[str, Any]], image: Path) -> dict[str, Any]:
        link = {"url": self._link(image)} | ({"detail": self.script.detail} if self.script.detail else {})
        messages = []
        for role, parts in rendered:
            if not isinstance(parts, str):
                parts = [
                    {"type": "image_url", "image_url": link} if text is None else {"type": "text", "text": text}
                    for text in parts
                ]
            messages.append({"role": role, "content": parts})
        return {"messages": messages, **self.script.settings}

    def _link(self, path: Path) -> str:
        from PIL import Image

        if self.script.encoding is None:
            kind, data = path.suffix.lower().lstrip(".").replace("jpg", "jpeg"), path.read_bytes()
        else:
            stream = io.BytesIO()
            quality = {} if self.script.quality is None else {"quality": self.script.quality}
            with Image.open(path) as image:
                image.convert("RGB").save(stream, self.script.encoding, **quality)
            kind, data = "jpeg", stream.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _render(pieces: _Text, prompt: BenchmarkPrompt) -> str:
    return "".join(piece if isinstance(piece, str) else _value(piece, prompt) for piece in pieces)


def _value(gap: _Gap, prompt: BenchmarkPrompt) -> str:
    """What a script fills a gap with: found by the name in its source, such as `item["prompt"]`."""
    name = gap.expression.lower()
    for key in ("include", "exclude", "note"):
        if key in name:
            value = prompt.facts.get(key, [])
            return value if isinstance(value, str) else strict_json.dumps(value, ensure_ascii=False)
    if any(word in name for word in ("prompt", "instruction", "caption")):
        return prompt.text
    if any(word in name for word in ("tag", "type", "category")):
        return prompt.type
    if any(word in name for word in ("metadata", "item", "entry", "row")):
        row = {"tag": prompt.group, "prompt": prompt.text} | prompt.facts
        return strict_json.dumps(row, ensure_ascii=False)
    raise ValueError(f"the released script fills its text with {gap.expression!r}, which echo4o does not know")


def _lenient(verdict: type[Verdict]) -> type[Verdict]:
    """The fields of a verdict as scripts write them: other case, blanks or hyphens, and no reason."""

    def plain_names(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {str(name).strip().lower().replace(" ", "_").replace("-", "_"): value for name, value in values.items()}

    fields: Any = {"reason": (str, "")}
    validators: Any = {"plain_names": model_validator(mode="before")(plain_names)}
    return create_model(f"Released{verdict.__name__}", __base__=verdict, __validators__=validators, **fields)


def load_released_prompts(benchmark: Benchmark) -> dict[str, Any]:
    """The released judge prompt of a benchmark, by aspect: fetched once, checked by its SHA-256."""
    from echo4o.evaluation.benchmarks.prompt_files import cache_folder, fetch

    source = SCRIPTS.get(benchmark.name)
    if source is None:
        raise ValueError(f"--judge-prompt {RELEASED}: there are released scripts of {', '.join(SCRIPTS)} only")
    name = f"{benchmark.name}-judge"
    file = fetch(source, name, cache_folder() / "prompts", ".py.txt", "--judge-prompt")
    prompt = ReleasedPrompt(ReleasedScript.read(file.read_text("utf-8-sig"), source.sha256))
    return {aspect.name: prompt for aspect in benchmark.aspects}
