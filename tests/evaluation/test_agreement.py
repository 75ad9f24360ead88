"""Agreement of two judges on the same images: kappa, differences, the images on which they differ."""

import json

import numpy as np
import pytest

from echo4o.evaluation.agreement import agreement
from tests.evaluation.conftest import even_is_correct, write_pictures
from tests.evaluation.test_command import run, words
from tests.evaluation.test_dpg import answer
from tests.evaluation.test_dpg import images as dpg_images  # noqa: F401 - a fixture
from tests.evaluation.test_dpg import table as dpg_table  # noqa: F401 - a fixture


def test_kappa_of_a_known_table():
    # Cohen's example form: 20 and 15 agreements, 5 and 10 disagreements: kappa 0.4.
    pairs = [(1, 1)] * 20 + [(0, 0)] * 15 + [(1, 0)] * 5 + [(0, 1)] * 10
    found = agreement([[pair] for pair in pairs])
    assert found["kappa"] == pytest.approx(0.4) and found["equal"] == 0.7 and found["kappa_weights"] == "none"
    low, high = found["kappa_interval"]
    assert low < 0.4 < high and 0.3 < high - low < 0.7
    assert found["mean_difference"] == pytest.approx(0.1)


def test_kappa_of_grades_is_quadratically_weighted():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 11, 200)
    b = np.clip(a + rng.integers(-1, 2, 200), 0, 10)
    found = agreement([[pair] for pair in zip(a, b)])
    weights = np.subtract.outer(np.arange(11), np.arange(11)) ** 2
    observed, expected = (weights[a, b].mean(), weights[np.ix_(a, b)].mean())
    assert found["kappa"] == pytest.approx(1 - observed / expected) and found["kappa_weights"] == "quadratic"


def test_kappa_without_variation_is_undefined():
    assert agreement([[(1, 1)], [(1, 1)]])["kappa"] is None


@pytest.fixture
def two_runs(server, prompts, pictures, tmp_path):
    """The judge at two dates: later, it finds picture 1 right as well."""
    given = ["genevalpp", "--images", pictures, "--prompts", prompts, "--judge", "openai:judge"]
    given += ["--judge-url", server.url, "--no-cache", "--out"]
    assert run(*given, tmp_path / "a").exit_code == 0

    def later(call):
        number = call.open_image().getpixel((0, 0))[0]
        return {"reason": "changed my mind", "correct": 1} if number == 1 else even_is_correct(call)

    server.verdict = later
    assert run(*given, tmp_path / "b").exit_code == 0
    return tmp_path / "a", tmp_path / "b"


def test_a_judge_that_changed_under_the_same_name_is_seen(two_runs):
    a, b = two_runs
    done = run("agree", a, b, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["images"] == 8 and found["fields"]["correct"]["equal"] == 7 / 8
    assert found["score"]["difference"] == pytest.approx(1 / 8)
    assert found["differ"] == [{"image": "1", "repeat": 1, "group": "counting", "a": 0.0, "b": 1.0}]
    page = (b / "agreement.html").read_text()
    assert "changed my mind" in page and "picture 1" in page and page.count("<article>") == 1
    shown = run("agree", a, b)
    assert "1 of them differ" in words(shown.stderr) and shown.stdout.split() == [str(b / "agreement.html")]


def test_other_images_or_prompts_are_an_error(server, two_runs, prompts, tmp_path):
    a, _ = two_runs
    given = ["genevalpp", "--judge", "openai:judge", "--judge-url", server.url]
    pictures = write_pictures(tmp_path / "others", 9)
    (pictures / "9.png").rename(pictures / "1.png")
    assert run(*given, "--prompts", prompts, "--images", pictures, "--out", tmp_path / "c").exit_code == 0
    assert "have other images (1, such as 1)" in words(run("agree", a, tmp_path / "c").stderr)
    prompts.write_text(prompts.read_text().replace("number 1", "number one"))
    assert run(*given, "--prompts", prompts, "--images", pictures, "--out", tmp_path / "d").exit_code == 0
    assert "come from different prompts" in words(run("agree", a, tmp_path / "d").stderr)


def test_both_settings_of_dpg_compare_question_by_question(server, dpg_table, dpg_images, tmp_path):  # noqa: F811
    server.verdict = answer
    given = ["--questions", dpg_table, "--images", dpg_images, "--judge", "openai:judge", "--judge-url", server.url]
    for name in ("dpg", "dpg_one_call"):
        assert run(name, *given, "--out", tmp_path / name).exit_code == 0
    done = run("agree", tmp_path / "dpg", tmp_path / "dpg_one_call", "--json")
    found = json.loads(done.stdout)
    assert found["fields"]["answer"]["values"] == 20 and found["fields"]["answer"]["equal"] == 1.0
    assert found["fields"]["answer"]["kappa"] == 1.0 and not found["differ"]
