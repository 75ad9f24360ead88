"""GenEval from judgements, for `evaluate.load`."""

import datasets
import evaluate
from datasets import Value

from .formula import TAGS, aggregates, sample_score

_DESCRIPTION = """GenEval measures whether a text-to-image model shows the objects, counts, colours and positions of a prompt.
Its score is the mean of the tags' shares of right images; the share over all images stands beside it.
"""

_INPUTS = """
Args:
    correct (`list` of `int`): 1 if the image shows what its prompt asks for, 0 if not, None if there is no judgement.
    tags (`list` of `str`): the tag of each image's prompt, such as "counting".
Returns:
    `score`, `overall_accuracy`, `coverage` (the scored share), and per tag `<tag>` accuracies.
Example:
    >>> metric = evaluate.load("geneval")
    >>> metric.compute(correct=[1, 0, 1], tags=["counting", "counting", "colors"])["score"]
    0.75
"""

_CITATION = """
@article{ghosh2023geneval,
    title={GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment},
    author={Ghosh, Dhruba and Hajishirzi, Hannaneh and Schmidt, Ludwig},
    journal={arXiv preprint arXiv:2310.11513},
    year={2023}
}
"""


class GenEvalMetric(evaluate.Metric):
    """Judgements in, scores out; images without a judgement lower the coverage, never the score."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"correct": Value("int32"), "tags": Value("string")}),
            homepage="https://arxiv.org/abs/2310.11513",
        )

    def _compute(self, correct, tags):  # pyright: ignore[reportIncompatibleMethodOverride]  # evaluate passes the features
        unknown = sorted(set(tags) - set(TAGS))
        if unknown:
            raise ValueError(f"tags: unknown are {', '.join(unknown)}; known are {', '.join(TAGS)}")
        values = [None if c is None else sample_score(c) for c in correct]
        scored = {}
        for group, value in zip(tags, values):
            if value is not None:
                scored.setdefault(group, []).append(value)
        if not scored:
            raise ValueError("there is no judgement to score")
        means = {group: sum(of) / len(of) for group, of in scored.items()}
        overall = aggregates({group: len(of) for group, of in scored.items()})
        results = {name: sum(w * means[group] for group, w in weights.items()) for name, weights in overall.items()}
        return results | {"coverage": sum(map(len, scored.values())) / len(values)} | means
