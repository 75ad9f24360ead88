"""Prompt files: read, refused with a line number, fetched once, made afresh; and what the judge is told."""

import hashlib
import http.server
import json
import threading
from collections import Counter
from dataclasses import replace

import pytest

from echo4o.evaluation.benchmarks import BENCHMARKS, get_benchmark
from echo4o.evaluation.benchmarks.genevalpp import checklist
from echo4o.evaluation.benchmarks.prompt_files import fetch, load_prompts, read_prompts
from echo4o.evaluation.fresh_prompts import content, make_genevalpp, write_prompts
from echo4o.evaluation.images import find_images
from echo4o.evaluation.judge_prompts import load_judge_prompts
from tests.evaluation.conftest import official, write_pictures


def test_the_official_genevalpp():
    benchmark = get_benchmark("GenEval++")
    loaded = load_prompts(benchmark, official("genevalpp.jsonl"))
    assert loaded.official is True
    assert Counter(prompt.group for prompt in loaded.prompts) == dict.fromkeys(benchmark.groups, 40)
    assert [prompt.id for prompt in loaded.prompts][-1] == "280"
    weights = benchmark.aggregates(dict.fromkeys(benchmark.groups, 40))
    assert weights["score"] == weights["overall_accuracy"]


def test_the_official_imagine_bench():
    benchmark = get_benchmark("imagine-bench")
    loaded = load_prompts(benchmark, official("imagine_bench.jsonl"))
    assert loaded.official is True
    groups = Counter(prompt.group for prompt in loaded.prompts)
    assert groups == {"attribute_shift": 90, "hybridization": 60, "spatiotemporal": 60, "multi_object": 60}
    assert len({prompt.type for prompt in loaded.prompts}) == 8


@pytest.mark.parametrize("name", ["genevalpp", "imagine_bench"])
def test_every_official_prompt_makes_a_question(name, tmp_path):
    benchmark = get_benchmark(name)
    prompts = load_prompts(benchmark, official(f"{name}.jsonl")).prompts
    picture = find_images(write_pictures(tmp_path, 1), prompts[:1]).images["1", 1]
    words = load_judge_prompts(benchmark)[benchmark.aspects[0].name]
    for prompt in prompts:
        question = words.ask(benchmark, benchmark.aspects[0], prompt, picture)
        assert prompt.text in question.text
        assert "{{" not in question.text + question.system


def test_the_checklist_says_everything():
    facts = {
        "include": [
            {"class": "clock", "count": 3, "color": "red", "region": "left"},
            {"class": "cat", "count": 1, "region": "above", "size": "larger"},
        ],
        "exclude": [{"class": "clock", "count": 4}],
    }
    assert checklist(facts) == [
        "clock: exactly 3, colour red, in the left half of the picture",
        "cat: exactly 1, in the upper half of the picture, clearly larger than the other object",
        "clock: no more than 3",
    ]


def test_the_rules_are_in_the_judge_prompt():
    words = " ".join(load_judge_prompts(get_benchmark("genevalpp"))["correct"].source.lower().split())
    for rule in ("every expectation", "collage", "cartoon", "photograph", "one natural picture"):
        assert rule in words


BAD_LINES = {
    "no JSON": ('{"tag": ', "line 2: this is not JSON"),
    "no object": ("[1]\n", "line 2: a JSON object is needed"),
    "unknown tag": (
        '{"tag": "colour", "prompt": "x", "include": [{}]}',
        "line 2: \"tag\" is 'colour'; known are color_",
    ),
    "no prompt": ('{"tag": "counting", "include": []}', 'line 2: "prompt" is missing'),
    "no include": ('{"tag": "counting", "prompt": "x"}', 'line 2: "include" is missing'),
    "bad count": (
        '{"tag": "counting", "prompt": "x", "include": [{"class": "cup", "count": "4"}]}',
        "line 2: \"count\" must be a whole number from 1 on, it is '4'",
    ),
    "unknown region": (
        '{"tag": "counting", "prompt": "x", "include": [{"class": "cup", "count": 1, "region": "middle"}]}',
        "\"region\" is 'middle'; known are left, right, above, below",
    ),
    "unknown field": (
        '{"tag": "counting", "prompt": "x", "include": [{"class": "cup", "count": 1, "colour": "red"}]}',
        "unknown field 'colour'",
    ),
    "an id twice": (
        '{"id": 1, "tag": "counting", "prompt": "x", "include": [{"class": "cup", "count": 1}]}',
        "line 2: the id '1' is also in line 1",
    ),
    "an id that is a path": (
        '{"id": "../1", "tag": "counting", "prompt": "x", "include": [{"class": "cup", "count": 1}]}',
        "line 2: the id '../1' cannot be the name of an image file",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name, tmp_path):
    line, message = BAD_LINES[name]
    good = '{"tag": "counting", "prompt": "x", "include": [{"class": "cup", "count": 4}]}'
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError) as refused:
        read_prompts(get_benchmark("genevalpp"), tmp_path / "p.jsonl")
    assert message in str(refused.value)


def test_omnicontext_reads_what_the_original_converter_writes(tmp_path):
    write_pictures(tmp_path / "images" / "scene_object", 1)
    rows = [{"id": "k", "task_type": "scene_object", "ori_img": ["1.png"], "ins_en": "put it there"}]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    (prompt,) = read_prompts(get_benchmark("omnicontext"), tmp_path / "metadata.json")
    assert (prompt.id, prompt.group, prompt.text) == ("k", "scene_object", "put it there")
    assert prompt.references[0].name == "1.png"
    rows[0]["ori_img"] = ["2.png"]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="entry 1: the reference image 2.png is not in"):
        read_prompts(get_benchmark("omnicontext"), tmp_path / "metadata.json")
    with pytest.raises(ValueError, match="--revision with the 40-digit commit"):
        load_prompts(get_benchmark("omnicontext"))


def test_official_files_are_fetched_once_and_checked(tmp_path):
    content, asked = b'{"tag": "counting"}\n', []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404 if "gone" in self.path else 200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        source = replace(
            get_benchmark("genevalpp").source,
            url=address + "/{revision}/p.jsonl",
            sha256=hashlib.sha256(content).hexdigest(),
        )
        first = fetch(source, "genevalpp", tmp_path)
        assert first.read_bytes() == content and fetch(source, "genevalpp", tmp_path) == first
        assert asked == [f"/{source.revision}/p.jsonl"]
        first.write_bytes(b"damaged")
        assert fetch(source, "genevalpp", tmp_path).read_bytes() == content
        with pytest.raises(ValueError, match="has the SHA-256 .*expected is 0000"):
            fetch(replace(source, sha256="0000"), "other", tmp_path)
        with pytest.raises(ValueError, match="Not Found; give the official file with --prompts"):
            fetch(replace(source, revision="gone"), "other", tmp_path)
    finally:
        server.shutdown()
        server.server_close()


# --- fresh prompts ------------------------------------------------------------------------------------------------


def shape(row) -> tuple:
    """What the statistics are about: everything but the objects and the colours themselves."""
    items = tuple((i["count"], i.get("region"), i.get("size"), "color" in i) for i in row["include"])
    return row["tag"], items, tuple(i["count"] for i in row.get("exclude", []))


def test_fresh_prompts_have_the_official_statistics():
    rows = [json.loads(line) for line in official("genevalpp.jsonl").read_text().splitlines()]
    made = make_genevalpp(0, rows)

    def counted(rows, of):
        return Counter((row["tag"], value) for row in rows for value in of(row))

    for of in (
        lambda row: [len(row["include"])],
        lambda row: [item["count"] for item in row["include"]],
        lambda row: [tuple(item.get("region") for item in row["include"])],
        lambda row: [tuple(item.get("size") for item in row["include"])],
        lambda row: ["color" in item for item in row["include"]],
        lambda row: [tuple(item["count"] for item in row.get("exclude", []))],
    ):
        assert counted(made, of) == counted(rows, of)
    assert not {content(row) for row in made} & {content(row) for row in rows}


def test_fresh_prompts_are_fresh_and_repeatable(tmp_path):
    first = make_genevalpp(1)
    assert first == make_genevalpp(1) != make_genevalpp(2)
    assert len({content(row) for row in first}) == 280
    assert not {content(row) for row in make_genevalpp(3, first)} & {content(row) for row in first}
    write_prompts(first, tmp_path / "p.jsonl")
    loaded = load_prompts(get_benchmark("genevalpp"), tmp_path / "p.jsonl")
    assert len(loaded.prompts) == 280 and loaded.official is False


def test_fresh_prompts_are_english():
    texts = [row["prompt"] for seed in range(5) for row in make_genevalpp(seed)]
    for wrong in ("one cats", "couchs", "knifes", "scissorses", "skises", "a orange", "an red", "  "):
        assert not [text for text in texts if wrong in text]
    assert all(text.startswith("A photo of ") for text in texts)


def test_names_are_forgiving_and_unknown_ones_are_listed():
    assert get_benchmark("Imagine-Bench").name == "imagine_bench"
    with pytest.raises(ValueError, match=f"there is no benchmark 'mmlu'; known are {', '.join(BENCHMARKS)}"):
        get_benchmark("mmlu")


def test_files_with_a_byte_order_mark_and_with_separators_in_their_texts(tmp_path):
    """U+2028 and its kin end a line for Python's `splitlines`, and not in JSON lines."""
    from echo4o.dataset_scripts.contamination import read_prompts as read_plain
    from echo4o.evaluation.benchmarks.dpg.prompts import read_texts

    text = "a cup\u2028and\x85a\x0bplate"
    row = {"tag": "counting", "prompt": text, "include": [{"class": "cup", "count": 1}]}
    lines = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n"
    (tmp_path / "prompts.jsonl").write_text(lines, "utf-8")
    (prompt,) = read_prompts(get_benchmark("genevalpp"), tmp_path / "prompts.jsonl")
    assert prompt.text == text
    assert read_plain(tmp_path / "prompts.jsonl") == [("prompts", text)]
    (tmp_path / "dpg.jsonl").write_text("\ufeff" + json.dumps({"id": "1", "text": text}, ensure_ascii=False), "utf-8")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "1.txt").write_text("\ufeffa cup", "utf-8")
    assert read_texts(tmp_path / "dpg") == {"1": "a cup"}
    assert read_texts(tmp_path / "dpg.jsonl") == {"1": text}
