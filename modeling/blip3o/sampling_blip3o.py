"""BLIP3-o's two samplers: flow matching to image features, and the SDXL decoder from features to an image."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def sample_features(
    transformer,
    scheduler,
    condition: torch.Tensor,
    noise: torch.Tensor,
    num_steps: int,
    guidance_scale: float,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Image features from noise.

    The time that the head is given is truncated to a whole number, as in the original; the step sizes are not.

    Args:
        condition: (B, K, hidden) states of the queries.
        noise: (B, C, rows, columns).
        guidance_scale: pull away from the null condition (zeros); 1 is off.
        on_step_end: called with (step, velocity, features) after every update.

    Returns:
        (B, C, rows, columns) float32.
    """
    scheduler = copy.deepcopy(scheduler)  # it counts its steps
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), device=noise.device)
    guided = guidance_scale != 1
    if guided:
        condition = torch.cat([torch.zeros_like(condition), condition])
    features = noise.float()
    for step, timestep in enumerate(scheduler.timesteps):
        x = torch.cat([features, features]) if guided else features
        time = timestep.long().expand(len(x))
        velocity = transformer(x.to(condition.dtype), time, condition, return_dict=False)[0].float()
        if guided:
            null, conditional = velocity.chunk(2)
            velocity = null + guidance_scale * (conditional - null)
        features = scheduler.step(velocity, timestep, features, return_dict=False)[0]
        if on_step_end is not None:
            on_step_end(step, velocity, features)
    return features


@dataclass(frozen=True)
class ImageSize:
    """What the decoder is told about an image's size; all values in pixels.

    Args:
        original_size, crop, target_size: (height, width), (top, left), (height, width).
    """

    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]

    def time_ids(self) -> list[float]:
        return [float(x) for x in (*self.original_size, *self.crop, *self.target_size)]


def sample_image_latents(
    unet,
    scheduler,
    features: torch.Tensor,
    negative_features: torch.Tensor | None,
    noise: torch.Tensor,
    size: ImageSize,
    num_steps: int,
    guidance_scale: float,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Latents of images from image features.

    Args:
        features, negative_features: (B, tokens, C); None turns guidance off.
        noise: (B, 4, height / 8, width / 8), standard normal.
        on_step_end: called with (step, timestep, noise prediction or velocity, latents) after every update; returns
            the latents to continue with.
    """
    scheduler = copy.deepcopy(scheduler)  # it counts its steps
    scheduler.set_timesteps(num_steps, device=noise.device)
    states = features if negative_features is None else torch.cat([features, negative_features])
    states = states.to(unet.dtype)
    time_ids = torch.tensor([size.time_ids()], device=noise.device, dtype=states.dtype).expand(len(states), -1)
    added = {"text_embeds": states.mean(1), "time_ids": time_ids}
    latents = noise.float() * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        x = latents if negative_features is None else torch.cat([latents, latents])
        x = scheduler.scale_model_input(x, timestep).to(unet.dtype)
        predicted = unet(x, timestep, states, added_cond_kwargs=added, return_dict=False)[0].float()
        if negative_features is not None:
            conditional, negative = predicted.chunk(2)
            predicted = negative + guidance_scale * (conditional - negative)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        if on_step_end is not None:
            latents = on_step_end(step, timestep, predicted, latents)
    return latents


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents of images -> pixels (B, 3, H, W) in about [-1, 1]; float16 weights decode in float32, as SDXL's do."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    dtype = vae.dtype
    if upcast:
        vae.to(torch.float32)
    try:
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        return vae.decode(scaled, return_dict=False)[0]
    finally:
        if upcast:
            vae.to(dtype)
