"""JSON lines: complete lines survive a kill, a torn one is cut off, one process appends at a time."""

import subprocess
import sys

import pytest

from echo4o.common import json_lines
from echo4o.common.json_lines import JsonLines, JsonLinesWriter

ENDLESS = """
import sys
from pathlib import Path
from echo4o.common.json_lines import JsonLinesWriter
lines = JsonLinesWriter(Path(sys.argv[1]), exclusive=True)
for number in range(lines.length and 1_000_000, 2_000_000):
    lines.append({"number": number, "text": "x" * 500})
    if number == 100:
        print("started", flush=True)
"""


def test_a_kill_while_appending(tmp_path):
    file = tmp_path / "folder" / "lines.jsonl"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, file], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.kill()
    process.communicate()
    with open(file, "ab") as stream:
        stream.write(b'{"number": 7, "te')  # the system wrote half of a line
    numbers = [value["number"] for value in JsonLines(file)]
    assert numbers == list(range(len(numbers))) and len(numbers) > 100
    with JsonLines(file).appending() as append:
        append({"number": len(numbers)})
    assert [value["number"] for value in JsonLines(file)] == [*numbers, len(numbers)]


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", b""),
        (b"{}", b""),
        (b"{}\n", b"{}\n"),
        (b'{}\n{"a"', b"{}\n"),
        (b'{"long": 1}\n{}\n{"b": "cd', b'{"long": 1}\n{}\n'),
    ],
)
def test_a_torn_line_is_cut_off(tmp_path, monkeypatch, block, before, kept):
    monkeypatch.setattr(json_lines, "_BLOCK", block)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(before)
    writer = JsonLinesWriter(file)
    assert writer.length == len(kept)
    writer.append({"a": 1})
    writer.sync()
    assert file.read_bytes() == kept + b'{"a": 1}\n' and writer.length == file.stat().st_size
    writer.close()


def test_positions_and_a_given_length(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 22}\n{"a"')
    assert list(JsonLines(file).with_ends()) == [({"a": 1}, 9), ({"a": 22}, 19)]
    writer = JsonLinesWriter(file, 9)
    writer.append({"a": 3})
    writer.close()
    assert list(JsonLines(file)) == [{"a": 1}, {"a": 3}]
    assert list(JsonLines(tmp_path / "nothing.jsonl")) == []


def test_a_line_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"{}\nrubbish\n{}\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2 is not JSON; delete the line"):
        list(JsonLines(file))


def test_one_process_appends_at_a_time(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    with lines.appending() as append:
        append({"a": "é"})
        with pytest.raises(ValueError, match="another process is writing to this file"):
            with lines.appending():
                pass
        with pytest.raises(ValueError):
            append({"a": float("inf")})
    with lines.appending() as append:
        append({"b": 1})
    assert lines.path.read_text("utf-8") == '{"a": "é"}\n{"b": 1}\n'


def test_text_that_is_not_unicode_is_kept_as_escapes(tmp_path):
    writer = JsonLinesWriter(tmp_path / "lines.jsonl")
    writer.append({"text": "\ud800"})
    writer.close()
    assert list(JsonLines(tmp_path / "lines.jsonl")) == [{"text": "\ud800"}]
