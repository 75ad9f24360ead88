"""The cache after every prefill of a chain, and the velocity of every guidance branch and combination after it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from echo4o.modeling.bagel.denoising_bagel import GuidanceBranch, NoisyImage, pack_branches, predict_velocity
from echo4o.modeling.bagel.guidance_bagel import Guidance
from echo4o.modeling.bagel.segments_bagel import Segment, unpatchify
from echo4o.modeling.common.image_files import to_rgb
from echo4o.modeling.common.images import to_pixels

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .golden_set import GoldenSet
from .recorder import build_pipeline
from .sequences import in_golden_order, segments_and_positions

OFF = Guidance(scale=1.0, image_scale=1.0, interval=(0.0, 1.0), renorm="global")


@dataclass
class Chain:
    """A context as it grows, and the one that reads its texts alone."""

    cache: object
    texts: object
    order: list[int] = field(default_factory=list)  # golden place -> place in our cache
    text_free: tuple[int, int] = (0, 0)  # tokens and position of the text-free branch


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    pipe = build_pipeline(golden, file.json["transforms"])
    chains: list[Chain] = []
    for name, item in file.json["prefill"].items():
        with check.trying(name):
            if item["kv_len_before"] == 0:
                chains.append(Chain(pipe.transformer.new_cache(), pipe.transformer.new_cache()))
            _check_prefill(pipe, golden, chains[-1], item, file.tensors.under(name), check.of(name))
    for name, flow in file.json["flow"].items():
        with check.trying(name):
            _check_flow(pipe, chain_of(flow, chains), flow, file.tensors.under(name), check.of(name))


def chain_of(flow, chains: list[Chain]) -> Chain:
    """The chain that a flow goes on from: chains of one length may end at different positions."""
    wanted = (flow["kv_len"], flow["rope_position"])
    found = [chain for chain in chains if (chain.cache.length, chain.cache.position) == wanted]
    if not found:
        raise ValueError(f"no chain of prefills ends with {wanted[0]} tokens at position {wanted[1]}")
    return found[0]


def _segment(pipe, golden, item, tensors, check) -> Segment:
    if "text" in item:
        return pipe.text_segment(item["text"])
    picture = to_rgb(golden.picture(item["image"]))
    if item["kind"] == "vit":
        pixels = to_pixels(pipe.vision_limits.resize(picture))
        check("vit_pixels", pixels, tensors["vit_pixels"], SINGLE)
        return pipe.vision_segment(picture)
    resized = pipe.vae_limits.resize(picture)
    check("vae_pixels", to_pixels(resized)[None], tensors["vae_pixels"], SINGLE)
    noise = tensors["vae_noise"]
    pipe.sample_noise = lambda shape, generator: noise.reshape(shape)
    segment = pipe.latent_segment(resized, None)
    latent = unpatchify(segment.data, segment.grid, pipe.transformer.config.latent_patch_size)
    check("vae_latent", latent[None], tensors["vae_latent"], SINGLE)
    return segment


def _check_prefill(pipe, golden, chain: Chain, item, tensors, check) -> None:
    cache = chain.cache
    check("kv_len_before", cache.length, item["kv_len_before"])
    check("rope_before", cache.position, item["rope_before"])
    segment = _segment(pipe, golden, item, tensors, check)
    if segment.kind == "text":
        chain.text_free = (cache.length, cache.position)
    seen = {}
    transformer = pipe.transformer
    hooks = [
        transformer.layers[0].register_forward_pre_hook(lambda module, args: seen.update(gen=args[0], und=args[1])),
        transformer.register_forward_hook(lambda module, args, out: seen.update(sequence=args[2], out=out)),
    ]
    try:
        pipe.prefill([(cache, [segment])])
    finally:
        for hook in hooks:
            hook.remove()
    sequence, out = seen["sequence"], seen["out"]
    if "text_ids" in tensors:
        check("text_ids", sequence.input_ids, tensors["text_ids"])
    if "llm_in" in tensors:
        check("llm_in", in_golden_order(sequence, seen["und"], seen["gen"]), tensors["llm_in"], SINGLE)
    check("position_ids", segments_and_positions(sequence)[1], tensors["position_ids"])
    check("hidden", in_golden_order(sequence, out.und_states, out.gen_states), tensors["hidden"], SINGLE)
    check("kv_len_after", cache.length, item["kv_len_after"])
    check("rope_after", cache.position, item["rope_after"])

    start, n = len(chain.order), len(segment)
    latents_last = segment.kind == "vae"  # our cache holds a clean picture's markers before its latent tokens
    chain.order += [start, *range(start + 2, start + n), start + 1] if latents_last else range(start, start + n)
    for layer in range(pipe.transformer.config.num_layers):
        check(f"cache.key.{layer}", cache.keys(layer)[chain.order], tensors[f"cache.key.{layer}"], SINGLE)
        check(f"cache.value.{layer}", cache.values(layer)[chain.order], tensors[f"cache.value.{layer}"], SINGLE)
    if segment.kind == "text":
        pipe.prefill([(chain.texts, [segment])])
    else:
        chain.text_free = (cache.length, cache.position)


def _check_flow(pipe, chain: Chain, flow, tensors, check) -> None:
    height, width = flow["image_shape_hw"]
    grid = (height // pipe.latent_stride, width // pipe.latent_stride)
    for cache in (chain.cache, chain.texts):
        cache.reserve(cache.length, scratch=grid[0] * grid[1] + 2)
    conditional = GuidanceBranch.whole(chain.cache)
    text_free = GuidanceBranch(chain.cache, *chain.text_free)
    image_free = GuidanceBranch.whole(chain.texts)
    for branch, prefix in ((conditional, ""), (text_free, "cfg_text_"), (image_free, "cfg_img_")):
        check(f"{prefix}kv_len", branch.length, flow[f"{prefix}kv_len"])
        check(f"{prefix}rope_position", branch.position, flow[f"{prefix}rope_position"])

    def velocity(guidance: Guidance, *branches: GuidanceBranch | None) -> tuple[torch.Tensor, object]:
        images = [NoisyImage(tensors["x_t"], grid, guidance, *branches)]
        batch = pack_branches(pipe.transformer, images, flow["t"], pipe.special_tokens, pipe.pack)
        return predict_velocity(pipe.transformer, batch, flow["t"])[0], batch.sequence

    v, sequence = velocity(OFF, conditional, text_free, None)
    check("position_ids", segments_and_positions(sequence)[1], tensors["position_ids"])
    check("vae_position_ids", sequence.latent_position_ids, tensors["vae_position_ids"])
    check("v_cond", v, tensors["v_cond"], SINGLE)
    check("v_cfg_text_context", velocity(OFF, text_free, text_free, None)[0], tensors["v_cfg_text_context"], SINGLE)
    check("v_cfg_img_context", velocity(OFF, image_free, text_free, None)[0], tensors["v_cfg_img_context"], SINGLE)
    for name, combo in flow["combos"].items():
        with check.trying(name):
            guidance = Guidance(
                scale=combo["cfg_text_scale"],
                image_scale=combo["cfg_img_scale"],
                interval=(0.0, 1.0),
                renorm=combo["cfg_renorm_type"],
                renorm_min=combo["cfg_renorm_min"],
            )
            check(name, velocity(guidance, conditional, text_free, image_free)[0], tensors[name], SINGLE)
