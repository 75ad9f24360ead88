"""Dataset rows to texts, ids and pixels, with every random draw."""

from __future__ import annotations

from echo4o.modeling.omnigen2.image_processor_omnigen2 import reference_pixels
from echo4o.modeling.omnigen2.prompts_omnigen2 import DROPPED_SYSTEM_PROMPT, SYSTEM_PROMPT, prompt_text
from echo4o.training.backbones.omnigen2_objective import choose_dropped, without_prefix
from echo4o.training.backbones.omnigen2_recipe import OmniGen2Objective

from ..golden import GoldenFile
from ..report import Check
from .comparing import compare_masks
from .golden_set import GoldenSet

PREFIX_DROPOUT = 0.5  # of the original's code; the file lists the other two


def objective_of(settings) -> OmniGen2Objective:
    return OmniGen2Objective(
        max_input_pixels=tuple(settings["max_input_pixels"]),
        max_output_pixels=settings["max_output_pixels"],
        max_side_length=settings["max_side_length"],
    )


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    json = file.json
    check("system_prompt", SYSTEM_PROMPT, json["system_prompt"])
    check("system_prompt_drop", DROPPED_SYSTEM_PROMPT, json["system_prompt_drop"])
    rows, objective = json["rows"], objective_of(json["settings"])
    check("len", len(rows), json["len"])
    chances = (PREFIX_DROPOUT, json["prompt_dropout_prob"], json["ref_img_dropout_prob"])
    texts = []
    for index, item in enumerate(json["items"]):
        with check.trying(f"items.{index}"):
            item.note("seed")  # of the original's generator, whose draws are listed
            own, tensors = check.of(f"items.{index}"), file.tensors.under(f"item.{index}")
            texts.append(_check_item(golden, rows[item["row"]], item, objective, chances, tensors, own))
    for name in sorted({n.split(".")[1] for n in file.tensors if n.startswith("collate.")}, key=int):
        with check.trying(f"collate.{name}"):
            _check_collate(
                golden, [texts[i] for i in json["collate_items"]], int(name), file, check.of(f"collate.{name}")
            )
    with check.trying("too_many_references"):
        _check_many(json["too_many_references"], rows, objective, check.of("too_many_references"))


def _images(golden, names) -> list:
    names = [f"{'ref' if name[0] == 'r' else 'out'}{name[1:]}.png" for name in names]
    return [golden.picture(name) for name in names]


def _check_item(golden, row, item, objective, chances, tensors, check) -> str:
    draws = iter(item["draws"])
    is_text_to_image = "text_to_image" in row["task_type"] or "t2i" in row["task_type"]
    dropped = choose_dropped(lambda: next(draws), is_text_to_image, *chances)
    check("draws used", len(list(draws)), 0)
    instruction = without_prefix(row["instruction"]) if dropped.prefix else row["instruction"]
    text = prompt_text("", DROPPED_SYSTEM_PROMPT) if dropped.prompt else prompt_text(instruction)
    check("text", text, item["text"])
    references = _images(golden, row.get("input_images") or [])
    if dropped.references:
        references = []
    check("refs_used", len(references), item["refs_used"])
    stride, side = golden.pipe.latent_stride, objective.max_side_length
    limit = objective.input_pixels(len(references)) if references else 0
    pixels = [reference_pixels(image, limit, side, stride)[None] for image in references]
    shapes = item["input_shapes"]
    check("input_shapes", [list(x.shape) for x in pixels], [] if shapes is None else shapes)
    (image,) = _images(golden, [row["output_image"]])
    target = reference_pixels(image, objective.max_output_pixels, side, stride)[None]
    check("output_shape", list(target.shape), item["output_shape"])
    stored = [(f"input_u8.{index}", x) for index, x in enumerate(pixels)] + [("output_u8", target)]
    for name, got in stored:
        if name in tensors:  # the pixels of every row are stored once
            check(name, ((got * 0.5 + 0.5) * 255).round(), tensors[name])
    return text


def _check_collate(golden, texts, length, file, check) -> None:
    pipe = golden.pipe
    ids, mask = (file.tensors[f"collate.{length}.text_{name}"] for name in ("ids", "mask"))
    ours = [pipe.token_ids(text, length) for text in texts]
    compare_masks(check, "mask", [len(row) for row in ours], mask)
    for index, row in enumerate(ours):
        padded = row + [pipe.tokenizer.pad_token_id] * (ids.shape[1] - len(row))
        check(f"ids.{index}", padded, ids[index])


def _check_many(case, rows, objective, check) -> None:
    """The original replaces such a row by another one; ours uses the last of the limits."""
    case.note("seed", "other_rows_tried", "returned_instruction")
    references = len(rows[case["row"]]["input_images"])
    check("more references than limits", references > len(objective.max_input_pixels), True)
    check("limit", objective.input_pixels(references), objective.max_input_pixels[-1])
