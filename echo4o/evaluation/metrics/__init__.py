"""Metrics for `evaluate.load(path)`; each folder is complete and can be published as a Space (`echo4o push NAME owner/NAME`)."""

from pathlib import Path

METRICS = ("genevalpp", "imagine_bench", "omnicontext", "geneval", "dpg")


def metric_path(name: str) -> str:
    """The folder to give to `evaluate.load`."""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; known are {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)
