"""Evaluates models and images with GenEval++, Imagine-Bench, OmniContext and other benchmarks.

An evaluation has three steps, which can run alone and resume: [`generate`](generate.py) generates the images,
[`judging`](judging.py) asks a judge about every image and keeps each answer, and [`score`](score.py) computes scores with
intervals and a report.
"""

from importlib import import_module

_EXPORTS = {
    "evaluate_images": "echo4o.evaluation.run",
    "compare": "echo4o.evaluation.compare",
    "get_benchmark": "echo4o.evaluation.benchmarks",
}

__all__ = ["compare", "evaluate_images", "get_benchmark"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
