"""A cheap judge, audited by a dear one: the estimator's coverage by simulation, and a run with two judges."""

import json

import numpy as np
import pytest

from echo4o.evaluation.audit_estimate import AuditGroup, estimate, sample_prompts, tuned_weight
from echo4o.testing.openai_server import OpenAIServer
from tests.evaluation.conftest import even_is_correct, write_pictures, write_prompts
from tests.evaluation.test_command import run, words

# Prompts per group of GenEval++ and GenEval.
SIZES = {280: [40] * 7, 553: [80, 99, 80, 94, 100, 100]}
DRAWS, POPULATIONS = 1000, 50
FIRST_JUDGES = {
    "good": lambda second, rng: np.where(rng.random(second.shape) < 0.95, second, 1 - second),
    "bad": lambda second, rng: np.where(rng.random(second.shape) < 0.6, second, rng.random(second.shape) < 0.9),
    "useless": lambda second, rng: (rng.random(second.shape) < 0.5).astype(float),
}


def simulate(total: int, first_judge, share: float, images: int, seed: int) -> dict[str, np.ndarray]:
    """Draw audits of simulated runs: whether the interval covers the second judge's score, and widths."""
    rng = np.random.default_rng(seed)
    names = [f"group{number}" for number in range(len(SIZES[total]))]
    weights = dict.fromkeys(names, 1 / len(names))
    covers, widths, alone = [], [], []
    for _ in range(POPULATIONS):
        first, second = {}, {}
        for name, size in zip(names, SIZES[total]):
            ease = rng.beta(2, 1)  # of the group
            of_prompts = rng.beta(3 * ease, 3 * (1 - ease), (size, 1))
            right = (rng.random((size, images)) < of_prompts).astype(float)
            second[name], first[name] = right.mean(axis=1), first_judge(right, rng).astype(float).mean(axis=1)
        truth = np.mean([of.mean() for of in second.values()])
        ids = {name: [f"{name}/{number}" for number in range(len(of))] for name, of in second.items()}
        for _ in range(DRAWS // POPULATIONS):
            chosen = sample_prompts(ids, share, int(rng.integers(1 << 31)))
            groups = {}
            for name in names:
                places = np.array([int(one.split("/")[1]) for one in chosen if one.startswith(f"{name}/")])
                groups[name] = AuditGroup(first[name], places, second[name][places])
            found = estimate(groups, weights, 1.0, images)
            audit_alone = estimate(groups, weights, 1.0, images, 0.0)
            covers.append(found.interval[0] <= truth <= found.interval[1])
            widths.append(found.interval[1] - found.interval[0])
            alone.append(audit_alone.interval[1] - audit_alone.interval[0])
    return {"covers": np.array(covers), "widths": np.array(widths), "alone": np.array(alone)}


@pytest.mark.long
@pytest.mark.parametrize("total", SIZES)
@pytest.mark.parametrize("judge", FIRST_JUDGES)
def test_the_interval_covers_the_second_judges_score(total, judge):
    for images, share in ((1, 0.1), (4, 0.1), (1, 0.3)):
        found = simulate(total, FIRST_JUDGES[judge], share, images, seed=total + images)
        assert found["covers"].mean() >= 0.93, (images, share)
        assert found["widths"].mean() <= 1.02 * found["alone"].mean()
        if judge == "good" and share == 0.3:  # a good first judge is worth half of the interval
            assert found["widths"].mean() < 0.6 * found["alone"].mean()


def test_a_full_audit_has_no_error_and_a_perfect_judge_has_the_weight_one():
    rng = np.random.default_rng(0)
    second = rng.integers(0, 2, 40).astype(float)
    group = {"a": AuditGroup(rng.random(40), np.arange(40), second)}
    full = estimate(group, {"a": 1.0}, 1.0)
    assert full.value == pytest.approx(second.mean()) and np.ptp(full.interval) == pytest.approx(0)
    places = np.arange(0, 40, 4)
    assert tuned_weight({"a": AuditGroup(second, places, second[places])}, {"a": 1.0}) == pytest.approx(1.0)
    assert tuned_weight({"a": AuditGroup(1 - second, places, second[places])}, {"a": 1.0}) == 0.0


def test_a_sample_without_a_disagreement_is_not_certain():
    second = np.tile([0.0, 1.0], 50)
    places = np.arange(10)
    low, high = estimate({"a": AuditGroup(second, places, second[places])}, {"a": 1.0}, 1.0).interval
    assert high - low > 0.2


def test_a_larger_share_extends_the_sample():
    groups = {"a": [f"a{n}" for n in range(40)], "b": [f"b{n}" for n in range(7)], "c": ["c0"]}
    small, large = (sample_prompts(groups, share, 3) for share in (0.1, 0.3))
    assert set(small) < set(large) and len(small) == 4 + 2 + 1 and len(large) == 12 + 3 + 1
    assert sample_prompts(groups, 0.1, 3) == small != sample_prompts(groups, 0.1, 4)


@pytest.fixture
def dear():
    """The second judge: nothing divisible by four is right."""
    with OpenAIServer() as server:
        server.verdict = lambda call: {"reason": "strict", "correct": int(_number(call) % 4 == 2)}
        yield server


def _number(call) -> int:
    return call.open_image().getpixel((0, 0))[0]


@pytest.mark.long
def test_a_run_with_an_audit(server, dear, tmp_path):
    prompts, pictures, out = write_prompts(tmp_path / "p.jsonl", 80), write_pictures(tmp_path / "pictures", 80), None
    server.verdict = even_is_correct
    out = tmp_path / "out"
    given = ["genevalpp", "--prompts", prompts, "--images", pictures, "--out", out]
    given += ["--judge", "openai:cheap", "--judge-url", server.url, "--audit", "openai:dear", "--audit-url", dear.url]
    given += ["--audit-share", 0.25, "--audit-price", "1000,0", "--price", "0,0"]
    done = run(*given)
    assert done.exit_code == 0, done.output
    assert (len(server.judged), len(dear.judged)) == (80, 20)
    found = json.loads((out / "result.json").read_text())
    audit = found["audit"]
    assert found["score"] == 0.5 and audit["score"]["first_judge"] == 0.5
    low, high = audit["score"]["interval"]
    assert low <= 0.25 <= high and audit["score"]["estimate"] == pytest.approx(0.25, abs=0.1)
    assert (audit["prompts"], audit["of"]) == (20, 80)
    assert {of["interval"] for of in audit["groups"].values()} == {None}  # 10 audited prompts each
    assert audit["agreement"]["correct"]["values"] == 20
    costs = json.loads((out / "audit" / "costs.json").read_text())
    assert costs["calls_saved"] == 3 * costs["calls"] and costs["usd_saved"] == pytest.approx(3 * costs["usd"])
    assert "score that openai:dear would give" in words(done.stderr) and "USD" in words(done.stderr)
    assert "openai:dear would give" in (out / "report.html").read_text()
    # Again: nothing is asked. A larger share asks for the rest only.
    assert run(*given).exit_code == 0 and len(dear.judged) == 20
    assert json.loads((out / "result.json").read_text()) == found
    given[given.index("--audit-share") + 1] = 1
    assert run(*given).exit_code == 0 and len(dear.judged) == 80
    whole = json.loads((out / "result.json").read_text())["audit"]["score"]
    assert whole["estimate"] == pytest.approx(0.25) and whole["interval"] == pytest.approx([0.25, 0.25])


def test_a_share_must_be_a_share(server, prompts, pictures, tmp_path):
    given = ["genevalpp", "--prompts", prompts, "--images", pictures, "--out", tmp_path / "out"]
    given += ["--judge", "openai:cheap", "--judge-url", server.url, "--audit", "openai:dear", "--audit-share", 2]
    done = run(*given)
    assert done.exit_code == 2 and "--audit-share is 2" in words(done.stderr) and not server.calls


def test_the_budget_holds_for_the_audit(server, dear, tmp_path):
    prompts, pictures = write_prompts(tmp_path / "p.jsonl", 8), write_pictures(tmp_path / "pictures", 8)
    given = ["genevalpp", "--prompts", prompts, "--images", pictures, "--out", tmp_path / "out", "--budget", 1]
    given += ["--judge", "openai:cheap", "--judge-url", server.url, "--audit", "openai:dear", "--audit-url", dear.url]
    done = run(*given, "--price", "0,0", "--audit-price", "1000,1000", "--audit-share", 0.5)
    assert done.exit_code != 0 and "the 4 open judgements are expected to cost about" in words(done.stderr)
    assert len(server.judged) == 8 and not dear.calls
