"""The quickstart scores itself through this code, and gets what its detector says."""

import json

import pytest
from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.rendering import render
from echo4o.evaluation.benchmarks.shapes4o.scene import lay_out
from echo4o.evaluation.judges.pixels import PixelsJudge
from echo4o.quickstart.generation import judge


def test_the_judge_keeps_its_identity():
    """Records of earlier versions stay valid while the detector gives the same results."""
    assert PixelsJudge().identity() == {"judge": "pixels", "detector": "7265445aca54e6e8"}


@pytest.mark.long
def test_all_held_out_prompts(tmp_path):
    prompts = held_out_prompts()
    # Every third picture is that of another prompt, every tenth is blank.
    pictures = [render(lay_out(prompts[(i + 7 * (i % 3 == 0)) % len(prompts)].groups)) for i in range(len(prompts))]
    pictures[::10] = [Image.new("RGB", (64, 64), "white")] * len(pictures[::10])
    reasons = judge(prompts, pictures, tmp_path / "evaluation")
    assert reasons == [check(prompt.groups, detect(picture))[1] for prompt, picture in zip(prompts, pictures)]
    result = json.loads((tmp_path / "evaluation" / "result.json").read_text())
    assert list(result["groups"]) == list(dict.fromkeys(prompt.tag for prompt in prompts))
    right = sum(not why for why in reasons)
    assert 0 < right < len(prompts)
    assert abs(result["also"]["overall_accuracy"] * len(prompts) - right) < 1e-9
    assert judge(prompts, pictures) == reasons


def test_a_second_run_starts_over(tmp_path):
    prompts = held_out_prompts()[:2]
    right = [render(lay_out(prompt.groups)) for prompt in prompts]
    assert judge(prompts, right, tmp_path) == [[], []]
    assert all(judge(prompts[:1], [Image.new("RGB", (64, 64), "white")], tmp_path)[0])
