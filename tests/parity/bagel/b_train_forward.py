"""One training batch: packing, noising, both losses per token, and the gradient of every parameter."""

from __future__ import annotations

import torch

from echo4o.modeling.bagel.convert import read_original
from echo4o.modeling.bagel.segments_bagel import NO_LABEL, pack, patchify
from echo4o.training.backbones.bagel_objective import add_noise, bagel_losses

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .e_vae import encode
from .g_packing import check_masks, check_packed
from .golden_set import GoldenSet
from .sequences import Strides, in_golden_order, sample_segments


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    with check.trying("padded_latent"):
        # The original pads pictures of different sizes into one VAE batch. We never do; encoding that very batch
        # checks the VAE, and the latents that it gave are taken as they are from here on.
        latent = encode(golden.components["vae"], file.tensors["padded_images"], file.tensors["vae_noise"])
        check("in.padded_latent", latent, file.tensors["in.padded_latent"], SINGLE)
    with check.trying("batch"):
        sequence = _batch(golden, file)
        _check_inputs(golden, file, sequence, check)
        _check_forward(golden, file, sequence, check)


def _batch(golden, file):
    """The golden samples, packed, with patches and clean latents."""
    transforms = file.json["transforms"]
    strides = Strides(*(transforms[name]["image_stride"] for name in ("vit_transform", "vae_transform")))
    transforms.note("vit_transform", "vae_transform")
    samples = [sample_segments(sample, golden.tokens, strides) for sample in file.json["samples"]]
    transformer, vision = golden.components["transformer"].config, golden.components["vision_model"].config
    sequence = pack(samples, latent_positions=transformer.max_latent_size, patch_positions=vision.max_patches_per_side)
    patch = transformer.latent_patch_size
    grids = [segment.grid for sample in samples for segment in sample if segment.kind in ("vae", "noise")]
    padded = file.tensors["in.padded_latent"]
    tokens = [patchify(x[:, : h * patch, : w * patch], patch) for x, (h, w) in zip(padded, grids, strict=True)]
    sequence.latents = torch.cat(tokens)
    sequence.patches = file.tensors["in.packed_vit_tokens"]
    return sequence


def _check_inputs(golden, file, sequence, check) -> None:
    """The packing arguments of Bagel.forward, by what they mean."""
    args, tensors = file.json["args"], file.tensors.under("in")
    with check.trying("args"):
        want = {key: args[key] for key in ("sample_lens", "split_lens", "attn_modes")}
        want |= {"curr": args["sequence_length"], "vae_latent_shapes": args["patchified_vae_latent_shapes"]}
        names = [
            "packed_text_ids",
            "packed_text_indexes",
            "packed_position_ids",
            "packed_latent_position_ids",
            "packed_vae_token_indexes",
            "packed_vit_position_ids",
            "packed_vit_token_indexes",
            "vit_token_seqlens",
            "mse_loss_indexes",
            "packed_label_ids",
            "ce_loss_indexes",
            "packed_timesteps",
        ]
        want |= {name: tensors[name] for name in names} | {"ce_loss_weights": file.tensors["ce_loss_weights"]}
        check_packed(sequence, golden.components["transformer"].config.max_latent_size, want, check.of("in"))
    with check.trying("attend_mask"):
        check_masks(sequence, tensors.series("attend_mask"), check)
        check("flex_mask_equals_dense_mask", file.json["flex_mask_equals_dense_mask"], True)
    for index, sample in enumerate(file.json["samples"]):
        check(f"samples.{index}.name", isinstance(sample["name"], str), True)


def _check_forward(golden, file, sequence, check) -> None:
    tensors = file.tensors
    raw = tensors["in.packed_timesteps"][sequence.gen_noised]
    first = torch.ones_like(raw, dtype=torch.bool)
    segment = sequence.gen_segment[sequence.gen_noised]
    first[1:] = segment[1:] != segment[:-1]
    noise = tensors["noise"][sequence.gen_noised]
    noised = add_noise(sequence, noise, raw[first], file.json["timestep_shift"])
    check("t_shifted", noised.timestep, tensors["out.t_shifted"], SINGLE)
    check("noised_latent_tokens", noised.hidden_states, tensors["out.noised_latent_tokens"], SINGLE)

    transformer, vision_model = golden.components["transformer"], golden.components["vision_model"]
    transformer.zero_grad(set_to_none=True), vision_model.zero_grad(set_to_none=True)
    seen = {}
    hooks = [
        transformer.layers[0].register_forward_pre_hook(lambda module, args: seen.update(gen=args[0], und=args[1])),
        transformer.register_forward_hook(lambda module, args, out: seen.update(out=out)),
    ]
    try:
        terms = bagel_losses(transformer, vision_model, sequence, noised)
    finally:
        for hook in hooks:
            hook.remove()
    out = seen["out"]
    embedded = in_golden_order(sequence, seen["und"], seen["gen"])
    hidden = in_golden_order(sequence, out.und_states, out.gen_states)
    check("packed_sequence", embedded, tensors["out.packed_sequence"], SINGLE)
    check("last_hidden_state", hidden, tensors["out.last_hidden_state"], SINGLE)
    check("v_pred", out.sample[sequence.gen_noised], tensors["out.v_pred"], SINGLE)
    check("ce_logits", out.logits, tensors["out.ce_logits"], SINGLE)
    check("mse per token", terms.mse, tensors["out.mse"], SINGLE)
    check("ce per label", terms.cross_entropy, tensors["out.ce"], SINGLE)
    mse, cross_entropy = terms.mse.mean(), terms.cross_entropy.mean()
    loss = mse + cross_entropy
    reweighted = (terms.cross_entropy * terms.weights).sum() / terms.weights.sum()
    check("loss.mse_mean", mse, file.json["loss"]["mse_mean"], SINGLE)
    check("loss.ce_mean", cross_entropy, file.json["loss"]["ce_mean"], SINGLE)
    check("loss.total", loss, file.json["loss"]["total"], SINGLE)
    check("loss.ce_reweighted", reweighted, file.json["loss"]["ce_reweighted"], SINGLE)
    loss.backward()
    _check_gradients(golden, file, check)
    assert int((sequence.labels != NO_LABEL).sum()) == len(terms.cross_entropy)
    transformer.zero_grad(set_to_none=True), vision_model.zero_grad(set_to_none=True)


def _check_gradients(golden, file, check) -> None:
    """Every gradient norm in the json, every stored gradient, and no trained parameter beside them."""
    gradients = {}  # original name -> gradient, or None where there is none to have
    for key in read_original(golden.directory / "checkpoint").keys:
        if key.component == "vae":
            continue
        parameter = dict(golden.components[key.component].named_parameters()).get(key.name)
        gradients[key.original] = None if parameter is None else parameter.grad
    norms = file.json["grad_norms"]
    check("grad_norms: names", sorted(gradients), sorted(norms))
    for name, want in norms.items():
        with check.trying(f"grad_norm.{name}"):
            got = gradients[name]
            check(f"grad_norm.{name}", None if got is None else got.norm(), want, SINGLE)
    for name in file.tensors.under("grad"):
        with check.trying(f"grad.{name}"):
            check(f"grad.{name}", gradients[name], file.tensors["grad." + name], SINGLE)
