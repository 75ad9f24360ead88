"""FLUX's VAE as diffusers' AutoencoderKL: moments, sampled latents, decoding; alone and in a padded pair."""

from __future__ import annotations

import re

import torch

from echo4o.modeling.common.image_files import to_rgb
from echo4o.modeling.common.images import to_pixels

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .a_vit import limits
from .golden_set import GoldenSet


@torch.no_grad()
def encode(vae, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """(N, 3, H, W) -> latents (N, C, H/8, W/8): the mean, or a sample drawn with `noise`."""
    moments = vae.encode(pixels).latent_dist
    latent = moments.mean if noise is None else moments.mean + moments.std * noise
    return vae.config.scaling_factor * (latent - vae.config.shift_factor)


@torch.no_grad()
def decode(vae, latent: torch.Tensor) -> torch.Tensor:
    """Inverse of [`encode`], to pixels in [-1, 1]."""
    return vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    vae = golden.components["vae"]
    _check_config(vae, file.json["vae_config"], check.of("vae_config"))
    for group in sorted({name.rsplit(".", 1)[0] for name in file.tensors if name.endswith(".pixels")}):
        with check.trying(group):
            _check_group(vae, file.tensors.under(group), check.of(group))
    for name in file.tensors:
        if name.endswith("_decoded"):
            with check.trying(name):
                latent = file.tensors[name.removesuffix("_decoded")]
                check(name, decode(vae, latent), file.tensors[name], SINGLE)
    with check.trying("single.pixels"):
        _check_picture(golden, file, check)
    with check.trying("padding"):
        _check_padding(vae, file, check)


def _check_config(vae, want, check) -> None:
    ours = vae.config
    got = {
        "in_channels": ours.in_channels,
        "out_ch": ours.out_channels,
        "z_channels": ours.latent_channels,
        "scale_factor": ours.scaling_factor,
        "shift_factor": ours.shift_factor,
        "downsample": 2 ** (len(ours.block_out_channels) - 1),
        "ch": ours.block_out_channels[0],
        "ch_mult": [c // ours.block_out_channels[0] for c in ours.block_out_channels],
        "num_res_blocks": ours.layers_per_block,
    }
    want.note("resolution")  # the size it was trained at; nothing depends on it
    if "ch" in want and "ch_mult" in want:  # only the products decide: a first multiplier need not be 1
        base = want["ch"]
        got["ch"], got["ch_mult"] = base, [c / base for c in ours.block_out_channels]
    for name in got:
        if name in want:
            check(name, got[name], want[name])


def _check_group(vae, tensors, check) -> None:
    pixels = tensors["pixels"]
    with torch.no_grad():
        moments = vae.encode(pixels).latent_dist
    check("moments", moments.parameters, tensors["moments"], SINGLE)
    check("mean", moments.mean, tensors["mean"], SINGLE)
    check("logvar", moments.logvar, tensors["logvar"], SINGLE)
    sampled, mean = encode(vae, pixels, tensors["noise"]), encode(vae, pixels)
    check("encode_sampled_scaled", sampled, tensors["encode_sampled_scaled"], SINGLE)
    check("encode_mean_scaled", mean, tensors["encode_mean_scaled"], SINGLE)
    for name in ("mean", "sampled"):
        if f"decode_of_{name}_scaled" in tensors:
            decoded = decode(vae, tensors[f"encode_{name}_scaled"])
            check(f"decode_of_{name}_scaled", decoded, tensors[f"decode_of_{name}_scaled"], SINGLE)


def _check_picture(golden, file, check) -> None:
    """The pixels are those of the picture that the json names."""
    name = re.search(r"\S+\.png", file.json["image"])
    transforms = file.json["transforms"]
    transforms.note("vit_transform")
    picture = to_rgb(golden.picture(name.group()))
    pixels = to_pixels(limits(transforms, "vae_transform").resize(picture))
    check(f"single.pixels from {name.group()}", pixels[None], file.tensors["single.pixels"], SINGLE)


def _check_padding(vae, file, check) -> None:
    """Padding changes latents in the original by as much as here; encoding one by one is what we do."""
    pair = file.tensors["padded_pair.pixels"]
    crops = []
    for index, pixels in enumerate(pair):
        alone = file.tensors[f"unpadded.{index}.pixels"]
        crops.append(alone)
        check(f"unpadded.{index} within the pair", pixels[:, : alone.shape[2], : alone.shape[3]], alone[0])
    with torch.no_grad():
        alone, padded = (vae.encode(x).latent_dist.mean[0] for x in (crops[0], pair))
    effect = (padded[:, : alone.shape[1], : alone.shape[2]] - alone).abs().max()
    check("padding_effect_on_mean_max_abs", effect, file.json["padding_effect_on_mean_max_abs"], SINGLE)
