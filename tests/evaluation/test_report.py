"""The report: what it shows, in which order, and that nobody's words become markup."""

import re

import pytest

from echo4o.evaluation.score_report import load_published, write_report
from tests.evaluation.test_scores import cups, fantasy, grades, run


@pytest.fixture
def page(tmp_path):
    rows = [cups("counting", "a"), cups("counting", "b"), cups("color_attr", "c"), cups("color_attr", "d")]
    table = {
        "a": {"correct": 1},
        "b": {"correct": 0, "reason": "<script>alert(1)</script>"},
        "c": "no idea",
        "d": {"correct": 1},
    }
    run("genevalpp", rows, table, tmp_path, min_coverage=0.5)
    return write_report(tmp_path / "out").read_text()


def test_worst_first_and_filters(page):
    outcomes = re.findall(r'<article data-type="(\w+)" data-outcome="(\w+)"', page)
    assert outcomes == [
        ("color_attr", "judge_error"),
        ("counting", "incorrect"),
        ("counting", "correct"),
        ("color_attr", "correct"),
    ]
    for option in ("counting", "color_attr", "judge_error", "incorrect", "correct"):
        assert f"<option>{option}</option>" in page
    assert page.count("data:image/jpeg;base64,") == 4


def test_a_judges_words_are_text(page):
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_published_numbers_are_named_second_hand(page):
    assert "second-hand" in page and "arXiv 2509.09666" in page
    assert page.count("(published): 0.739") == 1 and "Echo-4o (published): 0.679" in page
    assert "These are not the official prompts" in page


def test_published_numbers_are_those_of_the_facts():
    found = load_published()
    assert found["genevalpp"]["GPT-4o"]["score"] == 0.739
    # The tags' mean is the score, up to rounding in the sources.
    for name, of in found["genevalpp"].items():
        if "groups" in of:
            assert sum(of["groups"].values()) / 7 == pytest.approx(of["score"], abs=0.002), name
    weights = {"attribute_shift": 3, "hybridization": 2, "spatiotemporal": 2, "multi_object": 2}
    for name, of in found["imagine_bench"].items():
        if "groups" in of:
            mean = sum(weights[group] * value for group, value in of["groups"].items()) / 9
            assert mean == pytest.approx(of["score"], abs=0.02), name


def test_grades_are_shown(tmp_path):
    rows = [fantasy("COLOR", "a"), fantasy("TIME", "b")]
    run("imagine_bench", rows, {"a": grades(9, 5, 8), "b": grades(1, 2, 3)}, tmp_path)
    page = write_report(tmp_path / "out").read_text()
    assert "fantasy fulfillment 9, identity preservation 5, aesthetic quality 8" in page
    assert page.index("scored 1.40") < page.index("scored 5.60")
    assert "(published): 8.54" in page


def test_the_report_can_be_moved(tmp_path):
    from echo4o.evaluation.judging import JudgingOptions
    from echo4o.evaluation.run import evaluate_images
    from tests.evaluation.conftest import write_pictures
    from tests.evaluation.test_scores import Scripted

    write_pictures(tmp_path / "pictures", 1)
    judge = Scripted({"a": {"correct": 1}})
    images = {"1": tmp_path / "pictures" / "1.png"}
    evaluate_images(
        "genevalpp", images, judge, tmp_path / "out", rows=[cups("counting", "a")], options=JudgingOptions(probe=False)
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'href="images/1.png"' in page and str(tmp_path) not in page
