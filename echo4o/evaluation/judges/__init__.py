"""The judges behind one small interface; `make_judge` reads what the command line says."""

from echo4o.evaluation.judges.base import Answer, Judge, JudgeFault, Question, Shown

KINDS = "openai:MODEL, hf:MODEL, self, pixels"
# Dated, so that a score can be repeated. Whether it still exists when you read this is for the endpoint to say.
DEFAULT_JUDGE = "openai:gpt-4.1-2025-04-14"

__all__ = ["DEFAULT_JUDGE", "KINDS", "Answer", "Judge", "JudgeFault", "Question", "Shown", "make_judge"]


def make_judge(name: str, model: str | None = None, load_pipeline=None, **options) -> Judge:
    """The judge of a name.

    Args:
        name: one of KINDS; `self` asks the evaluated model and needs `model`.
        load_pipeline: called with a model's name, returns its pipeline (for `self`).
        options: of the endpoint ([`OpenAIJudge`]), or of the local model.
    """
    kind, _, rest = name.partition(":")
    if kind == "openai":
        from echo4o.evaluation.judges.endpoint import OpenAIJudge

        return OpenAIJudge(rest or DEFAULT_JUDGE.partition(":")[2], **options)
    if kind == "hf" and rest:
        from echo4o.evaluation.judges.local import TransformersJudge

        return TransformersJudge(rest, device=options.get("device"), max_tokens=options.get("max_tokens"))
    if kind == "self":
        from echo4o.evaluation.judges.local import PipelineJudge

        if not (rest or model):
            raise ValueError("--judge self asks the evaluated model: give --model, or --judge self:MODEL")
        return PipelineJudge(rest or model, load_pipeline, max_tokens=options.get("max_tokens"))
    if kind == "pixels":
        from echo4o.evaluation.judges.pixels import PixelsJudge

        return PixelsJudge()
    raise ValueError(f"there is no judge {name!r}; known are {KINDS}")
