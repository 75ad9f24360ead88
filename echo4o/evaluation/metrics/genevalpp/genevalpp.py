"""GenEval++ from judgements, for `evaluate.load`."""

import datasets
import evaluate
from datasets import Value

from .formula import TAGS, aggregates, sample_score

_DESCRIPTION = """GenEval++ measures whether a text-to-image model follows instructions about colours, counts, places and sizes.
The score is the mean accuracy of the tags; `overall_accuracy` is the accuracy over all images.
"""

_INPUTS = """
Args:
    correct (`list` of `int`): 1 if the judge found every expectation met, 0 if not, None if there is no judgement.
    tags (`list` of `str`): the tag of each prompt, such as "counting".
Returns:
    `score`, `overall_accuracy`, `coverage` (the scored share), and per tag `<tag>` accuracies.
Example:
    >>> metric = evaluate.load("genevalpp")
    >>> metric.compute(correct=[1, 0, 1], tags=["counting", "counting", "color_attr"])["score"]
    0.75
"""

_CITATION = """
@article{ye2025echo4o,
    title={Echo-4o: Harnessing the Power of GPT-4o Synthetic Images for Improved Image Generation},
    author={Ye, Junyan and Jiang, Dongzhi and Wang, Zihao and Zhu, Leqi and Hu, Zhenghao and Huang, Zilong and He, Jun
        and Yan, Zhiyuan and Yu, Jinghua and Li, Hongsheng and He, Conghui and Li, Weijia},
    journal={arXiv preprint arXiv:2508.09987},
    year={2025}
}
"""


class GenEvalPPMetric(evaluate.Metric):
    """Computes scores from judgements; images without a judgement lower the coverage, not the score."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"correct": Value("int32"), "tags": Value("string")}),
            homepage="https://arxiv.org/abs/2508.09987",
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
