"""Sizes and pixels of the original's picture transforms, and conversion to RGB."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from echo4o.modeling.bagel.image_processor_bagel import ImageLimits
from echo4o.modeling.common.image_files import to_rgb
from echo4o.modeling.common.images import to_pixels

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .golden_set import GoldenSet


def make_image(w: int, h: int, s: int) -> Image.Image:
    """The pattern of the golden README: integers only, so that it is the same everywhere."""
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    r, g = (x * 3 + y * 5 + 17 * s) % 256, ((x * y) // 8 + 31 * s) % 256
    b = (((x - w // 2) ** 2 + (y - h // 2) ** 2) // (4 + s)) % 256
    return Image.fromarray(np.stack([r, g, b], -1).astype(np.uint8))


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    pictures = {}
    for name, image in file.json["images"].items():
        with check.trying(f"images.{name}"):
            pictures[name] = make_image(image["w"], image["h"], image["seed"])
            digest = hashlib.sha256(pictures[name].tobytes()).hexdigest()
            check(f"images.{name}.sha256", digest, image["sha256"])
    bounds = {}  # name of a transform -> its limits
    for case in file.json["cases"]:
        name = f"{case['transform']}.{case['image']}.n{case['img_num']}"
        with check.trying(name):
            bounds[case["transform"]] = ImageLimits(*case["args"], **case["kwargs"].plain())
            picture = pictures[case["image"]]
            _check_case(bounds[case["transform"]], picture, case, name, file.tensors, check.of(name))
    for case in file.json["inferencer_two_stage"]:
        with check.trying(f"two_stage.{case['image']}"):
            _check_two_stage(bounds, pictures[case["image"]], case, check.of(f"two_stage.{case['image']}"))
    for name in file.tensors:
        if name.startswith("pil_img2rgb.") and name.endswith(".in"):
            with check.trying(name):
                _check_rgb(name.split(".")[1], file.tensors.under(name.removesuffix(".in")), check)


def _check_case(bounds, picture, case, name, tensors, check) -> None:
    width, height = bounds.size(*picture.size, case["img_num"])
    check("shape", [3, height, width], case["shape"])
    pixels = to_pixels(bounds.resize(picture, case["img_num"]))
    double = pixels.double()
    check("mean", double.mean(), case["mean"], SINGLE)
    check("std", double.std(), case["std"], SINGLE)
    if name in tensors:
        check("pixels", pixels, tensors[name], SINGLE)
    if f"{name}.sub16" in tensors:
        check("pixels.sub16", pixels[:, ::16, ::16], tensors[f"{name}.sub16"], SINGLE)


def _check_two_stage(bounds, picture, case, check) -> None:
    """What the inferencer feeds the ViT: the picture resized for the VAE first. `bounds` has every transform by name."""
    first = next(limit for name, limit in bounds.items() if name.startswith("vae_"))
    resized = first.size(*picture.size)
    check("vae_resized_wh", resized, case["vae_resized_wh"])
    for key in case:
        if key.startswith("then_"):
            width, height = bounds[key.removeprefix("then_")].size(*resized)
            check(key, [3, height, width], case[key])


def _check_rgb(mode, tensors, check) -> None:
    values, want = tensors["in"].numpy(), tensors["out"]
    picture = Image.fromarray(values)
    if mode == "P":  # stored as indices without the palette: every index's colour is read off the result
        palette = np.zeros((256, 3), np.uint8)
        palette[values.ravel()] = want.numpy().reshape(-1, 3)
        picture.putpalette(palette.ravel().tolist())
    check(f"pil_img2rgb.{mode}: mode", picture.mode, mode)
    check(f"pil_img2rgb.{mode}", np.array(to_rgb(picture)), want)
