"""The `evaluate` modules: loaded by path, computed, combined, described."""

import evaluate
import pytest

from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.metrics import METRICS, metric_path


@pytest.fixture(scope="module")
def metrics():
    return {name: evaluate.load(metric_path(name)) for name in METRICS}


def test_genevalpp(metrics):
    found = metrics["genevalpp"].compute(
        correct=[1, 1, 0, 0, None], tags=["counting", "color_attr", "color_attr", "color_attr", "counting"]
    )
    assert found == {
        "score": pytest.approx(2 / 3),
        "overall_accuracy": 0.5,
        "coverage": 0.8,
        "counting": 1.0,
        "color_attr": pytest.approx(1 / 3),
    }


def test_geneval(metrics):
    found = metrics["geneval"].compute(correct=[1, 0, 1, None], tags=["counting", "counting", "colors", "colors"])
    assert found == {
        "score": 0.75,
        "overall_accuracy": pytest.approx(2 / 3),
        "coverage": 0.75,
        "counting": 0.5,
        "colors": 1.0,
    }


def test_dpg(metrics):
    found = metrics["dpg"].compute(
        prompts=["a", "a", "b", "b"],
        answers=[["no", "yes"], ["yes", "yes"], ["yes"], []],
        questions=[[1, 2], [1, 2], [3], []],
        dependencies=[[[0], [1]], [[0], [1]], [[0]], []],
    )
    assert found == {"score": 75.0, "coverage": 0.75}


def test_imagine_bench_in_batches(metrics):
    metric = metrics["imagine_bench"]
    names = ("fantasy_fulfillment", "identity_preservation", "aesthetic_quality", "types")
    metric.add_batch(**dict(zip(names, ([9.0, 10.0], [5.0, 10.0], [8.0, 10.0], ["COLOR", "SIZE"]))))
    metric.add_batch(**dict(zip(names, ([7.0], [8.0], [4.0], ["Multi-Object"]))))
    found = metric.compute()
    assert found["score"] == pytest.approx((3 * 7.8 + 2 * 6.4) / 5)
    assert found["plain_mean"] == pytest.approx((5.6 + 10 + 6.4) / 3)


def test_omnicontext(metrics):
    tasks = ["scene_object", "scene_object", "multi_object", "single_object"]
    found = metrics["omnicontext"].compute(
        prompt_following=[4, 1, 8, 10], subject_consistency=[9, 0, 8, 10], tasks=tasks
    )
    assert (found["score"], found["score_6_tasks"]) == (pytest.approx(7), pytest.approx(5.5))


def test_unknown_groups_and_empty_inputs_are_refused(metrics):
    with pytest.raises(ValueError, match="tags: unknown are colour"):
        metrics["genevalpp"].compute(correct=[1], tags=["colour"])
    with pytest.raises(ValueError, match="no judgement to score"):
        metrics["genevalpp"].compute(correct=[None], tags=["counting"])


@pytest.mark.long
def test_they_can_be_combined(metrics):
    both = evaluate.combine([metrics["genevalpp"], evaluate.load(metric_path("genevalpp"))])
    both.add_batch(correct=[1, 0], tags=["counting", "counting"])
    assert {value for name, value in both.compute().items() if name.endswith("score")} == {0.5}


@pytest.mark.parametrize("name", METRICS)
def test_they_describe_themselves(name, metrics):
    metric = metrics[name]
    assert metric.citation.lstrip().startswith("@article")
    for feature in metric.features:
        assert feature in metric.inputs_description
    assert metric.description and get_benchmark(name).title in metric.description
