"""Scores of models and images: GenEval++, Imagine-Bench and OmniContext.

Three steps, each restartable and callable alone: [`generate`](generate.py) generates the images, [`judging`](judging.py) asks a judge about
every image and keeps each answer, [`score`](score.py) turns the answers into numbers with intervals and a report.
"""

from importlib import import_module

_EXPORTS = {
    "evaluate_images": "echo4o.evaluation.run",
    "compare": "echo4o.evaluation.compare",
    "get_benchmark": "echo4o.evaluation.benchmarks",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
