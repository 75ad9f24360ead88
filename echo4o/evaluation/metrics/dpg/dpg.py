"""DPG-Bench from yes/no answers, for `evaluate.load`."""

import datasets
import evaluate
from datasets import List, Value

from .formula import SCALE, prompt_score, sample_score

_DESCRIPTION = """DPG-Bench measures how well images follow long prompts, by yes/no questions that depend on each other.
A question counts as no if a question that it depends on is no. The score is the mean over prompts, 0 to 100.
"""

_INPUTS = """
Args:
    prompts (`list` of `str`): for each image, the id of its prompt.
    answers (`list` of `list` of `str`): for each image, its answers in the order of the question table: "yes" or
        anything else. An empty list is an image without answers: it lowers the coverage.
    questions (`list` of `list` of `int`): the numbers of these questions.
    dependencies (`list` of `list` of `list` of `int`): for each question, the numbers of those it depends on; [0]: none.
Returns:
    `score` and `coverage` (the scored part of the images).
Example:
    >>> metric = evaluate.load("dpg")
    >>> metric.compute(prompts=["p"], answers=[["no", "yes"]], questions=[[1, 2]], dependencies=[[[0], [1]]])["score"]
    0.0
"""

_CITATION = """
@article{hu2024ella,
    title={ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment},
    author={Hu, Xiwei and Wang, Rui and Fang, Yixiao and Fu, Bin and Cheng, Pei and Yu, Gang},
    journal={arXiv preprint arXiv:2403.05135},
    year={2024}
}
"""


class DPGMetric(evaluate.Metric):
    """Answers in, a score out; images without answers lower the coverage, never the score."""

    def _info(self):
        features = {
            "prompts": Value("string"),
            "answers": List(Value("string")),
            "questions": List(Value("int32")),
            "dependencies": List(List(Value("int32"))),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            homepage="https://arxiv.org/abs/2403.05135",
        )

    def _compute(self, prompts, answers, questions, dependencies):  # pyright: ignore[reportIncompatibleMethodOverride]  # evaluate passes the features
        scores = {}
        for prompt, given, numbers, parents in zip(prompts, answers, questions, dependencies):
            if not given:
                continue
            if not len(given) == len(numbers) == len(parents):
                raise ValueError(
                    f"{prompt}: {len(given)} answers, {len(numbers)} questions, {len(parents)} dependencies"
                )
            yes = {number: answer == "yes" for number, answer in zip(numbers, given)}
            scores.setdefault(prompt, []).append(sample_score(dict(zip(numbers, parents)), yes))
        if not scores:
            raise ValueError("there is no answer to score")
        total = sum(prompt_score(images) for images in scores.values()) / len(scores)
        return {"score": SCALE * total, "coverage": sum(map(len, scores.values())) / len(prompts)}
