"""The `evaluate` modules: loaded by path, computed, combined, described, published."""

import json
import textwrap

import evaluate
import pytest

from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.metrics import METRICS, metric_path, publish
from tests.hub import LoopbackHub, run_script


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


def test_publishing_refuses_another_name():
    with pytest.raises(ValueError, match="must be called genevalpp"):
        publish("genevalpp", "ns/other")


@pytest.mark.slow
def test_a_published_metric_is_a_complete_space(tmp_path):
    with LoopbackHub() as hub:
        script = textwrap.dedent("""
            from echo4o.evaluation.metrics import publish

            publish("genevalpp", "ns/genevalpp")
            publish("genevalpp", "ns/genevalpp")
            """)
        run_script(script, env=hub.environment(tmp_path))
        (repo,) = [repo for repo in hub.repos.values() if repo.name == "ns/genevalpp"]
        assert repo.kind == "spaces" and f"v{evaluate.__version__}" in repo.tags
        folder = tmp_path / "genevalpp"
        folder.mkdir()
        for name, file in repo.files.items():
            (folder / name).write_bytes(file.data)
    assert {"genevalpp.py", "formula.py", "app.py", "README.md", "requirements.txt"} <= set(repo.files)
    assert "sdk: gradio" in (folder / "README.md").read_text()
    # It needs nothing of this package.
    code = (folder / "genevalpp.py").read_text() + (folder / "formula.py").read_text()
    assert "from echo4o" not in code and "import echo4o" not in code
    found = evaluate.load(str(folder)).compute(correct=[1], tags=["counting"])
    assert json.loads(json.dumps(found))["score"] == 1.0
