"""Imagine-Bench from judgements, for `evaluate.load`."""

import datasets
import evaluate
from datasets import Value

from .formula import GROUP_OF, aggregates, sample_score

_DESCRIPTION = """Imagine-Bench measures whether a text-to-image model fulfils a fantasy while objects stay recognisable.
The score of an image is 0.8 * min(fulfilment, identity) + 0.2 * aesthetics; groups are weighted 3 : 2 : 2 : 2.
"""

_INPUTS = """
Args:
    fantasy_fulfillment, identity_preservation, aesthetic_quality (`list` of `float`): the judge's scores from 0 to
        10, None if there is no judgement.
    types (`list` of `str`): the type of each prompt, such as "COLOR" or "Multi-Object".
Returns:
    `score` (weighted), `plain_mean`, `coverage` (the scored share), and the mean of each of the four groups.
Example:
    >>> metric = evaluate.load("imagine_bench")
    >>> metric.compute(fantasy_fulfillment=[10], identity_preservation=[5], aesthetic_quality=[10], types=["COLOR"])[
    ...     "score"
    ... ]
    6.0
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


class ImagineBenchMetric(evaluate.Metric):
    """Computes scores from judgements; images without a judgement lower the coverage, not the score."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "fantasy_fulfillment": Value("float64"),
                    "identity_preservation": Value("float64"),
                    "aesthetic_quality": Value("float64"),
                    "types": Value("string"),
                }
            ),
            homepage="https://arxiv.org/abs/2508.09987",
        )

    def _compute(self, fantasy_fulfillment, identity_preservation, aesthetic_quality, types):  # pyright: ignore[reportIncompatibleMethodOverride]  # evaluate passes the features
        unknown = sorted(set(types) - set(GROUP_OF))
        if unknown:
            raise ValueError(f"types: unknown are {', '.join(unknown)}; known are {', '.join(GROUP_OF)}")
        values = [
            None if None in scores else sample_score(*scores)
            for scores in zip(fantasy_fulfillment, identity_preservation, aesthetic_quality)
        ]
        scored = {}
        for group, value in zip([GROUP_OF[t] for t in types], values):
            if value is not None:
                scored.setdefault(group, []).append(value)
        if not scored:
            raise ValueError("there is no judgement to score")
        means = {group: sum(of) / len(of) for group, of in scored.items()}
        overall = aggregates({group: len(of) for group, of in scored.items()})
        results = {name: sum(w * means[group] for group, w in weights.items()) for name, weights in overall.items()}
        return results | {"coverage": sum(map(len, scored.values())) / len(values)} | means
