"""The SDXL decoder: one call of the UNet, one of the VAE, and trajectories from fixed features and noise to images."""

from __future__ import annotations

import copy

import numpy as np
import torch

from echo4o.modeling.blip3o.sampling_blip3o import decode_latents, sample_image_latents

from ..golden import GoldenFile, Record
from ..report import Check
from .golden_set import GoldenSet
from .tolerances import TRAJECTORY, close, same_pixels

LATENTS, PIXELS = 8, 16  # strides of the stored parts of images of the default size
STEPS, SCALE = 50, 3.0  # where a run names none; the release's


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    arguments, tensors, pipe = file.json["arguments"], file.tensors, golden.pipeline
    features = tensors["features"]
    with check.trying("unet"):
        unet = arguments["unet"]
        x, ids = tensors["unet.x"], torch.tensor([unet["time_ids"]] * len(features), dtype=torch.float32)
        added = {"text_embeds": features.mean(1), "time_ids": ids}
        out = pipe.unet(x, unet["timestep"], features, added_cond_kwargs=added, return_dict=False)[0]
        close(check, "unet.out", out, tensors["unet.out"])
    with check.trying("vae"):
        # The recorded call is the VAE's own: before the division by the scaling factor.
        z = tensors["vae.z"]
        want = tensors["vae.decode"]
        close(check, "vae.decode", decode_latents(pipe.vae, z * pipe.vae.config.scaling_factor), want)
    for name, run in arguments["runs"].items():
        with check.trying(name):
            _check_run(golden, run, features, tensors.under(name), check.of(name))
    arguments.note("note")


def _check_run(golden: GoldenSet, run: Record, features: torch.Tensor, tensors, check: Check) -> None:
    pipe = golden.pipeline
    settings = pipe._settings(
        run.get("height"),
        run.get("width"),
        run.get("original_size"),
        tuple(run.get("crop_info", (0, 0))),
        run.get("num_inference_steps", STEPS),
        run.get("guidance_scale", SCALE),
        "pil",
        None,
    )
    noise = tensors["noise"]
    drawn = pipe._noise(1, torch.Generator().manual_seed(0), {}, settings, from_image=True)
    check("draw_shape", list(drawn.latents.shape), run["draw_shape"])
    scheduler = copy.deepcopy(pipe.decoder_scheduler)
    scheduler.set_timesteps(settings.num_steps)
    close(check, "init_noise_sigma", float(scheduler.init_noise_sigma), run["init_noise_sigma"])
    close(check, "timesteps", scheduler.timesteps, tensors["timesteps"])
    close(check, "sigmas", scheduler.sigmas, tensors["sigmas"])
    negative, seen = features[1:] if settings.guided else None, {}

    def keep(step, timestep, predicted, latents):
        seen[step] = (predicted, latents)
        return latents

    latents = sample_image_latents(
        pipe.unet,
        pipe.decoder_scheduler,
        features[:1],
        negative,
        noise,
        settings.size,
        settings.num_steps,
        settings.guidance_scale,
        keep,
    )
    stride = LATENTS if tensors["latents"].shape != latents.shape else 1
    close(check, "latents", latents[..., ::stride, ::stride], tensors["latents"], TRAJECTORY)
    for step, (predicted, after) in seen.items():
        if f"after.{step}" in tensors:
            for part, values in (("guided", predicted), ("after", after)):
                close(check, f"{part}.{step}", values[..., ::stride, ::stride], tensors[f"{part}.{step}"], TRAJECTORY)
    image = pipe.decode_latents(latents)[0]
    check("image_size", list(image.size), run["image_size"])
    stride = PIXELS if stride > 1 else 1
    same_pixels(check, "image_uint8", np.asarray(image)[::stride, ::stride], tensors["image_uint8"])
