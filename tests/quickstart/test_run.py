"""The quickstart's pieces, and the whole of it in a few steps."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.accuracy import scores_by_tag
from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS, held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.rendering import render
from echo4o.evaluation.benchmarks.shapes4o.scene import ShapeGroup, lay_out
from echo4o.quickstart import run as quickstart
from echo4o.quickstart.comparison import compared_scores, comparison_table, parts_table
from echo4o.quickstart.control import EXPERIMENTS
from echo4o.quickstart.generation import GeneratedImages
from echo4o.quickstart.image_strip import image_strip
from echo4o.quickstart.quickstart_report import loss_curve, write_report
from echo4o.training.recipe_files import bundled_recipe, load_recipe

RESULT = {
    "rows": {"surreal_fantasy": 1},
    "compared": [],
    "recorded": False,
    "serve": "echo4o serve --model out/pipeline",
    "layout_words": "The words decide.",
    "chance_of_references": 0.0016,
    "prompts": 2,
    "short": False,
    "seed": 0,
    "drawing_steps": 4,
    "reloaded_difference": 0,
    "seconds": 12.0,
    "stages": {"rendering": 1.0},
    "processor_seconds": {"rendering": 1.9},
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
    assert "<svg" in html and "No comparison was recorded" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html), "the report must need nothing beside it"
    assert html.index("data:image/png") < html.index("<svg") < html.index("<table>"), (
        "images, then the curve and tables"
    )
    assert html.rstrip().endswith("<pre>echo4o serve --model out/pipeline</pre>\n</body>\n</html>")
    score = {"mean": 0.5, "right": 1, "of": 2, "low": 0.1, "high": 0.9}
    compared = compared_scores(score, score, 3, {"base + loose": {"0": {"scores": {"overall": score}, "steps": 3}}})
    write_report(
        tmp_path / "report.html",
        RESULT | {"scores": tables, "compared": compared, "recorded": True},
        before,
        after,
        LOG,
    )
    html = (tmp_path / "report.html").read_text()
    assert "base, 3 steps of loose captions" in html and "recorded, 1 seed<" in html and "No comparison" not in html


def test_the_comparison_pools_the_seeds_of_a_record():
    def run(right: int) -> dict:
        return {"scores": {"overall": {"right": right, "of": 90}}, "steps": 150}

    own = {"mean": 0.0, "right": 0, "of": 90, "low": 0.0, "high": 0.04}
    rows = compared_scores(own, own, 150, {"random + clean": {"0": run(30), "1": run(60)}})
    assert [row["measured"] for row in rows] == ["here", "here", "recorded, 2 seeds"]
    assert (rows[2]["right"], rows[2]["of"], rows[2]["mean"]) == (90, 180, 0.5)
    assert rows[2]["name"] == "random weights, 150 clean steps"
    assert rows[2]["low"] == pytest.approx(0.43, abs=0.01) and rows[2]["high"] == pytest.approx(0.57, abs=0.01)


def test_the_guide_shows_the_recorded_tables():
    control = quickstart.recorded(quickstart.BASE, "control")
    guide = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text("utf-8")
    assert comparison_table(control) in guide and parts_table(control) in guide


def test_the_recorded_experiments_are_those_of_the_recipe():
    control = quickstart.recorded(quickstart.BASE, "control")
    steps = load_recipe(bundled_recipe("quickstart_cpu")).steps
    assert control.keys() == EXPERIMENTS.keys()
    assert {run["steps"] for name, runs in control.items() for run in runs.values() if name != "base"} == {steps}


def test_loss_curve_of_a_single_step():
    assert loss_curve(LOG[:1]).startswith("<svg")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (9.0, "faster than .* about 1 minute to go"),
        (30.0, "as fast as .* about 3 minutes to go"),
        (60.0, "2.0x slower than .* about 6 minutes to go"),
    ],
)
def test_the_remaining_time_is_estimated(seconds, words, monkeypatch):
    monkeypatch.setattr(quickstart, "REFERENCE", {"generation": 30.0, "rest": 180.0})
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


@pytest.mark.long
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
    assert re.search(r"random weights, \d+ clean steps .* recorded, \d seed", said)
    assert said.rstrip().endswith(f"echo4o serve --model {tmp_path / 'out' / 'pipeline'}")
    strip = image_strip(tmp_path / "out", per_tag=1)
    assert strip.height < strip.width == 88 + len(TAGS) * 136 and len(set(strip.getdata())) > 100


def test_group_words_match_the_detector():
    """A group without a colour is drawn in its typical one and found as such."""
    found = detect(render(lay_out([ShapeGroup("heart")])))
    assert [(thing.shape, thing.colour) for thing in found] == [("heart", "red")]
