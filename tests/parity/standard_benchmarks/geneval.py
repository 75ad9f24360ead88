"""GenEval: decisions, reasons, summaries, positions, overlaps, crops and post-processing, all exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from echo4o.evaluation.benchmarks.geneval import detector_output, scoring

from ..golden import GoldenFile, Record
from ..report import Check
from .golden_set import GoldenSet

# The original's names of its constants.
OPTIONS = {
    "THRESHOLD": "score",
    "COUNTING_THRESHOLD": "counting_score",
    "MAX_OBJECTS": "max_objects",
    "NMS_THRESHOLD": "max_overlap",
    "POSITION_THRESHOLD": "position",
}
# Of a score in float32, whose last bits depend on the CPU (sigmoid, order of sums); two units in the last place.
SCORE = 2.4e-7
MIN_SCORE = 0.01  # detections below are not in the golden file


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    file.json.note("source", "ran_with")
    check_constants(file.json["constants"], check.of("constants"))
    parts = {
        "cases": check_case,
        "summaries": check_summary,
        "relative_position": check_relation,
        "compute_iou": check_iou,
        "crops": check_crop,
        "detector_postprocess": check_postprocess,
    }
    for part, check_one in parts.items():
        for number, case in enumerate(file.json[part]):
            at = check.of(part).of(case["id"] if "id" in case else number)
            with at.trying():
                check_one(case, at)
    for name, texts in file.json["color_texts"].items():
        got = [list(detector_output.color_texts(name, color)) for color in scoring.COLORS]
        check.of("color_texts")(name, got, texts)


def check_constants(constants: Record, check: Check) -> None:
    ours = scoring.Thresholds()
    for name, value in {
        "threshold": ours.score,
        "counting_threshold": ours.counting_score,
        "max_objects": ours.max_objects,
        "max_overlap": ours.max_overlap,
        "position_threshold": ours.position,
        "colors": list(scoring.COLORS),
        "background": list(detector_output.BACKGROUND),
    }.items():
        check(name, value, constants[name])


def detection_of(record: Record) -> scoring.Detection:
    """A detection; a colour that is only named gets the highest logit, one that is absent leaves all equal."""
    logits = record.get("color_logits", [0.0] * len(scoring.COLORS))
    if "color" in record:
        logits = [float(color == record["color"]) for color in scoring.COLORS]
    return scoring.Detection(record["class"], tuple(record["box"]), record["score"], tuple(logits))


def check_case(case: Record, check: Check) -> None:
    metadata, expected = case["metadata"].plain(), case["expected"]
    options = {OPTIONS[name]: value for name, value in case.get("options", Record({})).items()}
    detections = [detection_of(record) for record in case["detections"]]
    decision = scoring.decide(metadata, detections, scoring.Thresholds(**options))
    reason = "\n".join(decision.reasons)
    allowed = [expected["reason"], expected.get("reason_also", expected["reason"])]
    check("correct", decision.correct, expected["correct"])
    check("reason", reason if reason not in allowed else allowed[0], allowed[0])
    # The original names two relations in either order: both texts must have the same words.
    check("reason_also", sorted(allowed[1].split()), sorted(allowed[0].split()))
    check("kept", decision.kept, expected["kept"].plain())
    check("classified", decision.classified, expected.get("classified", 0))


def check_summary(case: Record, check: Check) -> None:
    images = [(image["metadata"].plain(), image["correct"]) for image in case["images"]]
    summary = scoring.summarize([(metadata["tag"], repr(metadata), correct) for metadata, correct in images])
    tasks = [
        {"tag": tag, "percent": round(100 * right / total, 2), "correct": right, "images": total}
        for tag, (right, total) in summary.tags.items()
    ]
    got = {
        "total_images": summary.images[1],
        "total_prompts": summary.prompts[1],
        "percent_correct_images": round(100 * summary.images[0] / summary.images[1], 2),
        "percent_correct_prompts": round(100 * summary.prompts[0] / summary.prompts[1], 2),
        "tasks": tasks,
        "overall": round(summary.overall, 5),
    }
    check("numbers", sorted(case["expected"]), sorted(got))
    for name, want in case["expected"].items():
        check(name, got[name], [task.plain() for task in want] if name == "tasks" else want)


def check_relation(case: Record, check: Check) -> None:
    threshold = case.get("position_threshold", scoring.Thresholds().position)
    got = scoring.relative_position(case["a"], case["b"], threshold)
    check("", sorted(got), sorted(case["expected"]))


def check_iou(case: Record, check: Check) -> None:
    check("", scoring.iou(case["a"], case["b"]), case["expected"])


def check_crop(case: Record, check: Check) -> None:
    options = case.get("options", Record({}))
    background: Any = options.get("bgcolor", detector_output.BACKGROUND)
    if isinstance(background, str):
        background = None if background == "original" else ImageColor.getrgb(background)
    mask = None if case["mask"] is None else np.array(case["mask"], bool)
    image = Image.fromarray(np.array(case["image"], np.uint8))
    got = detector_output.crop_object(image, case["box"], mask, background, options.get("crop", "1") == "1")
    check("size", list(got.size), case["expected_size"])
    check("pixels", np.asarray(got), np.array(case["expected"]).reshape(got.height, got.width, 3))


def check_postprocess(case: Record, check: Check) -> None:
    listed = case["class_logits"]
    logits = torch.full((listed["queries"], listed["classes"]), listed["default"])
    for query, label, value in listed["set"]:
        logits[query, label] = value
    sizes = (case["padded_size"], case["resized_size"], case["original_size"])
    found = detector_output.read_output(logits, torch.tensor(case["mask_logits"]), *sizes, min_score=-1.0)
    check("returned", len(found), case["returned"])
    best = sorted((one for one in found if one.score > MIN_SCORE), key=lambda one: -one.score)
    got = [(one.label, one.score, list(one.box), int(one.mask.sum())) for one in best]
    want = [(one["label"], one["score"], one["box"], one["mask_pixels"]) for one in case["expected"]]
    check("detections", [one[0] for one in got], [one[0] for one in want])
    for number, (ours, theirs) in enumerate(zip(got, want)):
        check(f"{number}.score", ours[1], theirs[1], SCORE)
        check(f"{number}.box", ours[2], theirs[2])
        check(f"{number}.mask_pixels", ours[3], theirs[3])
