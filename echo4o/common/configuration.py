"""The base of all configuration: unknown keys and impossible values are errors, and nothing changes later."""

from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict, ValidationError


class StrictModel(BaseModel):
    """A section of a configuration. Unknown keys, NaN and infinity are errors; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def describe(
    error: ValidationError,
    *,
    root: str = "recipe",
    key_of: Callable[[tuple], str] = lambda location: ".".join(map(str, location)),
    known_keys: Callable[[tuple], Iterable[str]] | None = None,
) -> str:
    """One line for each wrong setting: `key: what is wrong (given: value)`.

    The value of an unknown key is never repeated: it may be a secret in the wrong place.

    Args:
        root: stands for the whole configuration where an error belongs to no key.
        key_of: the name of the key at a location.
        known_keys: the keys that are allowed where an unknown one was found; they are listed.
    """
    lines = []
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        silent = unknown or item["type"] in ("missing", "value_error")
        message = "unknown key" if unknown else item["msg"].removeprefix("Value error, ")
        message = message.replace("a valid tuple", "a list")
        given = "" if silent else f" (given: {item['input']!r})"
        known = f"; known here: {', '.join(known_keys(item['loc']))}" if unknown and known_keys else ""
        lines.append(f"  {key_of(item['loc']) or root}: {message}{given}{known}")
    return "\n".join(lines)
