"""Sizes of references, their pixels, and the VAE."""

from __future__ import annotations

import torch

from echo4o.modeling.omnigen2.image_processor_omnigen2 import reference_pixels, reference_size, rounded_uint8

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .comparing import compare_images
from .golden_set import GoldenSet


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    stride = golden.pipe.latent_stride
    for index, case in enumerate(file.json["sizes"]):
        got = reference_size(*case["in_wh"], case["max_pixels"], case["max_side_length"], stride)
        check(f"sizes.{index}", got, case["out_hw"])
    pixels = {}
    for case in file.json["preprocess"]:
        with check.trying(case["key"]):
            pixels[case["key"]] = _check_pixels(golden, case, file.tensors, check.of(case["key"]), stride)
    file.json["vae"].note("z")
    config = golden.pipe.vae.config
    for name in ("scaling_factor", "shift_factor"):
        check(f"vae.{name}", config[name], file.json["vae"][name])
    for group in sorted({name.rsplit(".", 1)[0] for name in file.tensors if name.startswith("vae.")}):
        with check.trying(group):
            _check_vae(golden, group, pixels, file.tensors.under(group), check.of(group))


def _check_pixels(golden, case, tensors, check, stride) -> torch.Tensor:
    image = golden.picture(case["image"].removeprefix("inputs/"))
    pixels = reference_pixels(image, case["max_pixels"], case["max_side_length"], stride)[None]
    check("shape", pixels.shape, case["shape"])
    want = tensors[case["key"]]
    if want.dtype == torch.uint8:
        check("uint8", ((pixels * 0.5 + 0.5) * 255).round(), want)
    else:
        check("pixels", pixels, want, SINGLE)
    return pixels


def _check_vae(golden, group, pixels, tensors, check) -> None:
    """The image that the VAE encodes is one of the preprocessed ones: the one of this size."""
    pipe, mean = golden.pipe, tensors["mean"]
    fitting = [x for x in pixels.values() if x.shape[2] // pipe.vae_scale_factor == mean.shape[2]]
    fitting = [x for x in fitting if x.shape[3] // pipe.vae_scale_factor == mean.shape[3]]
    moments = [pipe.vae.encode(x).latent_dist for x in fitting]
    errors = [float((m.mean - mean).abs().max()) for m in moments]
    best = errors.index(min(errors))
    check("mean", moments[best].mean, mean, SINGLE)
    check("logvar", moments[best].logvar, tensors["logvar"], SINGLE)
    pipe.draw_noise = lambda shape, generator: tensors["noise"].reshape(shape)
    try:
        check("z", pipe.encode_image(fitting[best][0], None)[None], tensors["z"], SINGLE)
    finally:
        del pipe.draw_noise
    decoded = pipe.decode_latent(tensors["z"][0])
    check("decoded", decoded[None], tensors["decoded"], SINGLE)
    compare_images(check, "uint8", rounded_uint8(decoded), tensors["uint8"])
