"""`detector`: GenEval's own judge, a detector and a colour classifier that run in this process."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echo4o.common.files import read_json
from echo4o.common.json_lines import JsonLines, JsonLinesWriter
from echo4o.endpoints.cache import request_key
from echo4o.endpoints.chat_endpoint import ChatRequest, ImageFile
from echo4o.endpoints.endpoint import CallFault, ModelAnswer
from echo4o.evaluation.benchmarks.geneval import detector, detector_output, scoring
from echo4o.evaluation.benchmarks.geneval.convert_detector import SOURCE
from echo4o.evaluation.benchmarks.geneval.scoring import Detection, Thresholds
from echo4o.evaluation.folder import DETECTIONS
from echo4o.evaluation.judges.base import Judge, Question

_CPU_BATCH, _GPU_BATCH = 1, 8  # images per forward pass


@dataclass(frozen=True)
class _Request:
    """An image to detect objects in, and the classes whose colours are asked for."""

    image: ImageFile
    colored: tuple[str, ...]

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        return self.image.sha256, self.colored


class DetectorJudge(Judge):
    """Judges images of GenEval prompts by detected objects. Detections are kept in the folder of the evaluation, so
    that other thresholds need no second run of the detector.

    Args:
        folder: the detector, as `echo4o evaluate convert-detector` writes it.
        color_model: a folder or a Hub repository of a CLIP model.
        thresholds: what counts as an object.
        device: of torch, or "auto".
        batch: images per forward pass; None: 8 on a GPU, 1 elsewhere.
    """

    name = "detector"
    needs_probe = False
    benchmarks = ("geneval",)

    def __init__(
        self,
        folder: Path,
        color_model: str = detector.COLOR_MODEL,
        thresholds: Thresholds | None = None,
        device: str | None = None,
        batch: int | None = None,
    ):
        self.folder, self.color_model, self.thresholds = folder, color_model, thresholds or Thresholds()
        detector.require_detector(folder)
        _require_stored(self.thresholds)
        self.device = _device(device)
        self.parallel = batch or (_GPU_BATCH if self.device.startswith("cuda") else _CPU_BATCH)
        self._models: tuple[detector.ObjectDetector, detector.ColorClassifier] | None = None
        self._waiting: list[tuple[_Request, asyncio.Future]] = []
        self._running: asyncio.Task | None = None
        self._stored: dict[tuple[str, tuple[str, ...]], list[Detection]] = {}
        self._writer: JsonLinesWriter | None = None
        self._weights: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        return self._weights_identity() | {"thresholds": asdict(self.thresholds), "scoring": _code_hash(scoring)}

    def _weights_identity(self) -> dict[str, Any]:
        """What detections depend on beside the image."""
        if self._weights is None:
            about = read_json(self.folder / SOURCE) or {}
            self._weights = {
                "judge": self.name,
                "weights": _file_hash(self.folder / "model.safetensors"),
                "checkpoint": about.get("sha256"),
                "published_weights": bool(about.get("published")),
                "color_model": self.color_model,
                "color_revision": _revision(self.color_model),
                "dtype": "float32",
                "code": _code_hash(detector, detector_output),
            }
        return self._weights

    def keep_in(self, out: Path) -> None:
        """Read the stored detections of a folder, and append new ones there."""
        fingerprint = self._fingerprint()
        for line in JsonLines(out / DETECTIONS):
            if line["detector"] == fingerprint:
                key = line["image_sha256"], tuple(line["colors_of"])
                self._stored[key] = [_read_detection(stored) for stored in line["detections"]]
        self._writer = JsonLinesWriter(out / DETECTIONS)

    def _fingerprint(self) -> str:
        return request_key([self._weights_identity()])[:16]

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    async def ask(self, request: ChatRequest, key: str) -> ModelAnswer:
        facts = request.facts if isinstance(request, Question) else {}
        if "tag" not in facts:
            raise CallFault("wrong_benchmark", "the judge detector can only judge GenEval's prompts", fatal=True)
        colored = sorted({clause["class"] for clause in facts["include"] if "color" in clause})
        found = await self._detections(_Request(request.images[-1].image, tuple(colored)))
        try:
            decision = scoring.decide(facts, found, self.thresholds)
        except ValueError as error:
            raise CallFault("not_stored", str(error), fatal=True) from None
        reason = "; ".join(decision.reasons) or "every clause holds"
        return ModelAnswer(json.dumps({"reason": reason, "correct": int(decision.correct)}))

    async def _detections(self, request: _Request) -> list[Detection]:
        """Stored detections, or those of the next batch. One batch runs at a time, in a thread."""
        if request.key in self._stored:
            return self._stored[request.key]
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run_batches())
        return await future

    async def _run_batches(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # lets the other workers add their images to the batch
            batch, self._waiting = self._waiting[: self.parallel], self._waiting[self.parallel :]
            try:
                found = await asyncio.to_thread(self._detect, [request for request, _ in batch])
            except (ValueError, RuntimeError, OSError) as error:
                fault = CallFault("model_error", f"{self.name}: {error}", fatal=isinstance(error, ValueError))
                for _, future in batch:
                    future.set_exception(fault)
                continue
            for (request, future), detections in zip(batch, found):
                self._store(request, detections)
                future.set_result(detections)

    def _detect(self, requests: Sequence[_Request]) -> list[list[Detection]]:
        from echo4o.modeling.common.image_files import open_image

        if self._models is None:
            objects = detector.ObjectDetector(self.folder, self.device)
            self._models = objects, detector.ColorClassifier(self.color_model, self.device)
        objects, colors = self._models
        images = [open_image(request.image.path) for request in requests]
        found = objects.detect(images)
        return [
            detector.with_colors(image, raw, request.colored, colors)
            for request, image, raw in zip(requests, images, found)
        ]

    def _store(self, request: _Request, detections: list[Detection]) -> None:
        self._stored[request.key] = detections
        if self._writer is not None:
            self._writer.append(
                {
                    "image_sha256": request.image.sha256,
                    "detector": self._fingerprint(),
                    "colors_of": list(request.colored),
                    "detections": [_detection_row(detection) for detection in detections],
                }
            )


def _detection_row(detection: Detection) -> dict[str, Any]:
    row = {"class": detection.class_name, "box": list(detection.box), "score": detection.score}
    return row if detection.color_logits is None else row | {"color_logits": list(detection.color_logits)}


def _read_detection(row: dict[str, Any]) -> Detection:
    logits = row.get("color_logits")
    return Detection(row["class"], tuple(row["box"]), row["score"], tuple(logits) if logits else None)


def _require_stored(thresholds: Thresholds) -> None:
    for name, value in (("--threshold", thresholds.score), ("--counting-threshold", thresholds.counting_score)):
        if not detector.MIN_STORED_SCORE <= value <= 1:
            raise ValueError(
                f"{name} is {value}; it must be from {detector.MIN_STORED_SCORE} to 1 (less sure objects are not stored)"
            )
    if not 1 <= thresholds.max_objects <= Thresholds().max_objects:
        raise ValueError(f"--max-objects is {thresholds.max_objects}; it must be from 1 to {Thresholds().max_objects}")
    if not 0 < thresholds.max_overlap <= 1:
        raise ValueError(f"--max-overlap is {thresholds.max_overlap}; it must be above 0 and at most 1")


def _device(device: str | None) -> str:
    import torch

    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_hash(*modules) -> str:
    content = b"".join(Path(module.__file__).read_bytes() for module in modules)
    return hashlib.sha256(content).hexdigest()[:16]


def _revision(model: str) -> str:
    """The hash of a folder's weights, or the commit of a Hub repository."""
    weights = Path(model) / "model.safetensors"
    if weights.is_file():
        return f"sha256:{_file_hash(weights)}"
    from transformers import CLIPConfig

    try:
        config = CLIPConfig.from_pretrained(model)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the colour classifier {model} cannot be loaded ({reason}). Get it once (1.7 GB) with: hf download {model}; "
            "or pass its folder with --color-model"
        ) from None
    return str(getattr(config, "_commit_hash", None) or "unknown")
