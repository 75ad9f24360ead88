"""The three recipes end to end, and what a run leaves behind."""

import json

import pytest

from echo4o.dataset_scripts.synthesis.recipe import ImageModelSettings
from echo4o.evaluation.benchmarks.genevalpp import GenEvalPP
from echo4o.testing.openai_server import API_KEY, EndpointFault
from tests.dataset_scripts.synthesis.running import PARTS, accepted, ends, lines, one_part, planned, run


def test_three_recipes_end_to_end(server, recipe, tmp_path):
    out = tmp_path / "made"
    said = run("synthesize", recipe(), "--out", out, "--budget", 5)
    assert "19 rows planned, 19 accepted, 0 rejected" in said
    assert ends(out) == planned()
    built = tmp_path / "built"
    run("build", out / "dataset", "--out", built, "--workers", 1)
    run("validate", built, "--workers", 1)
    run("validate", out / "dataset", "--workers", 1)
    manifest = json.loads((built / "manifest.json").read_text())
    assert {name: of["rows"] for name, of in manifest["configurations"].items()} == PARTS
    card = (built / "README.md").read_text()
    assert "drawn by `painter` and `editor`" in card and "GPT-4o" not in card and "OpenAI" not in card
    every = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert API_KEY.encode() not in every and b"Bearer" not in every


def test_rows_say_where_they_come_from(server, recipe, tmp_path):
    out = tmp_path / "made"
    run("synthesize", recipe(), "--out", out)
    rows = accepted(out)
    steps = lines(out / "steps.jsonl")
    for row in rows:
        of = row["provenance"]
        assert of["recipe"]["version"] == "test-1" and len(of["recipe"]["fingerprint"]) == 16
        assert of["models"] == {"text": "writer", "image": "painter", "edit": "editor", "judge": "judge"}
        assert of["time"] and isinstance(of["seed"], int) and of["pictures_drawn"] == 1
        assert all(len(digest) == 64 for digest in of["prompts"].values()) and {"verdict"} < set(of["prompts"])
        kept = [step["step"] for step in steps if step["row"] == row["row"]]
        assert len(kept) == len(set(kept)) >= 4 and kept[-2:] == ["verdict", "picture"]
    by_part = {part: [row for row in rows if row["row"].startswith(part)] for part in PARTS}
    for row in by_part["instruction_following"]:
        given = row["structure"] | {"prompt": row["instruction"]}
        assert GenEvalPP().read_row(given, 1, tmp_path).facts["include"] == row["structure"]["include"]
    assert {row["type"] for row in by_part["surreal_fantasy"]} == {
        "attribute_shift", "hybridization", "spatiotemporal_anomaly", "several_objects"
    }  # fmt: skip
    for row in by_part["multi_reference"]:
        assert 2 <= len(row["input_images"]) == len(row["references"]) <= 4
        for number, path in enumerate(row["input_images"], start=1):
            kept = (out / "dataset" / "Multi-Reference-Image" / path).read_bytes()
            assert kept == (tmp_path / "given" / "references" / row["references"][number - 1]["source"]).read_bytes()
            assert f"image {number}" in row["instruction"]
    edits = [call for call in server.calls if call.kind == "edit"]
    assert len(edits) == 4 and all(len(call.images) >= 2 and call.model == "editor" for call in edits)


@pytest.mark.parametrize(
    ("url", "name", "is_openai"),
    [
        (None, "any", True),
        ("http://127.0.0.1:1/v1", "any", False),
        ("https://gate.way/v1", "openai/gpt-image-2", True),
    ],
)
def test_the_terms_of_openai_are_told_where_they_hold(url, name, is_openai):
    assert ImageModelSettings(name=name, url=url).is_openai == is_openai


def test_plan_asks_nothing_and_needs_no_key(server, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    said = run("synthesize", recipe(), "--out", tmp_path / "made", "--plan")
    assert "19 rows: surreal_fantasy 8, multi_reference 4, instruction_following 7" in said
    assert "image: painter: 15 to 45 calls, about 0.0101 USD each" not in said  # the recipe names a price per picture
    assert "image: painter: 15 to 45 calls, about 0.0100 USD each" in said
    assert "edit: editor: 4 to 12 calls" in said and "judge: judge: 19 to 171 calls" in said
    assert "at the recipe's prices: about 0." in said and "time: about" in said
    assert not server.calls and not (tmp_path / "made").exists()


def test_plan_tells_what_is_paid(server, recipe, tmp_path):
    """Without a fault, the calls are the plan's least ones."""
    said = run("synthesize", recipe(), "--out", tmp_path / "made")
    counts = {role: sum(call.model == role for call in server.calls) for role in ("writer", "painter", "editor")}
    assert counts["painter"] == 15 and counts["editor"] == 4
    assert f"text: writer: {counts['writer']} to" in said
    assert sum(call.model == "judge" for call in server.judged) == 19


def test_preview_comes_first_and_is_part_of_the_run(server, recipe, tmp_path):
    out = tmp_path / "made"
    run("synthesize", recipe(), "--out", out, "--preview", 12)
    assert (out / "preview.png").stat().st_size > 1000
    names = ends(out)
    assert len(names) == 12 and {name.rpartition("-")[0] for name in names} == set(PARTS)
    before = len(server.calls)
    run("synthesize", recipe(), "--out", out)
    assert ends(out) == planned() and max(server.paid.values()) == 1
    run("synthesize", recipe(), "--out", out)
    assert len(server.calls) > before
    after = len(server.calls)
    run("synthesize", recipe(), "--out", out)
    assert len(server.calls) == after


def test_more_rows_keep_the_first(server, recipe, tmp_path):
    out = tmp_path / "made"
    run("synthesize", recipe(), "--out", out)
    before = {row["row"]: row for row in accepted(out)}
    run("synthesize", recipe(surreal_fantasy__rows=10), "--out", out)
    after = {row["row"]: row for row in accepted(out)}
    assert len(after) == 21 and {name: after[name] for name in before} == before


def test_another_recipe_is_refused_in_the_same_folder(server, recipe, tmp_path):
    out = tmp_path / "made"
    run("synthesize", recipe(), "--out", out, "--preview", 1)
    assert "begun with another recipe" in run("synthesize", recipe(seed=5), "--out", out, code=2)
    words = tmp_path / "given" / "objects.txt"
    words.write_text(words.read_text() + "lamp\n")
    assert "another vocabulary" in run("synthesize", recipe(), "--out", out, code=2)


# --- gates --------------------------------------------------------------------------------------------------------


def test_a_wrong_picture_is_drawn_again_and_given_up_in_the_end(server, recipe, tmp_path):
    file, out = one_part(recipe, gates__verify=True), tmp_path / "made"
    texts = {}
    run("synthesize", file, "--out", tmp_path / "first", "--preview", 3)
    for row in accepted(tmp_path / "first"):
        texts[row["row"][-1]] = row["instruction"]
    server.artist.wrong = {texts["0"]: 2, texts["1"]: 99}
    said = run("synthesize", file, "--out", out)
    rows = {row["row"][-1]: row for row in accepted(out)}
    assert sorted(rows) == ["0", "2"] and rows["0"]["provenance"]["pictures_drawn"] == 3
    (lost,) = lines(out / "rejected.jsonl")
    assert lost["reason"] == "not verified" and "asked for" in lost["detail"] and "1 not verified" in said
    assert (out / "rejected" / f"{lost['row']}.png").is_file()
    verdicts = [s["result"]["right"] for s in lines(out / "steps.jsonl") if s["step"] == "verdict"]
    assert sorted(verdicts) == [False] * 5 + [True] * 2


def test_pixels_verify_for_nothing(server, recipe, tmp_path):
    out = tmp_path / "made"
    run("synthesize", one_part(recipe, models__judge={"name": "pixels"}), "--out", out, "--budget", 1)
    assert len(accepted(out)) == 3 and not any(call.model == "judge" for call in server.calls)


def test_a_paraphrase_that_loses_the_structure_is_not_used(server, recipe, tmp_path):
    server.artist.sloppy = 99
    said = run("synthesize", one_part(recipe), "--out", tmp_path / "made")
    assert "3 x no paraphrase kept the structure: the template was used" in said
    unusable = [step for step in lines(tmp_path / "made" / "steps.jsonl") if "unusable" in step]
    assert len(unusable) == 9 and all("structure is lost" in step["unusable"] for step in unusable)
    strict = one_part(recipe, instruction_following__otherwise="reject")
    server.artist.sloppy = 99
    assert "3 no usable instruction" in run("synthesize", strict, "--out", tmp_path / "strict")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"gates__blocked": ["seen"]}, "blocked content"),
        ({"models__image__size": "128x64", "rate__give_up_after": 99}, "wrong size"),
        ({"gates__duplicate_pictures": 255}, "duplicate picture"),
    ],
)
def test_gates_reject_with_their_reason(server, recipe, tmp_path, changes, reason):
    out = tmp_path / "made"
    said = run("synthesize", one_part(recipe, **changes), "--out", out)
    rejected = lines(out / "rejected.jsonl")
    assert {row["reason"] for row in rejected} == {reason} and f"{len(rejected)} {reason}" in said
    assert len(rejected) == (2 if reason == "duplicate picture" else 3)
    if reason == "blocked content":
        assert not any(call.kind == "generate" for call in server.calls), "rejected before the picture is paid for"


def test_duplicate_instructions_are_drawn_once(server, recipe, tmp_path):
    write = server.text
    everything = (
        "A heart, star, triangle, cross, circle, square and ring as cube, ball, spiral, pyramid, cone or ribbon"
    )
    server.text = lambda call: everything if "The break" in call.text else write(call)
    changes = {"surreal_fantasy__breaks": ["shape"], "surreal_fantasy__rows": 4}
    file = recipe(multi_reference=None, instruction_following=None, gates__verify=False, **changes)
    out = tmp_path / "made"
    run("synthesize", file, "--out", out, "--preview", 2)
    run("synthesize", file, "--out", out)
    assert [row["instruction"] for row in accepted(out)] == [everything]
    assert [row["reason"] for row in lines(out / "rejected.jsonl")] == ["duplicate instruction"] * 3
    assert sum(call.kind == "generate" for call in server.calls) == 1


def test_a_request_that_one_row_cannot_make_is_told(server, recipe, tmp_path):
    out, file = tmp_path / "made", one_part(recipe)
    run("synthesize", file, "--out", out, "--preview", 1)
    server.inject(EndpointFault("http_400", message="the prompt is odd", call_kind="generate"))
    assert "2 accepted, 1 rejected (1 request not accepted)" in run("synthesize", file, "--out", out)
    (row,) = lines(out / "rejected.jsonl")
    assert row["detail"] == "image: the prompt is odd (http_400)"


def test_benchmark_prompts_are_refused_by_default(server, recipe, tmp_path):
    first, given = tmp_path / "first", tmp_path / "given" / "benchmark.txt"
    run("synthesize", one_part(recipe), "--out", first)
    given.write_text(accepted(first)[0]["instruction"].replace("front", "side") + "\n")
    out = tmp_path / "made"
    assert "1 benchmark prompt" in run("synthesize", one_part(recipe), "--out", out)
    (row,) = lines(out / "rejected.jsonl")
    assert row["reason"] == "benchmark prompt" and "benchmark" in row["detail"]
    counted = one_part(recipe, gates__contamination={"benchmarks": [], "prompts": [str(given)], "action": "count"})
    said = run("synthesize", counted, "--out", tmp_path / "counted")
    assert "3 accepted" in said and "1 x instruction near a benchmark prompt" in said
    assert "3 accepted" in run("synthesize", one_part(recipe, gates__contamination=None), "--out", tmp_path / "off")


def test_refusals_are_recorded_as_such(server, recipe, tmp_path):
    server.inject(EndpointFault("moderation", call_kind="generate"), EndpointFault("refusal", call_kind="chat"))
    out = tmp_path / "made"
    said = run("synthesize", one_part(recipe), "--out", out, "--no-probe")
    reasons = {row["reason"]: row["detail"] for row in lines(out / "rejected.jsonl")}
    assert set(reasons) == {"refused by the image model", "refused by the text model"}
    assert "not accepted" in reasons["refused by the image model"] and "1 accepted" in said
    calls = len(server.calls)
    run("synthesize", one_part(recipe), "--out", out)
    assert len(server.calls) == calls, "a refusal is an answer: nobody is asked again"


def test_references_come_from_a_built_dataset(server, recipe, tmp_path):
    run("synthesize", one_part(recipe, rows=14), "--out", tmp_path / "made")
    run("build", tmp_path / "made" / "dataset", "--out", tmp_path / "built", "--workers", 1)
    source = {"path": str(tmp_path / "built"), "types": {"object": ["counting"], "animal": ["color_attr"]}}
    combining = {"surreal_fantasy": None, "instruction_following": None, "gates__verify": False}
    file = recipe(multi_reference__references=source, multi_reference__rows=5, **combining)
    run("synthesize", file, "--out", tmp_path / "combined")
    rows = accepted(tmp_path / "combined")
    assert len(rows) == 5 and {of["type"] for row in rows for of in row["references"]} == {"object", "animal"}
    shown = (tmp_path / "combined" / "dataset" / "Multi-Reference-Image" / rows[0]["input_images"][0]).read_bytes()
    originals = (tmp_path / "made" / "dataset").rglob("*.png")
    assert shown in [path.read_bytes() for path in originals]
    strangers = recipe(multi_reference__references=source | {"types": {"person": ["portrait"]}}, **combining)
    said = " ".join(run("synthesize", strangers, "--out", tmp_path / "none", code=2).split())
    assert "no row is of the subject types person; its column category holds" in said and "counting" in said
    strangers = recipe(multi_reference__references=source | {"type_column": "kind"}, **combining)
    assert "has no column 'kind'" in run("synthesize", strangers, "--out", tmp_path / "none", code=2)
