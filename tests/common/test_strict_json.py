"""JSON that strict readers accept, whatever was read, and text with a byte order mark."""

import io
import json

import pytest

from echo4o.common import files, strict_json
from echo4o.common.json_lines import JsonLines, JsonLinesWriter
from echo4o.common.model_text import json_objects, without_reasoning
from echo4o.dataset_scripts.contamination import read_prompts
from echo4o.dataset_scripts.json_rows import read_rows


def parse(text: str):
    def fail(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=fail)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
def test_numbers_that_json_does_not_have_are_null(word):
    text = f'{{"score": {word}, "more": [{word}, 1.5, 1e3]}}'
    expected = {"score": None, "more": [None, 1.5, 1000.0]}
    assert strict_json.loads(text) == expected
    assert parse(strict_json.dumps(json.loads(text))) == expected
    assert [given.row for given in read_rows(io.BytesIO(text.encode()))] == [expected]


def test_keys_and_tuples_and_what_cannot_be_written():
    assert parse(strict_json.dumps({float("nan"): (float("inf"), "NaN")})) == {"nan": [None, "NaN"]}
    circle: list = []
    circle.append(circle)
    with pytest.raises(ValueError, match="ircular"):
        strict_json.dumps(circle)


def test_lines_are_strict(tmp_path):
    writer = JsonLinesWriter(tmp_path / "a.jsonl")
    writer.append({"loss": float("nan"), "text": "ä"})
    writer.close()
    assert parse((tmp_path / "a.jsonl").read_text()) == {"loss": None, "text": "ä"}
    with JsonLines(tmp_path / "b.jsonl").appending() as append, pytest.raises(ValueError):
        append({"score": float("nan")})


def test_prompts_are_kept_as_strict_json(tmp_path):
    from echo4o.evaluation.benchmarks import get_benchmark
    from echo4o.evaluation.benchmarks.prompt_files import load_prompts
    from echo4o.evaluation.run import keep_prompts

    row = '{"tag": "counting", "prompt": "A cup", "include": [{"class": "cup", "count": 1}], "weight": NaN}\n'
    (tmp_path / "prompts.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode())
    benchmark = get_benchmark("genevalpp")
    keep_prompts(benchmark, load_prompts(benchmark, tmp_path / "prompts.jsonl"), tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.json*"):
        for line in file.read_text("utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]:
            parse(line)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"A photo of a cup\n")
    assert read_prompts(tmp_path / "a.txt") == [("a", "A photo of a cup")]
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"prompt": "A cup"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == [("a", "A cup")]
    assert list(JsonLines(tmp_path / "a.jsonl")) == [{"prompt": "A cup"}]
    (tmp_path / "a.json").write_bytes(mark + b'{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


def test_text_after_reasoning():
    assert without_reasoning("<think>hm\n</think>\n\nA red cup.").strip() == "A red cup."
    assert without_reasoning("hm</think>A cup") == "A cup"
    assert without_reasoning("<think>hm") == ""
    assert without_reasoning("I think <b>so</b>") == "I think <b>so</b>"
    assert [each.value for each in json_objects('<think>{"a": 1}</think>{"b": "x\ny"}')] == [{"b": "x\ny"}]
