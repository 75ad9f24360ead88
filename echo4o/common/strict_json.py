"""JSON as the standard has it: NaN and infinity, which Python's json module reads and writes, become null."""

import json
import math
from typing import Any


def _finite_float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None  # 1e999 is infinite


DECODER = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite_float)


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON."""
    return DECODER.decode(text)


def dumps(value: Any, **options: Any) -> str:
    """A value as JSON; `options` are those of `json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """The value with None instead of floats that are not finite. Raises ValueError if it holds itself."""
    try:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {_finite_key(key): _finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [_finite(item) for item in value]
    except RecursionError:
        raise ValueError("circular or too deep for JSON") from None
    return value


def _finite_key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
