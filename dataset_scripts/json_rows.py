"""Reads rows from JSON-lines files and their common variants.

It also reads a JSON array (on one line or pretty-printed), objects joined as `}{`, commas after lines, a byte order
mark, bytes that are not UTF-8 and lines of any length. NaN and infinity are read as null. One row at a time is in
memory. Unreadable rows have an `error`.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from echo4o.common import strict_json

CHUNK_BYTES = 1 << 18
MAX_ROW_CHARS = 1 << 20  # longer rows are rejected
MAX_RAW_CHARS = 1 << 24  # kept of an unreadable row

_DECODER = strict_json.DECODER
_BETWEEN = re.compile(r"[\s,\[\]]*")
_NEXT_OBJECT = re.compile(r"\}[\s,]*(?=\{)|\n(?=\s*\{)")  # where reading continues inside an array
_NEXT_LINE = re.compile(r"\}[^\S\n]*,?[^\S\n]*(?=\{)|\n")
_SLACK = 16  # an error this close to the end of what was read may be an incomplete row


class ByteStream(Protocol):
    """A binary stream that is read from start to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Returns up to `size` bytes; -1: all that is left, b"": the end."""
        ...


@dataclass(frozen=True)
class ParsedRow:
    """One value of a row file: `row`, or the `error` and the text (`raw`) of an unreadable one."""

    line: int
    row: dict | None
    error: str | None = None
    raw: str | None = None


def read_rows(stream: ByteStream) -> Iterator[ParsedRow]:
    """The rows of an open file in their order; unreadable ones have an `error`."""
    text = _TextWindow(stream)
    while True:
        text.skip(_BETWEEN)
        if text.ended:
            break
        yield from _read_value(text)
    if text.depth > 0:
        yield ParsedRow(text.line, None, OPEN_ARRAY, "")


OPEN_ARRAY = "the array of rows is never closed: the end of the file may be missing"


def _read_value(text: "_TextWindow") -> Iterator[ParsedRow]:
    line = text.line
    while True:
        try:
            value, end = _DECODER.raw_decode(text.buffer, text.start)
        except json.JSONDecodeError as error:
            position = error.pos - text.start
            # An unterminated string means that the text ran out: a line break inside a string is an error by itself.
            incomplete = error.msg.startswith("Unterminated") or error.pos >= len(text.buffer) - _SLACK
            if incomplete and text.left <= MAX_ROW_CHARS and text.read_more():
                continue
            what = _too_long() if text.left > MAX_ROW_CHARS else f"{error.msg} at character {position}"
        except (ValueError, RecursionError) as error:
            what = f"{type(error).__name__}: {str(error)[:100]}"
        else:
            if end == len(text.buffer) and not isinstance(value, dict) and text.read_more():
                continue  # a number may continue
            raw = text.take(end)
            yield _judge(line, value, raw)
            return
        yield ParsedRow(line, None, what, _skip_broken(text))
        return


def _judge(line: int, value: object, raw: str) -> ParsedRow:
    if len(raw) > MAX_ROW_CHARS:
        return ParsedRow(line, None, _too_long(), raw)
    if not isinstance(value, dict):
        return ParsedRow(line, None, f"a row must be an object, this is {type(value).__name__}", raw)
    if _has_surrogates(raw) or ("\\u" in raw and _has_surrogates(json.dumps(value, ensure_ascii=False))):
        return ParsedRow(line, None, "the text is not valid UTF-8", raw)
    return ParsedRow(line, value)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _too_long() -> str:
    return f"longer than {MAX_ROW_CHARS:,} characters"


def _skip_broken(text: "_TextWindow") -> str:
    """Skip an unreadable row up to where the next one may begin. Returns its text."""
    pattern = _NEXT_OBJECT if text.depth > 0 and text.buffer[text.start] == "{" else _NEXT_LINE
    kept, length = [], 0
    while True:
        found = pattern.search(text.buffer, text.start)
        # `}` belongs to this row, white space and commas do not.
        piece = text.take(found.start() + (found[0][0] == "}") if found else text.undecided())
        at_end = not found and not text.read_more()
        if at_end:
            piece += text.take(len(text.buffer))
        if length < MAX_RAW_CHARS:
            kept.append(piece[: MAX_RAW_CHARS - length])
        length += len(piece)
        if found or at_end:
            cut = f"... ({length:,} characters in all)" if length > MAX_RAW_CHARS else ""
            return "".join(kept).rstrip() + cut


class _TextWindow:
    """A window of decoded text that slides over a binary stream. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, stream: ByteStream):
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.buffer, self.start, self.line, self.depth, self.finished = "", 0, 1, 0, False
        self.read_more()
        self.buffer = self.buffer.removeprefix("\ufeff")

    @property
    def left(self) -> int:
        return len(self.buffer) - self.start

    @property
    def ended(self) -> bool:
        return self.start == len(self.buffer) and not self.read_more()

    def read_more(self) -> bool:
        """Read more text. At least doubles the window, so that a long row is parsed only a few times."""
        if self.finished:
            return False
        data = self.stream.read(max(CHUNK_BYTES, self.left))
        self.finished = not data
        more = self.decoder.decode(data, final=self.finished)
        self.buffer = self.buffer[self.start :] + more
        self.start = 0
        return bool(more) or self.read_more()

    def undecided(self) -> int:
        """Where the tail begins that may, with text not yet read, turn out to separate two rows."""
        last = max(self.buffer.rfind("}"), self.buffer.rfind("\n"))
        is_tail = (
            last >= self.start
            and len(self.buffer) - last < CHUNK_BYTES
            and not self.buffer[last + 1 :].strip(" \r\t\n,")
        )
        return last if is_tail else len(self.buffer)

    def take(self, end: int) -> str:
        taken = self.buffer[self.start : end]
        self.line += taken.count("\n")
        self.start = end
        return taken

    def skip(self, pattern: re.Pattern) -> None:
        while True:
            match = pattern.match(self.buffer, self.start)
            taken = self.take(match.end() if match else self.start)
            self.depth += taken.count("[") - taken.count("]")
            if self.start < len(self.buffer) or not self.read_more():
                return
