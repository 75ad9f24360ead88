"""One clear error before the first paid call, and no key in it."""

import io

import pytest
from PIL import Image

from echo4o.testing.openai_server import API_KEY, EndpointFault
from tests.dataset_scripts.synthesis.artist import reference
from tests.dataset_scripts.synthesis.running import accepted, lines, one_part, run

WRONG = {
    "unknown key": ({"surreal_fantasy__colour": 1}, "surreal_fantasy.colour: unknown key"),
    "secret in the wrong place": ({"models__image__api_key": API_KEY}, "models.image.api_key: unknown key"),
    "secret in the url": (
        {"models__image__url": f"https://x.invalid/v1?key={API_KEY}"},
        "put the key into the environment variable",
    ),
    "the key instead of its variable": (
        {"models__image__key_variable": "sk-loopback-0123456789-secret"},
        "models.image.key_variable: this is the name of an environment variable",
    ),
    "the key among the options": (
        {"models__image__options": {"api_key": API_KEY}},
        "contains the key of OPENAI_API_KEY",
    ),
    "half a price": ({"models__text__price": {"input": 1.0}}, "models.text.price: set both input and output"),
    "two prices": (
        {"models__image__price": {"picture": 1, "input": 1, "output": 1}},
        "set either picture, or input and output",
    ),
    "words priced as pictures": ({"models__judge__price": {"picture": 1}}, "text is billed by tokens"),
    "endless price": ({"models__image__price": {"picture": float("inf")}}, "models.image.price.picture"),
    "nothing to compare with": (
        {"gates__contamination": {"benchmarks": []}},
        "contamination: null disables the gate",
    ),
    "no rows": ({"surreal_fantasy": None, "multi_reference": None, "instruction_following": None}, "no part has rows"),
    "unknown break": ({"surreal_fantasy__breaks": ["gravity"]}, "surreal_fantasy.breaks"),
    "least over most": ({"multi_reference__least": 4, "multi_reference__most": 2}, "least is 4 and most is 2"),
    "five references": ({"multi_reference__most": 5}, "less than or equal to 4"),
    "no judge": ({"models__judge": None}, "gates.verify needs models.judge"),
    "bad size": ({"models__image__size": "large"}, "models.image.size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe(server, recipe, tmp_path, case):
    changes, message = WRONG[case]
    said = run("synthesize", recipe(**changes), "--out", tmp_path / "made", code=2)
    assert message in " ".join(said.split()) and API_KEY not in said
    assert not server.calls and not (tmp_path / "made").exists()


def told(server, tmp_path, file, *more) -> str:
    """The error of a run that must not have asked for anything."""
    said = " ".join(run("synthesize", file, "--out", tmp_path / "made", *more, code=2).split())
    assert not server.calls and "Traceback" not in said and API_KEY not in said
    return said


def test_an_empty_vocabulary(server, recipe, tmp_path):
    (tmp_path / "given" / "objects.txt").write_text("\n# nothing\n")
    assert "the vocabulary of objects holds no words; at least 3" in told(server, tmp_path, recipe())


def test_a_vocabulary_that_is_not_there(server, recipe, tmp_path):
    assert "none.txt" in told(server, tmp_path, recipe(surreal_fantasy__objects="none.txt"))


@pytest.mark.parametrize(
    "content, why",
    [
        ("café\nthé\nœuf\n".encode("cp1252"), "is not UTF-8 text"),
        (b'{"categories": [\n', "'{\"categories\": [' is not a word"),
        (b"cup,12\n", "'cup,12' is not a word"),
        (b"12\n???\n", "'12' is not a word"),
        (b"x" * 61, "is not a word"),
    ],
)
def test_a_vocabulary_that_is_none(server, recipe, tmp_path, content, why):
    (tmp_path / "given" / "objects.txt").write_bytes(content)
    said = told(server, tmp_path, recipe())
    assert why in said and "objects.txt" in said


def test_a_recipe_that_is_not_text(server, tmp_path):
    (tmp_path / "recipe.yaml").write_text("version: 1", "utf-16")
    assert "recipe.yaml cannot be read" in told(server, tmp_path, tmp_path / "recipe.yaml")


def test_references_without_the_subject_types(server, recipe, tmp_path):
    types = {"person": ["person"], "scene": ["landscape"]}
    said = told(server, tmp_path, recipe(multi_reference__references__types=types))
    assert "no image of the subject type 'scene' (looked for landscape); it has person" in said


def _bomb() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (6_000, 6_000)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "data, why",
    [
        (lambda: reference("star", "red", 1)[:60], "truncated"),
        (lambda: b"", "truncated: 0 bytes"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it begins with b'<svg xml'"),
        (lambda: b"<!doctype html><html>not found</html>", "undecodable"),
        (_bomb, "decompression bomb"),
    ],
    ids=["cut", "empty", "svg", "html", "bomb"],
)
def test_references_that_do_not_decode(server, recipe, tmp_path, data, why):
    for picture in (tmp_path / "given" / "references" / "animal").rglob("*.png"):
        picture.write_bytes(data())
    said = told(server, tmp_path, recipe(multi_reference__rows=12))
    assert "the reference image animal/" in said and "cannot be used: " in said and why in said


def test_too_few_references(server, recipe, tmp_path):
    types = {"person": ["person/heart"], "scene": ["scene"]}
    for picture in list((tmp_path / "given" / "references" / "person" / "heart").glob("*.png"))[1:]:
        picture.unlink()
    said = told(server, tmp_path, recipe(multi_reference__references__types=types))
    assert "a row uses up to 4 reference images" in said and "the source has 2" in said


def test_no_such_source(server, recipe, tmp_path):
    assert "nowhere" in told(server, tmp_path, recipe(multi_reference__references__path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("budget", [0, -1, "nan", "inf"])
def test_a_budget_of_nothing(server, recipe, tmp_path, budget):
    assert "must be a positive number of USD" in told(server, tmp_path, recipe(), "--budget", budget)


def test_a_budget_without_prices(server, recipe, tmp_path):
    said = told(server, tmp_path, recipe(models__image__price={}), "--budget", 5)
    assert "set models.image.price in the recipe" in said


def test_a_model_that_the_endpoint_does_not_know(server, recipe, tmp_path):
    said = told(server, tmp_path, recipe(models__image__name="gpt-image-1"))
    assert "models.image: http://127.0.0.1" in said and "has no model 'gpt-image-1'" in said
    assert "it offers editor, judge, painter, writer" in said and "set models.image.name" in said


def test_a_model_that_is_gone_without_a_list(server, recipe, tmp_path):
    file = one_part(recipe, models__check=False, models__image__name="gpt-image-1")
    said = " ".join(run("synthesize", file, "--out", tmp_path / "made", code=2).split())
    assert "has no model 'gpt-image-1'" in said and "Models are retired" in said
    assert not lines(tmp_path / "made" / "rejected.jsonl")


def test_a_judge_that_is_gone_without_a_list(server, recipe, tmp_path):
    said = told_by_probe(server, recipe(models__check=False, models__judge__name="gone"), tmp_path)
    assert "models.judge: http://127.0.0.1" in said and "set models.judge.name in the recipe" in said


def told_by_probe(server, file, tmp_path) -> str:
    said = run("synthesize", file, "--out", tmp_path / "made", code=2)
    assert len(server.calls) == 1 and server.calls[0].is_probe and not server.paid
    return " ".join(said.split())


def test_models_that_no_row_needs_are_not_asked_for(server, recipe, tmp_path):
    changes = {"models__edit__name": "gone", "models__text__price": {}, "instruction_following__paraphrase": False}
    said = run("synthesize", one_part(recipe, **changes), "--out", tmp_path / "made", "--budget", 5)
    assert "3 accepted" in said and {call.model for call in server.calls} == {"painter", "judge"}


def test_a_recipe_can_be_corrected_until_a_row_came_out_of_it(server, recipe, tmp_path):
    """The message says to change the recipe: then the same folder must take it."""
    out = tmp_path / "made"
    run("synthesize", one_part(recipe, models__image__name="gone"), "--out", out, code=2)
    server.inject(EndpointFault("http_400", message="size is not supported", call_kind="generate"))
    file = one_part(recipe, models__image__size="128x64", rate__concurrency=1)
    assert "size is not supported" in run("synthesize", file, "--out", out, code=2)
    run("synthesize", one_part(recipe), "--out", out)
    assert len(accepted(out)) == 3 and len(lines(out / "steps.jsonl")) == 12
    said = " ".join(run("synthesize", one_part(recipe, seed=1), "--out", out, code=2).split())
    assert "begun with another recipe (seed)" in said


def test_no_key_and_a_wrong_one(server, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-but-secret")
    said = told(server, tmp_path, recipe())
    assert "http_401" in said and "sk-wrong" not in said
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in told(server, tmp_path, recipe())


@pytest.mark.parametrize("wrong", ["\n", "\r", " ", "…"])
def test_a_key_that_was_copied_with_something_else(server, recipe, tmp_path, monkeypatch, wrong):
    monkeypatch.setenv("OPENAI_API_KEY", f"sk-wrong-but-secret{wrong}")
    said = told(server, tmp_path, recipe())
    assert "the key in OPENAI_API_KEY holds a character that keys do not have" in said and "sk-wrong" not in said


def test_a_key_that_a_server_quotes_across_the_cut(server, recipe, tmp_path):
    server.inject(EndpointFault("http_400", message="x" * 285 + " {key}", times=99, call_kind="generate"))
    said = run("synthesize", one_part(recipe), "--out", tmp_path / "made", code=2)
    assert "does not accept our request" in said and "sk-" not in said


def test_a_judge_that_sees_nothing(server, recipe, tmp_path):
    server.vision = False
    said = run("synthesize", recipe(), "--out", tmp_path / "made", code=2)
    assert "does not seem to see images" in said and len(server.calls) == 1


def test_benchmark_prompts_that_cannot_be_had(server, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO4O_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    said = told(server, tmp_path, recipe(gates__contamination={}))
    assert "the prompts of genevalpp cannot be loaded" in said and "gates.contamination: null" in said


def test_an_answer_that_is_a_link(server, recipe, tmp_path):
    server.inject(EndpointFault("link", call_kind="generate", times=99))
    said = run("synthesize", one_part(recipe), "--out", tmp_path / "made", code=2)
    assert "set response_format: b64_json" in said
