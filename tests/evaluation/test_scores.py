"""Scores, intervals and tests against values worked out by hand."""

import json
import random
from math import comb

import pytest

from echo4o.endpoints.endpoint import ModelAnswer
from echo4o.evaluation import statistics
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.prompt_files import load_prompts
from echo4o.evaluation.compare import compare
from echo4o.evaluation.images import find_images
from echo4o.evaluation.judge_prompts import load_judge_prompts
from echo4o.evaluation.judges.base import Judge
from echo4o.evaluation.judging import JudgingOptions, JudgingSetup, judge_images
from echo4o.evaluation.run import evaluate_images, keep_prompts
from echo4o.evaluation.score import score_folder
from tests.evaluation.conftest import write_pictures


class Scripted(Judge):
    """Answers from a table: (words of the instruction, aspect's first field) -> fields."""

    name = "scripted"

    def __init__(self, table, version=1):
        self.table, self.version, self.asked = table, version, []

    def identity(self):
        return {"judge": self.name, "version": self.version}

    async def ask(self, question, key):
        self.asked.append(question)
        name = next(name for name in self.table if f" {name}\n" in f"{question.text}\n".replace(".\n", "\n"))
        said = self.table[name]
        said = said.pop(0) if isinstance(said, list) else said
        return ModelAnswer(said if isinstance(said, str) else json.dumps({"reason": f"about {name}"} | said))


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(benchmark, rows, table, folder, per_prompt=1, repeats=1, count=None, **rest):
    chosen = get_benchmark(benchmark)
    out = folder / rest.pop("out", "out")
    of_file = load_prompts(chosen, write_rows(folder / "rows.jsonl", rows))
    keep_prompts(chosen, of_file, out)
    pictures = folder / "pictures"
    if not pictures.is_dir():
        write_pictures(pictures, len(rows) if count is None else count)
    judge = Scripted(table)
    setup = JudgingSetup(chosen, judge.identity(), load_judge_prompts(chosen), per_prompt, repeats)
    found = find_images(pictures, of_file.prompts, per_prompt)
    judge_images(setup, of_file.prompts, found, judge, out, JudgingOptions(probe=False))
    return score_folder(out, **rest)


def cups(tag, name):
    return {"tag": tag, "include": [{"class": "cup", "count": 1}], "prompt": f"A photo of {name}"}


def test_genevalpp(tmp_path):
    # counting: 1 of 1; color_attr: 1 of 3. Mean of the tags (1 + 1/3) / 2 = 2/3; over all pictures 2/4.
    rows = [cups("counting", "a"), cups("color_attr", "b"), cups("color_attr", "c"), cups("color_attr", "d")]
    table = {"a": {"correct": 1}, "b": {"correct": 1}, "c": {"correct": 0}, "d": {"correct": 0}}
    result = run("genevalpp", rows, table, tmp_path)
    assert result["score"] == pytest.approx(2 / 3)
    assert result["also"] == {"overall_accuracy": pytest.approx(0.5)}
    assert result["groups"]["color_attr"] == {"score": pytest.approx(1 / 3), "scored": 3, "total": 3}


def fantasy(kind, name):
    return {"type": kind, "instruction": f"A photo of {name}", "note": "a note"}


def grades(fulfilment, identity, aesthetics):
    return {
        "fantasy_fulfillment": fulfilment,
        "identity_preservation": identity,
        "aesthetic_quality": aesthetics,
    }


def test_imagine_bench(tmp_path):
    # attribute: 0.8*min(9,5)+0.2*8 = 5.6 and 0.8*10+0.2*10 = 10 -> 7.8; hybridization: 0.8*0+0.2*5 = 1;
    # spatiotemporal: 0.8*6+0.2*6 = 6; multi-object: 0.8*min(7,8)+0.2*4 = 6.4
    rows = [fantasy(kind, name) for kind, name in zip(["COLOR", "SIZE", "MATERIAL", "TIME", "Multi-Object"], "abcde")]
    table = dict(
        zip("abcde", [grades(9, 5, 8), grades(10, 10, 10), grades(0, 9, 5), grades(6, 6, 6), grades(7, 8, 4)])
    )
    result = run("imagine_bench", rows, table, tmp_path)
    assert result["groups"]["attribute_shift"]["score"] == pytest.approx(7.8)
    assert result["score"] == pytest.approx((3 * 7.8 + 2 * 1 + 2 * 6 + 2 * 6.4) / 9)
    assert result["also"]["plain_mean"] == pytest.approx((5.6 + 10 + 1 + 6 + 6.4) / 5)
    assert result["types"]["COLOR"] == {"score": pytest.approx(5.6), "scored": 1, "total": 1}
    assert result["fields"]["aesthetic_quality"] == pytest.approx(33 / 5)


def test_omnicontext(tmp_path):
    # scene_object: sqrt(4*9) = 6 and sqrt(1*0) = 0 -> 3; multi_object: sqrt(8*8) = 8; single_object: sqrt(10*10) = 10
    write_pictures(tmp_path / "pictures", 4)
    tasks = ["scene_object", "scene_object", "multi_object", "single_object"]
    rows = [
        {"task_type": task, "instruction": f"A photo of {name}", "input_images": ["pictures/1.png"]}
        for task, name in zip(tasks, "abcd")
    ]
    scores = {"a": (4, 9), "b": (1, 0), "c": (8, 8), "d": (10, 10)}
    table = {
        name: [{"prompt_following": following}, {"subject_consistency": consistency}]
        for name, (following, consistency) in scores.items()
    }
    result = run("omnicontext", rows, table, tmp_path)
    assert result["score"] == pytest.approx((3 + 8 + 10) / 3)
    assert result["also"]["score_6_tasks"] == pytest.approx((3 + 8) / 2)
    assert result["groups"]["scene_object"] == {"score": pytest.approx(3), "scored": 2, "total": 2}


def test_the_scene_is_compared_in_scene_tasks_only(tmp_path):
    write_pictures(tmp_path / "pictures", 2)
    rows = [
        {"task_type": task, "instruction": f"Of {name}", "input_images": ["pictures/1.png", "pictures/2.png"]}
        for task, name in (("scene_object", "a"), ("multi_object", "b"))
    ]
    chosen = get_benchmark("omnicontext")
    of_file = load_prompts(chosen, write_rows(tmp_path / "rows.jsonl", rows))
    found = find_images(tmp_path / "pictures", of_file.prompts)
    words = load_judge_prompts(chosen)["subject_consistency"]
    asked = [words.ask(chosen, chosen.aspects[1], prompt, found.images[prompt.id, 1]) for prompt in of_file.prompts]
    assert ["background" in question.text for question in asked] == [True, False]
    assert [shown.label for shown in asked[0].images] == [
        "Reference picture 1",
        "Reference picture 2",
        "Picture to grade",
    ]


def test_several_images_and_repeats_are_averaged_by_prompt(tmp_path):
    # Prompt a: pictures judged (1, 1) and (1, 0): 0.75. Prompt b: (0, 0) and (0, 0): 0. One tag: 0.375.
    folder = tmp_path / "pictures"
    write_pictures(folder, 4)
    for number, name in enumerate(("1_1", "1_2", "2_1", "2_2"), start=1):
        (folder / f"{number}.png").rename(folder / f"{name}.png")
    rows = [cups("counting", "a"), cups("counting", "b")]
    table = {"a": [{"correct": c} for c in (1, 1, 1, 0)], "b": {"correct": 0}}
    result = run("genevalpp", rows, table, tmp_path, per_prompt=2, repeats=2)
    assert result["score"] == 0.375
    assert result["groups"]["counting"] == {"score": 0.375, "scored": 8, "total": 8}
    variance = result["repeats"]
    assert variance["score_of_each"] == [0.5, 0.25]
    assert variance["score_std"] == 0.125
    assert variance["mean_std_of_a_picture"] == 0.125
    assert variance["pictures_judged_differently"] == 0.25


def test_missing_images_lower_the_coverage_and_not_the_score(tmp_path):
    rows = [cups("counting", name) for name in "abcd"]
    table = {name: {"correct": 1} for name in "abcd"}
    result = run("genevalpp", rows, table, tmp_path, count=3)
    assert result["score"] is None and result["coverage"] == 0.75
    assert result["statuses"]["missing_image"] == 1
    assert result["groups"]["counting"] == {"score": 1.0, "scored": 3, "total": 4}
    assert score_folder(tmp_path / "out", min_coverage=0.75)["score"] == 1.0


def test_a_tag_without_scores_withholds_the_mean_of_the_tags(tmp_path):
    rows = [cups("counting", "a"), cups("counting", "b"), cups("color_attr", "c")]
    table = {"a": {"correct": 1}, "b": {"correct": 1}, "c": "no idea"}
    result = run("genevalpp", rows, table, tmp_path, min_coverage=0.5)
    assert (result["score"], result["withheld"]) == (None, "nothing was scored in color_attr")
    assert result["groups"]["color_attr"] == {"score": None, "scored": 0, "total": 1}


def test_an_interrupted_run_is_not_a_finished_one(tmp_path):
    rows = [cups("counting", "a"), cups("counting", "b")]
    table = {"a": {"correct": 1}, "b": {"correct": 1}}
    run("genevalpp", rows, table, tmp_path)
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    (tmp_path / "out" / "records.jsonl").write_text(lines[0] + "\n")
    result = score_folder(tmp_path / "out")
    assert result["statuses"] == {"scored": 1, "judge_error": 0, "missing_image": 0, "not_judged": 1}
    assert result["score"] is None


# --- statistics ---------------------------------------------------------------------------------------------------


def mean_only(counts):
    total = sum(counts.values())
    return {"score": {group: count / total for group, count in counts.items()}}


def test_the_bootstrap_agrees_with_the_binomial():
    # 30 of 40 right: the bootstrap's mean is Binomial(40, 0.75) / 40, whose 2.5% and 97.5% quantiles are known exactly.
    def quantile(level):
        total = 0.0
        for k in range(41):
            total += comb(40, k) * 0.75**k * 0.25 ** (40 - k)
            if total >= level:
                return k / 40

    totals, groups = statistics.bootstrap({"all": [1.0] * 30 + [0.0] * 10}, mean_only, binary=True)
    assert totals["score"] == groups["all"] == pytest.approx([quantile(0.025), quantile(0.975)], abs=0.026)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    dice, covered, trials = random.Random(5), 0, 60
    for seed in range(trials):
        values = {
            "a": [float(dice.random() < 0.3) for _ in range(60)],
            "b": [float(dice.random() < 0.8) for _ in range(60)],
        }
        low, high = statistics.bootstrap(values, get_benchmark("genevalpp").aggregates, seed)[0]["score"]
        covered += low <= 0.55 <= high
    assert covered / trials > 0.85


def test_all_right_is_not_certain():
    # 10 of 10: the 2.5% quantile of Beta(10.5, 0.5), as tables of Jeffreys' interval have it, is 0.783.
    totals, groups = statistics.bootstrap({"a": [1.0] * 10}, mean_only, binary=True)
    assert totals["score"] == groups["a"] == pytest.approx([0.783, 1.0], abs=0.01)
    # Where one tag is all right and another all wrong, the mean of both is not certain either.
    totals, _ = statistics.bootstrap({"a": [1.0] * 4, "b": [0.0] * 4}, mean_only, binary=True)
    low, high = totals["score"]
    assert 0.2 < low < 0.45 and 0.55 < high < 0.8
    # Grades have no such excuse: three equal grades are three equal grades.
    assert statistics.bootstrap({"a": [7.0] * 3}, mean_only)[0]["score"] == [7.0, 7.0]


def test_intervals_are_the_same_for_the_same_seed():
    dice = random.Random(0)
    values = {"a": [dice.random() for _ in range(30)]}
    assert statistics.bootstrap(values, mean_only, 3) == statistics.bootstrap(values, mean_only, 3)
    assert statistics.bootstrap(values, mean_only, 3) != statistics.bootstrap(values, mean_only, 4)


def test_the_sign_flip_test_by_hand():
    # Five prompts, all better by 1: only the two sign patterns "all" of 32 are as extreme: p = 2 / 32.
    assert statistics.sign_flip_test({"a": [1.0] * 5}, {"a": 1.0}) == pytest.approx(2 / 32, abs=0.01)
    assert statistics.sign_flip_test({"a": [0.0] * 5}, {"a": 1.0}) == 1.0
    assert statistics.sign_flip_test({"a": [1.0, -1.0]}, {"a": 1.0}) == 1.0


def test_holm_by_hand():
    corrected = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


# --- compare ------------------------------------------------------------------------------------------------------


def test_compare_is_paired(tmp_path):
    rows = [cups("counting", f"x{n}") for n in range(20)] + [cups("color_attr", f"y{n}") for n in range(20)]
    base = {row["prompt"].removeprefix("A photo of "): {"correct": int(i % 2)} for i, row in enumerate(rows)}
    # B turns five wrong ones of counting into right ones and changes nothing else.
    better = base | {f"x{n}": {"correct": 1} for n in range(0, 10, 2)}
    run("genevalpp", rows, dict(base), tmp_path, out="a")
    run("genevalpp", rows, dict(better), tmp_path, out="b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["score"]["difference"] == pytest.approx(0.125)  # (5/20 + 0) / 2
    assert found["groups"]["counting"]["difference"] == pytest.approx(0.25)
    assert found["groups"]["color_attr"] | {"p": 1.0} == found["groups"]["color_attr"]
    assert found["score"]["p"] == pytest.approx(2 / 32, abs=0.01)
    low, high = found["score"]["interval"]
    assert 0 < low < 0.125 < high < 0.25
    assert found["prompts"] == 40
    back = compare(tmp_path / "b", tmp_path / "a")
    assert back["score"]["difference"] == -found["score"]["difference"]


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    rows, table = [cups("counting", "a")], {"a": {"correct": 1}}
    run("genevalpp", rows, table, tmp_path, out="a")
    run("genevalpp", [*rows, cups("counting", "b")], table | {"b": {"correct": 1}}, tmp_path, out="b", count=2)
    with pytest.raises(ValueError, match="different prompt files"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="nothing was judged here"):
        compare(tmp_path / "a", tmp_path / "c")
    judge = Scripted(table, version=2)
    images = {"1": tmp_path / "pictures" / "1.png"}
    evaluate_images("genevalpp", images, judge, tmp_path / "d", rows=rows, options=JudgingOptions(probe=False))
    with pytest.raises(ValueError, match="were judged differently"):
        compare(tmp_path / "a", tmp_path / "d")
    assert compare(tmp_path / "a", tmp_path / "d", any_judge=True)["score"]["difference"] == 0
