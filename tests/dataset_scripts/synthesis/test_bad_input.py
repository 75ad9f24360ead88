"""One clear error before the first paid call, and no key in it."""

import pytest

from tests.dataset_scripts.synthesis.running import lines, one_part, run
from tests.openai_server import KEY, Fault

WRONG = {
    "unknown key": ({"surreal_fantasy__colour": 1}, "surreal_fantasy.colour: unknown key"),
    "secret in the wrong place": ({"models__image__api_key": KEY}, "models.image.api_key: unknown key"),
    "secret in the url": (
        {"models__image__url": f"https://x.invalid/v1?key={KEY}"},
        "the key belongs into key_variable",
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
    assert message in " ".join(said.split()) and KEY not in said
    assert not server.calls and not (tmp_path / "made").exists()


def told(server, tmp_path, file, *more) -> str:
    """The error of a run that must not have asked for anything."""
    said = " ".join(run("synthesize", file, "--out", tmp_path / "made", *more, code=2).split())
    assert not server.calls and "Traceback" not in said and KEY not in said
    return said


def test_an_empty_vocabulary(server, recipe, tmp_path):
    (tmp_path / "given" / "objects.txt").write_text("\n# nothing\n")
    assert "the vocabulary of objects holds no word; at least 3" in told(server, tmp_path, recipe())


def test_a_vocabulary_that_is_not_there(server, recipe, tmp_path):
    assert "none.txt" in told(server, tmp_path, recipe(surreal_fantasy__objects="none.txt"))


def test_references_without_the_subject_types(server, recipe, tmp_path):
    types = {"person": ["person"], "scene": ["landscape"]}
    said = told(server, tmp_path, recipe(multi_reference__references__types=types))
    assert "no picture of the subject type 'scene' (looked for landscape); it has person" in said


def test_references_that_do_not_decode(server, recipe, tmp_path):
    for picture in (tmp_path / "given" / "references" / "animal").rglob("*.png"):
        picture.write_bytes(picture.read_bytes()[:60])
    said = told(server, tmp_path, recipe(multi_reference__rows=12))
    assert "the reference picture animal/" in said and "cannot be used: truncated" in said


def test_too_few_references(server, recipe, tmp_path):
    types = {"person": ["person/heart"], "scene": ["scene"]}
    for picture in list((tmp_path / "given" / "references" / "person" / "heart").glob("*.png"))[1:]:
        picture.unlink()
    said = told(server, tmp_path, recipe(multi_reference__references__types=types))
    assert "a row takes up to 4 reference pictures" in said and "there are 2" in said


def test_no_such_source(server, recipe, tmp_path):
    assert "nowhere" in told(server, tmp_path, recipe(multi_reference__references__path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing(server, recipe, tmp_path, budget):
    assert "buys nothing" in told(server, tmp_path, recipe(), "--budget", budget)


def test_a_budget_without_prices(server, recipe, tmp_path):
    said = told(server, tmp_path, recipe(models__image__price={}), "--budget", 5)
    assert "say models.image.price in the recipe" in said


def test_a_model_that_the_endpoint_does_not_know(server, recipe, tmp_path):
    said = told(server, tmp_path, recipe(models__image__name="gpt-image-1"))
    assert "models.image: http://127.0.0.1" in said and "has no model 'gpt-image-1'" in said
    assert "it offers editor, judge, painter, writer" in said and "set models.image.name" in said


def test_a_model_that_is_gone_without_a_list(server, recipe, tmp_path):
    file = one_part(recipe, models__check=False, models__image__name="gpt-image-1")
    said = " ".join(run("synthesize", file, "--out", tmp_path / "made", code=2).split())
    assert "has no model 'gpt-image-1'" in said and "Models are retired" in said
    assert not lines(tmp_path / "made" / "rejected.jsonl")


def test_no_key_and_a_wrong_one(server, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-but-secret")
    said = told(server, tmp_path, recipe())
    assert "http_401" in said and "sk-wrong" not in said
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in told(server, tmp_path, recipe())


def test_a_judge_that_sees_nothing(server, recipe, tmp_path):
    server.vision = False
    said = run("synthesize", recipe(), "--out", tmp_path / "made", code=2)
    assert "does not seem to see pictures" in said and len(server.calls) == 1


def test_benchmark_prompts_that_cannot_be_had(server, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO4O_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    said = told(server, tmp_path, recipe(gates__contamination={}))
    assert "the prompts of genevalpp cannot be had" in said and "gates.contamination: null" in said


def test_an_answer_that_is_a_link(server, recipe, tmp_path):
    server.inject(Fault("link", of="generate", times=99))
    said = run("synthesize", one_part(recipe), "--out", tmp_path / "made", code=2)
    assert "set response_format: b64_json" in said
