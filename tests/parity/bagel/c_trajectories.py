"""Whole pictures through the pipeline's public call, with the original's noise."""

from __future__ import annotations

import numpy as np
import torch

from echo4o.modeling.bagel.segments_bagel import patchify, unpatchify

from ..golden import Record, Tensors
from ..report import EXACT, PICTURE, SINGLE, TRAJECTORY, Check
from .golden_set import GoldenSet
from .recorder import Recorder, build_pipeline, check_prefills
from .sequences import golden_order


def check(golden: GoldenSet, transforms: Record, case: Record, tensors: Tensors, check: Check) -> None:
    hyper = case["hyper"]
    pipe = build_pipeline(golden, transforms, shift=hyper["timestep_shift"])
    prefills = tensors.under("vae_prefill")
    count = len({name.split(".")[0] for name in prefills})
    with Recorder(pipe, noises=[prefills[f"{i}.noise"] for i in range(count)]) as recorder:
        result = pipe(**_arguments(golden, pipe, case, tensors), callback_on_step_end=recorder.on_step_end)
    check("condition noises left over", len(recorder.noises), 0)
    for index in range(count):
        latent = recorder.condition_latents[index][None]
        check(f"vae_prefill.{index}.latent", latent, prefills[f"{index}.latent"], SINGLE)
    check("outputs", [*(result.texts or []), f"PIL image {result.images[0].size}"], case["outputs"])
    with check.trying("prefill_calls"):
        check_prefills(recorder.reads, case["prefill_calls_in_order"], check.of("prefill_calls"))
    with check.trying("contexts"):
        _check_contexts(pipe, recorder, case, check)
    _check_steps(pipe, recorder, tensors, check)
    latent, pixels = recorder.decoded[0]
    check("decode_in", latent[None], tensors["decode_in"], TRAJECTORY)
    check("decode_out", pixels[None], tensors["decode_out"], TRAJECTORY)
    check("image_uint8", np.array(result.images[0]), tensors["image_uint8"], PICTURE)


def _arguments(golden, pipe, case, tensors) -> dict:
    """The public call that does what the original was asked to."""
    hyper = case["hyper"]
    items = [golden.picture(x) if golden.is_picture(x) else x for x in case["inputs"]]
    pictures = [item for item in items if not isinstance(item, str)]
    if isinstance(items[-1], str) and len(pictures) == len(items) - 1:
        arguments = {"prompt": items[-1], "image": pictures or None}
    else:
        arguments = {"inputs": items}
    hyper.note("image_shapes")  # with references, the last one decides the size, whatever is asked for
    if "image_shapes" in hyper and not pictures:
        arguments["height"], arguments["width"] = hyper["image_shapes"]
    if hyper.get("think", False):
        # The original counts the start token and leaves out the last token that it chose.
        arguments |= {"think": True, "max_think_tokens": hyper["max_think_token_n"] - 1}
    for ours, theirs in (("do_sample", "do_sample"), ("temperature", "text_temperature")):
        if theirs in hyper:
            arguments[ours] = hyper[theirs]
    patch = pipe.transformer.config.latent_patch_size
    _, _, height, width = tensors["decode_in"].shape
    # On its own the image branch does nothing in the original; ours refuses it.
    image_scale = hyper["cfg_img_scale"] if hyper["cfg_text_scale"] > 1 else 1.0
    if image_scale > 1 and not pictures:
        # A caller who asks for it without a picture is refused, but a checkpoint may be configured so.
        task = pipe.config.presets["text_to_image"] | {"image_guidance_scale": image_scale}
        pipe.register_to_config(presets=pipe.config.presets | {"text_to_image": task})
        image_scale = None
    return arguments | {
        "num_inference_steps": hyper["num_timesteps"] - 1,
        "guidance_scale": hyper["cfg_text_scale"],
        "image_guidance_scale": image_scale,
        "guidance_interval": tuple(hyper["cfg_interval"]),
        "guidance_renorm": hyper["cfg_renorm_type"],
        "guidance_renorm_min": hyper["cfg_renorm_min"],
        "latents": unpatchify(tensors["init_noise"], (height // patch, width // patch), patch)[None],
    }


def _check_contexts(pipe, recorder: Recorder, case, check) -> None:
    """Which branches each step evaluates, and what each of them sees."""
    text_scales, image_scales = case["step_cfg_text_scale"], case["step_cfg_img_scale"]
    want = [1 + (s > 1) + (s > 1 and i > 1) for s, i in zip(text_scales, image_scales)]
    check("branches of each step", [len(rows) for rows in recorder.steps], want)
    hyper, t = case["hyper"], torch.tensor(recorder.times)
    inside = (t > hyper["cfg_interval"][0]) & (t <= hyper["cfg_interval"][1])
    for name, scales in (("cfg_text_scale", text_scales), ("cfg_img_scale", image_scales)):
        check(f"step_{name}", torch.where(inside, hyper[name], 1.0), scales)

    rows = max(recorder.steps, key=len)  # a step with all branches that are ever evaluated
    texts = [read for read in recorder.reads if read.cache == recorder.reads[0].cache and read.kind == "text"]
    if hyper.get("think", False):
        texts.pop()  # the plan is part of the condition alone
    branches = {"cond": rows[0], "cfg_text": rows[1] if len(rows) > 1 else None}
    branches["cfg_img"] = rows[2] if len(rows) > 2 else None
    for name, row in branches.items():
        length, position = case[f"{name}_kv_len"], case[f"{name}_image_rope_position"]
        if row is not None:
            check(f"{name}_kv_len", row.context, length)
            check(f"{name}_image_rope_position", row.position, position)
        elif name == "cfg_img":  # not evaluated; it would have been the texts
            check("cfg_img_kv_len (not built)", sum(read.after - read.before for read in texts), length)
            check("cfg_img_image_rope_position (not built)", sum(len(read.positions) for read in texts), position)
        else:  # without guidance there is no text-free branch either: a prefix of the condition
            check(
                "cfg_text_kv_len (not built)", length in {r.before for r in recorder.reads} | {rows[0].context}, True
            )

    sequence = rows[0].sequence
    first = sequence.spans[0][0]
    check("packed_vae_position_ids", sequence.latent_position_ids[first.gen], case["packed_vae_position_ids"])
    check("query_text_ids", sequence.input_ids[first.und], case["query_text_ids"])
    und = len(sequence.input_ids)
    size = first.gen.stop - first.gen.start + first.und.stop - first.und.start
    places = (golden_order(sequence)[:size] < und).nonzero()[:, 0]
    check("query_text_indexes", places, case["query_text_indexes"])


def _check_steps(pipe, recorder: Recorder, tensors, check) -> None:
    patch = pipe.transformer.config.latent_patch_size
    tokens = [tensors["init_noise"], *(patchify(latent, patch) for latent in recorder.latents)]
    check("step_t", recorder.times, tensors["step_t"], SINGLE)
    check("step_x_t", torch.stack(tokens[:-1]), tensors["step_x_t"], TRAJECTORY)
    check("step_v_t", torch.stack(recorder.velocities), tensors["step_v_t"], TRAJECTORY)
    check("final_latent_tokens", tokens[-1], tensors["final_latent_tokens"], TRAJECTORY)
    check("step_x_t begins with init_noise", tensors["step_x_t"][0], tensors["init_noise"], EXACT)
