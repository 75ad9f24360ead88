"""The measurement of few-step adapters: rows are counted, scores are paired by prompt, and an interrupted run resumes."""

import json

import pytest

from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts, is_held_out
from echo4o.quickstart import few_steps
from echo4o.quickstart.few_steps import Experiment, RowCounter, Way, load, measure, table
from echo4o.quickstart.generation import generate_images
from echo4o.quickstart.run import BASE


@pytest.fixture(scope="module")
def pipe():
    return load(BASE, Way("base"))


@pytest.mark.parametrize(
    ("updates", "options", "rows"),
    [
        (4, {}, 8),  # the checkpoint's guidance: two rows in every update
        (4, {"guidance_scale": 1.0}, 4),
        (4, {"guidance_interval": (0.6, 1.0)}, 4 + 3),  # the times are 1, 0.9, 0.75 and 0.5
    ],
)
def test_rows_of_updates_are_counted_and_those_of_prompts_are_not(pipe, updates, options, rows):
    counter = RowCounter(pipe)
    generate_images(pipe, [held_out_prompts()[0], held_out_prompts()[70]], 0, updates, **options)
    counter.hook.remove()
    assert counter.rows == 2 * rows


def test_variants_have_the_same_held_out_contents_in_other_words():
    one, two = held_out_prompts(), held_out_prompts(variant=2)
    assert [p.tag for p in one] == [p.tag for p in two] and len(one) == 90
    assert sum(a.text != b.text for a, b in zip(one, two, strict=True)) > 30
    assert all(is_held_out(prompt.groups) for prompt in two)
    for a, b in zip(one, two, strict=True):
        assert sorted(map(str, a.groups)) == sorted(map(str, b.groups))


def test_the_table_pairs_prompts_with_the_teachers():
    right = [True] * 80 + [False] * 10
    better = [True] * 85 + [False] * 5
    scores = {
        "teacher": {"0": {"right": right, "rows": 48.0}, "1": {"right": right, "rows": 48.0}},
        "student": {"0": {"right": better, "rows": 4.0}, "1": {"right": right, "rows": 4.0}},
    }
    teacher, student = table(scores, {"teacher": 1.0, "student": 0.2}, "teacher", held_out_prompts()).splitlines()[2:]
    assert teacher.startswith("| teacher | 0.889 [") and "| +0.000 [+0.000, +0.000] |" in teacher
    assert "| 0.917 [" in student and "| +0.028 [" in student and student.endswith("| 4.0 | 12.0x | 5.0x |")


def test_a_measured_seed_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps, "load", lambda folder, way: "pipeline")
    asked = []

    def score(pipeline, way, prompts, seed):
        asked.append((way.name, seed))
        return {"right": [True] * len(prompts), "rows": 1.0}

    monkeypatch.setattr(few_steps, "score", score)
    (tmp_path / "scores.json").write_text(json.dumps({"a": {"0": {"right": [False] * 90, "rows": 1.0}}}))
    experiment = Experiment(BASE, tmp_path, lambda: None, held_out_prompts(), ())
    scores = measure(experiment, [Way("a", 1)])
    assert asked == [("a", 1), ("a", 2)] and not any(scores["a"]["0"]["right"])
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
