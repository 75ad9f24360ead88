"""Findings of a built folder, numbers, contamination, and the command line around them."""

import hashlib
import json
import re
from collections import Counter

import pytest
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.dataset_scripts.build import BuildOptions, build
from echo4o.dataset_scripts.contamination import PromptIndex, normalise, read_prompts
from echo4o.dataset_scripts.findings import RejectionReason
from echo4o.dataset_scripts.images import CheckedImage
from echo4o.dataset_scripts.shards import ShardWriter
from echo4o.dataset_scripts.stats import collect, quantiles
from echo4o.dataset_scripts.upstream import row_id
from echo4o.dataset_scripts.validate import validate
from tests.dataset_scripts.layout import SURREAL, picture, row, small_release, write_rows, write_tar


def run(*arguments):
    return CliRunner().invoke(app, ["dataset", *map(str, arguments)])


@pytest.fixture
def release(tmp_path):
    return small_release(tmp_path / "Echo-4o-Image", rows=4)


@pytest.fixture
def built(release, tmp_path):
    build(release, tmp_path / "echo-4o-image", BuildOptions(row_group_bytes=2000))
    return tmp_path / "echo-4o-image"


def stored_row(number: int, **more) -> dict:
    data = picture(number)
    name = row_id(f"row {number}", CheckedImage(data, hashlib.sha256(data).digest()))
    image = {"bytes": data, "path": "x.jpg"}
    known = {"id": name, "instruction": f"row {number}", "task": "text_to_image", "category": "", "image": image}
    return known | {"reference_images": [], "source": "", "metadata": '{"archive": 1}'} | more


def test_every_fault_of_a_built_row_is_found(built):
    broken = {"bytes": b"broken", "path": "x.jpg"}
    cut = {"bytes": picture(1, size=400)[:3000], "path": "x.jpg"}
    rows = [
        stored_row(0),
        stored_row(0),
        stored_row(1, instruction=" "),
        stored_row(2, image={"bytes": None, "path": "x.jpg"}),
        stored_row(3, image=cut),
        stored_row(4, task="multi_reference"),
        stored_row(5, reference_images=[broken]),
        stored_row(6, metadata="no json"),
        stored_row(7, id="another"),
    ]
    rows[3]["image"]["bytes"] = b""
    path = built / "data" / "surreal_fantasy" / "train-00000.parquet"
    writer = ShardWriter(path)
    for each in rows:
        writer.add(each)
    writer.finish()
    report, findings = validate(built, "surreal_fantasy")
    found = [(f.line, f.reason) for f in findings]
    assert found == [
        (2, RejectionReason.DUPLICATE),
        (3, RejectionReason.EMPTY_INSTRUCTION),
        (4, RejectionReason.TRUNCATED),
        (5, RejectionReason.TRUNCATED),
        (6, RejectionReason.MISSING_REFERENCE),
        (7, RejectionReason.UNDECODABLE),
        (8, RejectionReason.UNREADABLE_ROW),
        (9, RejectionReason.UNREADABLE_ROW),
    ]
    assert report.given == 9 and report.accepted.total() == 1
    result = run("validate", built)
    assert result.exit_code == 1 and "manifest: data/surreal_fantasy/train-00000.parquet: it has" in result.output


def test_the_command_tells_where_each_fault_is(release, tmp_path):
    write_tar(release / SURREAL / "images" / "3-4.tar.gz", [("00003.jpg", b"broken")])
    with open(release / SURREAL / "rows.jsonl", "a") as stream:
        stream.write(json.dumps(row(9)) + "\nno json\n")
    result = run("validate", release, "--findings", tmp_path / "findings.jsonl")
    assert result.exit_code == 1 and "14 rows given, 11 accepted, 3 rejected" in result.output
    found = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    broken = next(f for f in found if f["reason"] == "undecodable")
    assert (broken["file"], broken["line"]) == (f"{SURREAL}/rows.jsonl", 4)
    assert (broken["archive"], broken["member"]) == (f"{SURREAL}/images/3-4.tar.gz", "00003.jpg")
    assert run("validate", release, "--verify", "header").exit_code == 1


def test_validate_compares_with_the_manifest(built):
    assert run("validate", built, "--manifest").exit_code == 0
    assert run("validate", built).exit_code == 0
    shard = next((built / "data").rglob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    result = run("validate", built, "--manifest")
    assert result.exit_code == 1 and "its bytes were altered (another sha256)" in result.output
    shard.unlink()
    assert "it is gone" in run("validate", built, "--manifest").output


def test_inspect_is_where_a_mapping_starts(tmp_path):
    source, plan = tmp_path / "source", tmp_path / "map.yaml"
    write_tar(source / "Later-Images" / "0.tar", [("a.png", picture(1)), ("c.png", picture(2))], "w")
    given = {"prompt": "i", "inputs": ["x/a.png"], "result": "x/c.png"}
    write_rows(source / "Later-Images" / "rows.jsonl", [given])
    result = run("inspect", source, "--write", plan)
    assert result.exit_code == 0
    for expected in (
        "unknown: assign one of",
        "needs --map",
        "inputs, prompt, result",
        "relative, .png",
        "a.png, c.png",
    ):
        assert expected in result.output, expected
    assert run("build", source, "-o", tmp_path / "out").exit_code == 2
    text = plan.read_text()
    assert "configuration: null" in text and "image: null" in text
    text = text.replace("configuration: null", "configuration: multi_reference").replace(
        "reference_images: null", "reference_images: inputs"
    )
    plan.write_text(text.replace("instruction: null", "instruction: prompt").replace("image: null", "image: result"))
    assert run("build", source, "-o", tmp_path / "out", "--map", plan).exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["configurations"]["multi_reference"]["rows"] == 1


def test_several_values_after_one_map(tmp_path):
    source = tmp_path / "Later"
    write_tar(source / "Later-Images" / "0.tar", [("a.png", picture(1)), ("c.png", picture(2))], "w")
    write_rows(source / "Later-Images" / "rows.jsonl", [{"prompt": "i", "inputs": ["a.png"], "result": "c.png"}])
    pairs = ["image=result", "reference_images=inputs", "instruction=prompt"]
    for number, more in enumerate((["--map", *pairs], [f"--map={' '.join(pairs)}"], ["--map", " ".join(pairs)])):
        out = tmp_path / f"{number}"
        result = run("build", source, *more, "--assign", "Later-Images=multi_reference", "--out", out)
        assert result.exit_code == 0, result.output
    for more in (["--map", "picture=result"], ["--map"], ["--assign", "x=poems"], ["--map", "gone.yaml"]):
        assert run("build", source, "-o", tmp_path / "x", *more).exit_code == 2


def test_statistics(built, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"prompt": "Row 2 of Surrel fantasy-image!"}) + "\n" + json.dumps({"prompt": "else"})
    )
    page = tmp_path / "page.html"
    result = run("stats", built, "--prompts", prompts, "--html", page, "--json")
    summary = json.loads(result.stdout)
    reference = summary["configurations"]["multi_reference"]
    assert (reference["rows"], reference["reference_images"]) == (4, {"2": 4})
    assert reference["image_sizes"] == {"24x24": 4} and reference["formats"] == {"JPEG": 4}
    assert summary["contamination"]["equal"] == 1
    (match,) = [m for m in summary["contamination"]["matches"] if m["overlap"] == 1]
    assert match["instruction"] == f"row 2 of {SURREAL}"
    text = page.read_text()
    # 4 targets of three configurations, 8 references, 3 plots; nothing comes from elsewhere
    assert len(re.findall("data:image/jpeg;base64", text)) == 20 and len(re.findall("data:image/png", text)) == 3
    assert "http" not in text.replace("http-equiv", "")


def test_statistics_without_what_the_builder_notes(built):
    path = built / "data" / "surreal_fantasy" / "train-00000.parquet"
    writer = ShardWriter(path)
    writer.add(stored_row(0, metadata=None))
    writer.finish()
    numbers = collect(built, "surreal_fantasy").numbers["surreal_fantasy"]
    assert dict(numbers.sizes) == {(24, 24): 1} and numbers.formats == {"JPEG": 1}


def test_quantiles():
    assert quantiles(Counter({1: 1, 2: 2, 3: 1})) == {"min": 1, "25%": 1, "50%": 2, "75%": 2, "max": 3}
    assert quantiles(Counter({5: 1})) == {"min": 5, "25%": 5, "50%": 5, "75%": 5, "max": 5}
    assert quantiles(Counter()) == {}


GENEVAL = [
    ("g", f"A photo of a {c} {a}, a green {b}, and a red skateboard")
    for c in ("brown", "blue")
    for a, b in (("bus", "truck"), ("bowl", "tie"), ("kite", "fork"))
]


@pytest.mark.parametrize(
    "instruction, overlaps",
    [
        ("a photo of a brown bus a green truck and a red skateboard", [1.0]),
        ("A PHOTO of a brown bus, a green truck, and a red skateboard, please", [0.9]),
        ("A photo of a brown bus, a purple truck, and a red skateboard", [0.5]),
        ("A photo of an elephant at the beach", []),
        ("skateboard", []),
        ("", []),
    ],
)
def test_contamination(instruction, overlaps):
    found = list(PromptIndex(GENEVAL).matches("id", instruction))
    best = sorted((m.overlap for m in found), reverse=True)[: len(overlaps) or None]
    assert [round(x, 1) for x in best] == pytest.approx(overlaps, abs=0.11)
    if found:
        assert max(found, key=lambda m: m.overlap).prompt == GENEVAL[0][1]


def test_common_words_alone_find_nothing_but_short_prompts_are_found():
    index = PromptIndex([*GENEVAL, ("g", "a photo of"), ("g", "  ")])
    assert len(index) == 7
    assert [m.prompt for m in index.matches("id", "A photo of!")] == ["a photo of"]
    assert normalise("Ｃafé —  “X”") == "café x"


def test_prompt_files(tmp_path):
    plain, lines, bad = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("one\n\ntwo\n")
    lines.write_text('{"instruction": "three"}\n')
    bad.write_text('{"words": "three"}\n')
    assert read_prompts(plain) == [("a", "one"), ("a", "two")] and read_prompts(lines) == [("b", "three")]
    with pytest.raises(ValueError, match="c.jsonl:1: each line must be an object with one of prompt"):
        read_prompts(bad)
