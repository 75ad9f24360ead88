"""`pixels`: the detector of Shapes-4o, which reads its images exactly and costs nothing."""

import json
from typing import Any

from echo4o.endpoints.chat_endpoint import ChatRequest
from echo4o.endpoints.endpoint import CallFault, ModelAnswer
from echo4o.evaluation.judges.base import Judge, Question

# Identifies the detector in results and records: change it whenever the detector's verdicts or reasons change.
DETECTOR_FINGERPRINT = "7265445aca54e6e8"
_SIZES = {"larger": "large", "smaller": "small"}


class PixelsJudge(Judge):
    """Judges images of Shapes-4o by their pixels; knows only its shapes and colours."""

    name = "pixels"
    parallel = 1
    needs_probe = False

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name, "detector": DETECTOR_FINGERPRINT}

    async def ask(self, request: ChatRequest, key: str) -> ModelAnswer:
        from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
        from echo4o.modeling.common.image_files import open_image

        facts = request.facts if isinstance(request, Question) else {}
        if "include" not in facts:
            raise CallFault("wrong_benchmark", "the judge pixels can only check lists of objects", fatal=True)
        try:
            groups = [group_of(item) for item in facts["include"]]
        except ValueError as error:
            raise CallFault("unknown_object", f"the judge pixels knows Shapes-4o only: {error}", fatal=True) from None
        found = detect(open_image(request.images[-1].image.path))
        right, reasons = check(groups, found)
        reason = "; ".join(reasons) or "exactly the objects that were asked for"
        return ModelAnswer(json.dumps({"reason": reason, "correct": int(right)}))


def group_of(item: dict[str, Any]):
    """The detector's group of an entry of a checklist."""
    from echo4o.evaluation.benchmarks.shapes4o.scene import ShapeGroup

    size: Any = item.get("size")
    return ShapeGroup(
        item["class"], item.get("color"), item.get("count", 1), item.get("region"), _SIZES.get(size, size)
    )
