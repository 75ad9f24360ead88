"""The judges behind one interface; [`make_judge`] makes one from its name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo4o.evaluation.benchmarks.geneval.scoring import Thresholds
from echo4o.evaluation.judges.base import Judge, Question

KINDS = "openai:MODEL, hf:MODEL, self, detector, pixels"
# A dated model, so that a score can be repeated while the endpoint offers it.
DEFAULT_JUDGE = "openai:gpt-4.1-2025-04-14"

__all__ = ["DEFAULT_JUDGE", "KINDS", "DetectorSettings", "Judge", "Question", "make_judge"]


@dataclass(frozen=True)
class DetectorSettings:
    """Arguments of [`DetectorJudge`](detector.py); a folder of None is `detector` in echo4o's cache folder."""

    folder: Path | None = None
    color_model: str = "openai/clip-vit-large-patch14"
    thresholds: Thresholds = field(default_factory=Thresholds)
    batch: int | None = None


def make_judge(
    name: str,
    model: str | None = None,
    load_pipeline: Callable[[str], Any] | None = None,
    device: str | None = None,
    max_tokens: int | None = None,
    detector: "DetectorSettings | None" = None,
    **options,
) -> Judge:
    """The judge of a name.

    Args:
        name: one of KINDS; `self` asks the evaluated model and needs `model`.
        load_pipeline: called with a model's name, returns its pipeline (for `self`).
        device: of a local model (for `hf`).
        max_tokens: the length limit of an answer.
        detector: of the judge `detector`; None: its defaults.
        options: of a hosted judge; see [`OpenAIJudge`](hosted.py).
    """
    kind, _, rest = name.partition(":")
    if kind == "openai":
        from echo4o.evaluation.judges.hosted import OpenAIJudge

        return OpenAIJudge(rest or DEFAULT_JUDGE.partition(":")[2], max_tokens=max_tokens, **options)
    if kind == "hf" and rest:
        from echo4o.evaluation.judges.local import TransformersJudge

        return TransformersJudge(rest, device=device, max_tokens=max_tokens)
    if kind == "self":
        from echo4o.evaluation.judges.local import PipelineJudge

        evaluated = rest or model
        if not evaluated:
            raise ValueError("--judge self asks the evaluated model: give --model, or --judge self:MODEL")
        return PipelineJudge(evaluated, load_pipeline, max_tokens=max_tokens)
    if kind == "detector":
        from echo4o.evaluation.benchmarks.prompt_files import cache_folder
        from echo4o.evaluation.judges.detector import DetectorJudge

        settings = detector or DetectorSettings()
        return DetectorJudge(
            settings.folder or cache_folder() / "detector",
            settings.color_model,
            settings.thresholds,
            device,
            settings.batch,
        )
    if kind == "pixels":
        from echo4o.evaluation.judges.pixels import PixelsJudge

        return PixelsJudge()
    raise ValueError(f"there is no judge {name!r}; the judges are {KINDS}")
