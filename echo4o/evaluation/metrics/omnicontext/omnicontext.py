"""OmniContext from judgements, for `evaluate.load`."""

import datasets
import evaluate
from datasets import Value

from .formula import TASKS, aggregates, sample_score

_DESCRIPTION = """OmniContext measures images generated from reference images: whether they follow the instruction and keep the subjects.
The score of an image is sqrt(prompt following * subject consistency); the score is the mean of the tasks' means.
"""

_INPUTS = """
Args:
    prompt_following, subject_consistency (`list` of `float`): the judge's scores from 0 to 10, None if there is no
        judgement.
    tasks (`list` of `str`): the task of each prompt, such as "scene_character".
Returns:
    `score` (over all tasks), `score_6_tasks` (without the single ones), `coverage`, and the mean of each task.
Example:
    >>> metric = evaluate.load("omnicontext")
    >>> metric.compute(prompt_following=[4], subject_consistency=[9], tasks=["multi_object"])["score"]
    6.0
"""

_CITATION = """
@article{wu2025omnigen2,
    title={OmniGen2: Exploration to Advanced Multimodal Generation},
    author={Wu, Chenyuan and others},
    journal={arXiv preprint arXiv:2506.18871},
    year={2025}
}
"""


class OmniContextMetric(evaluate.Metric):
    """Computes scores from judgements; images without a judgement lower the coverage, not the score."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "prompt_following": Value("float64"),
                    "subject_consistency": Value("float64"),
                    "tasks": Value("string"),
                }
            ),
            homepage="https://arxiv.org/abs/2506.18871",
        )

    def _compute(self, prompt_following, subject_consistency, tasks):  # pyright: ignore[reportIncompatibleMethodOverride]  # evaluate passes the features
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks: unknown are {', '.join(unknown)}; known are {', '.join(TASKS)}")
        values = [
            None if None in scores else sample_score(*scores) for scores in zip(prompt_following, subject_consistency)
        ]
        scored = {}
        for group, value in zip(tasks, values):
            if value is not None:
                scored.setdefault(group, []).append(value)
        if not scored:
            raise ValueError("there is no judgement to score")
        means = {group: sum(of) / len(of) for group, of in scored.items()}
        overall = aggregates({group: len(of) for group, of in scored.items()})
        results = {name: sum(w * means[group] for group, w in weights.items()) for name, weights in overall.items()}
        return results | {"coverage": sum(map(len, scored.values())) / len(values)} | means
