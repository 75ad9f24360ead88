"""Calls of the pipeline with recorded noise, and what happens in them."""

from __future__ import annotations

from typing import Any

import torch

from echo4o.modeling.omnigen2.prompts_omnigen2 import prompt_text

from ..golden import Record, Tensors
from ..report import SINGLE, TRAJECTORY, Check
from .comparing import compare_images, compare_masks
from .golden_set import GoldenSet

# The original's argument -> ours, where a case gives it.
_ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "num_inference_steps",
    "text_guidance_scale": "guidance_scale",
    "image_guidance_scale": "image_guidance_scale",
    "cfg_range": "guidance_range",
    "num_images_per_prompt": "num_images_per_prompt",
    "max_pixels": "max_pixels",
    "max_input_image_side_length": "max_input_image_side_length",
    "max_sequence_length": "max_sequence_length",
    "align_res": "align_res",
}
# The original's own defaults, where our presets differ.
_DEFAULTS = {"image_guidance_scale": 1.0, "guidance_scale": 4.0}


class Recorder:
    """Wraps a pipeline during one call: hands it recorded noise, and notes predictions and latents."""

    def __init__(self, pipe, noises: list[torch.Tensor]):
        self.pipe, self.noises = pipe, list(noises)
        self.reference_latents: list[torch.Tensor] = []
        self.passes: list[tuple[float, list[int], list[torch.Tensor]]] = []  # time, target of each row, velocities
        self.latents: list[list[torch.Tensor]] = []
        self.decoded: list[torch.Tensor] = []

    def __enter__(self) -> Recorder:
        pipe = self.pipe
        pipe.draw_noise = lambda shape, generator: self.noises.pop(0).reshape(shape)
        pipe.encode_image = self._keep(pipe.encode_image, self.reference_latents)
        pipe.decode_latent = self._keep(pipe.decode_latent, self.decoded)
        self._hook = pipe.transformer.register_forward_hook(self._after_forward, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        self._hook.remove()
        for name in ("draw_noise", "encode_image", "decode_latent"):
            delattr(self.pipe, name)

    @staticmethod
    def _keep(function, results: list):
        def wrapper(*args):
            results.append(function(*args))
            return results[-1]

        return wrapper

    def _after_forward(self, module, args, kwargs, output) -> None:
        if "condition" in kwargs:
            layout = kwargs["condition"].layout
            self.passes.append((float(args[1][0]), layout.row_targets, list(output.sample)))

    def on_step_end(self, pipe, step, timestep, given) -> dict:
        self.latents.append(list(given["latents"]))
        return {}


def arguments_of(golden: GoldenSet, case: Record) -> dict[str, Any]:
    """Our arguments for a case."""
    arguments = dict(_DEFAULTS)
    arguments |= {ours: case[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in case}
    if case["hw"] is not None:
        arguments["height"], arguments["width"] = case["hw"]
    if case["refs"] is not None:
        arguments["image"] = [_references(golden, entry) for entry in case["refs"]]
    return arguments | {"prompt": case["prompt"]}


def _references(golden: GoldenSet, entry):
    if entry is None or isinstance(entry, int):
        return None if entry is None else golden.reference(entry)
    return [golden.reference(index) for index in entry]


def run(golden: GoldenSet, case: Record, tensors: Tensors, check: Check, scheduler=None) -> Recorder:
    """Run a case and check everything that all kinds of calls have. Returns what was recorded."""
    arguments = arguments_of(golden, case)
    prompts = [arguments["prompt"]] if isinstance(arguments["prompt"], str) else arguments["prompt"]
    copies = arguments.get("num_images_per_prompt", 1)
    rows = len(prompts) * copies
    # The original gives some rows of such a batch the mask of another prompt.
    compared = [r for r in range(rows) if len(prompts) == 1 or copies == 1 or r // copies == r % len(prompts)]
    pipe, before = golden.pipe, golden.pipe.scheduler
    noises = tensors.series("vae_noise") + list(tensors["noise"])
    pipe.scheduler = scheduler or before
    try:
        with Recorder(pipe, noises) as recorder:
            result = pipe(**arguments, callback_on_step_end=recorder.on_step_end)
    finally:
        pipe.scheduler = before
    check("rows", len(result.images), case["rows"])
    check("noises used", len(recorder.noises), 0)
    check("out_wh", [list(image.size) for image in result.images], case["out_wh"])
    _check_lengths(pipe, arguments, prompts, copies, tensors, check, compared)
    _check_references(recorder, tensors, check)
    _check_calls(recorder, case, check)
    wanted = tensors.series("latents")
    check("updates", len(recorder.latents), len(wanted))
    for step, (got, want) in enumerate(zip(recorder.latents, wanted, strict=False)):
        for row in compared:
            check(f"latents.{step}.{row}", got[row], want[row], TRAJECTORY)
    for row, image in enumerate(result.images):
        want = tensors[f"uint8.{row}"]
        if row in compared:
            compare_images(check, f"uint8.{row}", image, want)
    if len(compared) < rows:
        _check_alone(golden, case, arguments, prompts, copies, tensors, recorder, check)
    return recorder


def _check_lengths(pipe, arguments, prompts, copies, tensors, check, compared) -> None:
    limit = arguments.get("max_sequence_length")
    lengths = [len(pipe.token_ids(prompt_text(p), limit)) for p in prompts for _ in range(copies)]
    compare_masks(check, "text_mask", lengths, tensors["text_mask"], compared)
    is_guided = arguments["guidance_scale"] > 1
    check("negative_mask", is_guided, "negative_mask" in tensors)
    if is_guided and "negative_mask" in tensors:
        negative = arguments.get("negative_prompt") or ""
        negatives = negative if isinstance(negative, list) else [negative] * len(prompts)
        lengths = [len(pipe.token_ids(prompt_text(p), limit)) for p in negatives for _ in range(copies)]
        compare_masks(check, "negative_mask", lengths, tensors["negative_mask"], compared)


def _check_references(recorder, tensors, check) -> None:
    names = sorted(name for name in tensors if name.startswith("ref_latent."))
    check("references", len(recorder.reference_latents), len(names))
    for name, got in zip(names, recorder.reference_latents, strict=False):
        check(name, got, tensors[name], SINGLE)


def _check_calls(recorder, case, check) -> None:
    """Every pass evaluates the branches that the original evaluates one by one.

    The original has a third branch in batches without references, which equals the second.
    """
    has_references = case["refs"] is not None and any(entry is not None for entry in case["refs"])
    wanted = [[t, branch] for t, branch in case["calls"] if has_references or branch != "ref"]
    got = [
        [time, branch]
        for time, targets, _ in recorder.passes
        for branch in _branches(max(map(targets.count, targets)))
    ]
    check("calls", [branch for _, branch in got], [branch for _, branch in wanted])
    if len(got) == len(wanted):
        check("calls: times", [t for t, _ in got], [t for t, _ in wanted], 1e-6)


def _branches(count: int) -> list[str]:
    return {1: ["cond"], 2: ["cond", "uncond"], 3: ["cond", "ref", "uncond"]}[count]


def predictions(recorder: Recorder) -> list[tuple[str, torch.Tensor]]:
    """(branch, (B, C, h, w)) in the original's order of evaluation."""
    results = []
    for _, targets, velocities in recorder.passes:
        count = targets.count(targets[0])
        for position, branch in enumerate(_branches(count)):
            results.append((branch, torch.stack(velocities[position::count])))
    return results


def _check_alone(golden, case, arguments, prompts, copies, tensors, recorder, check) -> None:
    """Rows that the original computes wrongly equal calls of their prompt alone."""
    for row in range(len(prompts) * copies):
        prompt = row // copies
        own = {name: value for name, value in arguments.items() if name != "num_images_per_prompt"}
        own["prompt"] = prompts[prompt]
        for name in ("image", "negative_prompt"):
            if isinstance(own.get(name), list):
                own[name] = own[name][prompt]
        with Recorder(golden.pipe, [tensors["noise"][row]]) as alone:
            golden.pipe(**own, callback_on_step_end=alone.on_step_end)
        for step, (got, want) in enumerate(zip(alone.latents, recorder.latents, strict=True)):
            check(f"latents.{step}.{row}: alone", got[0], want[row], TRAJECTORY)
