"""Bodies of requests, checked field by field: what cannot be honoured is an error that names the field."""

import json
import re
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from echo4o.common.strict_json import loads
from echo4o.serving.errors import ApiError

# Fields of OpenAI's API that are accepted with these values only, which ask for what happens anyway.
_ONLY = {
    "background": ("auto", "opaque"),
    "frequency_penalty": (0,),
    "input_fidelity": ("high",),
    "logprobs": (False,),
    "mask": (),
    "modalities": (["text"],),
    "moderation": ("low",),
    "presence_penalty": (0,),
    "quality": ("auto",),
    "response_format": ("b64_json", {"type": "text"}),
    "store": (False,),
    "style": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_p": (1,),
}
_IGNORED = {"user", "safety_identifier", "metadata"}  # labels that change nothing


class Fields:
    """The fields of one request. `take` removes a field; `rest` is what remains for the model.

    Raises ApiError (400) with the field's name for wrong types.
    """

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.values.pop(name, None)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            expected = " or ".join(_KINDS[each] for each in kinds)
            raise ApiError(400, f"{name}: must be {expected}, not {_KINDS.get(type(value), type(value).__name__)}")
        return value

    def require(self, name: str, kind: type | tuple[type, ...]) -> Any:
        value = self.take(name, kind)
        if value is None:
            raise ApiError(400, f"{name}: is missing")
        return value

    def rest(self) -> dict[str, Any]:
        """The other fields, without those of OpenAI's API that ask for nothing.

        Raises ApiError (400) for fields of that API that this server cannot honour.
        """
        for name in [name for name in self.values if name in _IGNORED or name in _ONLY]:
            value = self.values.pop(name)
            if name in _ONLY and value is not None and value not in _ONLY[name]:
                allowed = " or ".join(json.dumps(each) for each in _ONLY[name])
                raise ApiError(400, f"{name}: is not supported" + (f"; only {allowed} is" if allowed else ""))
        return self.values


_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


async def read_json(request: Request) -> Fields:
    """The fields of a JSON body. Raises ApiError (400) for anything else."""
    try:
        values = loads((await request.body()).decode())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    return Fields(values)


async def read_form(request: Request, max_files: int, max_bytes: int) -> tuple[Fields, list[bytes]]:
    """The fields and the images of a multipart form; numbers, lists and truth values are read as JSON.

    Raises ApiError (400) for anything else.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "the body must be a form (multipart/form-data) with `image` files and a `prompt`")
    values: dict[str, Any] = {}
    images: list[bytes] = []
    try:
        async with request.form(max_files=max_files + 1, max_fields=100, max_part_size=2**20) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise ApiError(400, f"{name}: files are not supported here; send images as `image`")
                    images.append(await value.read(max_bytes))
                elif name in values:
                    raise ApiError(400, f"{name}: is given twice")
                else:
                    values[name] = _form_value(name, value)
    except ApiError:
        raise
    except Exception as error:  # Starlette raises several kinds for broken forms
        reason = getattr(error, "detail", None) or "it is damaged"
        raise ApiError(400, f"the form cannot be read: {reason}") from None
    return Fields(values), images


_TEXT_FIELDS = {"prompt", "model", "size", "user", "negative_prompt"}


def _form_value(name: str, text: str) -> Any:
    if name in _TEXT_FIELDS:
        return text
    try:
        return loads(text)
    except ValueError:
        return text


def read_size(fields: Fields) -> tuple[int | None, int | None]:
    """(height, width) from `size` ("WIDTHxHEIGHT" or "auto") or from `height` and `width`."""
    size = fields.take("size", str, "auto")
    height, width = fields.take("height", int), fields.take("width", int)
    if size == "auto":
        return height, width
    if height is not None or width is not None:
        raise ApiError(400, "size: give either size, or height and width")
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None:
        raise ApiError(400, f"size: must be WIDTHxHEIGHT or auto (given: {size[:40]!r})")
    return int(match[2]), int(match[1])
