"""The quickstart's pieces, and the whole of it in a few steps."""

import json
import re

import pytest
from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.accuracy import scores_by_tag
from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS, held_out_contents, held_out_prompts, is_held_out
from echo4o.evaluation.benchmarks.shapes4o.rendering import render
from echo4o.evaluation.benchmarks.shapes4o.scene import ShapeGroup, lay_out
from echo4o.quickstart import run as quickstart
from echo4o.quickstart.base_model import single_object_prompts, single_object_rows, single_objects
from echo4o.quickstart.generation import GeneratedImages
from echo4o.quickstart.quickstart_report import loss_curve, write_report
from echo4o.training.recipe_files import bundled_recipe, load_recipe

RESULT = {
    "rows": {"surreal_fantasy": 1},
    "base_on_single_objects": {"right": 9, "of": 10, "mean": 0.9, "low": 0.6, "high": 0.98},
    "layout_words": "The words decide.",
    "chance_of_references": 0.0016,
    "prompts": 2,
    "short": False,
    "seed": 0,
    "drawing_steps": 4,
    "reloaded_difference": 0,
    "seconds": 12.0,
    "stages": {"rendering": 1.0},
    "sizes_mb": {"pipeline": 10.5},
    "training": {"steps": 3, "samples": 96, "samples_per_second": 100.0},
    "machine": {"threads": 2, "cpus": 2, "python": "3.11", "torch": "2.13"},
}
LOG = [{"samples": 32 * (i + 1), "loss": 1 / (i + 1)} for i in range(30)]


def drawn(right: bool) -> GeneratedImages:
    prompts = [held_out_prompts()[0], next(p for p in held_out_prompts() if p.references)]
    pictures = [render(lay_out(p.groups)) if right else Image.new("RGB", (64, 64), "white") for p in prompts]
    reasons = [check(p.groups, detect(picture))[1] for p, picture in zip(prompts, pictures)]
    return GeneratedImages(
        prompts, pictures, reasons, scores_by_tag([p.tag for p in prompts], [not why for why in reasons])
    )


def test_report_is_one_file_with_pictures_and_intervals(tmp_path):
    before, after = drawn(False), drawn(True)
    tables = {"before": quickstart.score_table(before), "after": quickstart.score_table(after)}
    write_report(tmp_path / "report.html", RESULT | {"scores": tables}, before, after, LOG)
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 * 2 + 2  # before and after of two prompts, two references
    assert re.search(r"overall</td>\s*<td class=\"number\">0.00</td>", html)
    assert "<svg" in html and "No control from random weights was run" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report must need nothing beside it"
    control = {"mean": 0.5, "right": 1, "of": 2, "low": 0.1, "high": 0.9, "training": {"steps": 3}}
    write_report(tmp_path / "report.html", RESULT | {"scores": tables, "control": control}, before, after, LOG)
    assert "from random weights reaches 0.50 (1 of 2; 95%: 0.10" in (tmp_path / "report.html").read_text()


def test_loss_curve_of_a_single_step():
    assert loss_curve(LOG[:1]).startswith("<svg")


def test_the_base_sees_no_held_out_content():
    assert all(not is_held_out([group]) for group in single_objects())
    rows = single_object_rows(50, seed=0)
    assert len({row["id"] for row in rows}) == 50
    assert sum(row["answer"] is not None for row in rows) == 10
    assert any(len(content) == 1 for content in held_out_contents()), "then the check above checks something"
    prompts = single_object_prompts(10)
    assert all(check(p.groups, detect(render(lay_out(p.groups))))[0] for p in prompts)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (4.0, "faster than .* about 2 min"),
        (8.0, "as fast as .* about 3 min"),
        (16.0, "2.0x slower than .* about 7 min"),
    ],
)
def test_the_remaining_time_is_estimated(seconds, words):
    assert re.search(words, quickstart.pace(seconds))


def test_no_clock_ends_the_training():
    """The score must not depend on the machine's speed."""
    assert load_recipe(bundled_recipe("quickstart_cpu")).max_seconds is None
    assert "max_seconds" not in {**quickstart.FULL.training, **quickstart.SHORT.training}


def test_prompts_of_the_short_form_hold_every_tag():
    assert [p.tag for p in quickstart.chosen_prompts(1)] == list(TAGS)
    regenerated = [held_out_prompts()[i] for i in quickstart.REGENERATED]
    assert [bool(p.references) for p in regenerated] == [False, True]


def test_without_a_base_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="make tiny-base"):
        quickstart.run(tmp_path / "out", base=tmp_path / "nowhere")


@pytest.mark.slow
def test_the_whole_quickstart_in_a_few_steps(tmp_path, monkeypatch, capfd):
    few = quickstart.QuickstartSize(
        {"surreal_fantasy": 10, "multi_reference": 10, "instruction_following": 20},
        1,
        2,
        {"steps": 3, "batch_size": 8, "optimizer.warmup_steps": 1, "validation.share": 0.2},
    )
    monkeypatch.setattr(quickstart, "SHORT", few)
    result = quickstart.run(tmp_path / "out", short=True)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["reloaded_difference"] <= 2
    assert set(result["scores"]["after"]) == {*TAGS, "overall"}
    assert result["scores"]["before"]["overall"].keys() == {"right", "of", "mean", "low", "high"}
    assert result["training"]["steps"] == 3 and result["training"]["samples"] == 24
    assert len(result["stages"]) == 6 and all(seconds >= 0 for seconds in result["stages"].values())
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()
    assert len((tmp_path / "out" / "train_log.jsonl").read_text().splitlines()) == 3
    said = capfd.readouterr().out
    assert (
        "Multi-reference by chance alone: 0.002" in said
        and "Control, measured once" in said
        and "echo4o generate" in said
    )


def test_group_words_match_the_detector():
    """A group without a colour is drawn in its typical one and found as such."""
    found = detect(render(lay_out([ShapeGroup("heart")])))
    assert [(thing.shape, thing.colour) for thing in found] == [("heart", "red")]
