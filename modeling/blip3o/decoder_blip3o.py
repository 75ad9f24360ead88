"""The second stage of a call: noise of all images, and image features to images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..common.images import vae_scale_factor
from ..common.mixin_base import PipelineMixin
from .conditions_blip3o import onload
from .inputs_blip3o import (
    check_numbers,
    check_output_type,
    check_whole_numbers,
    read_generators,
    read_noise,
    read_pair,
)
from .sampling_blip3o import ImageSize, decode_latents, sample_image_latents


@dataclass(frozen=True)
class Noise:
    """Standard normal noise of B images, in float32.

    Args:
        features: (B, C, rows, columns) of the image features.
        negative: of the negative prompt's features, B or 1 of them; None without guidance in the decoder.
        latents: (B, 4, height / 8, width / 8) of the decoder.
    """

    features: torch.Tensor | None
    negative: torch.Tensor | None
    latents: torch.Tensor | None


@dataclass(frozen=True)
class DecoderSettings:
    """How image features become an image."""

    size: ImageSize
    num_steps: int
    guidance_scale: float
    output_type: str
    callback: Callable | None

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1 and self.output_type != "features"


class Blip3oDecoderMixin(PipelineMixin):
    """The decoder of a pipeline. Put it before `DiffusionPipeline`."""

    transformer: Any
    unet: Any
    vae: Any
    decoder_scheduler: Any

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, per side."""
        return vae_scale_factor(self.vae.config)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(C, rows, columns) of the image features."""
        c = self.transformer.config
        return c.in_channels, c.sample_size, c.sample_size

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        """Standard normal noise in float32; everything random about an image comes from here."""
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def _noise(self, count: int, generator, given: dict, settings: DecoderSettings, from_image: bool) -> Noise:
        """The noise of `count` images. Every image draws from its own generator: features, negative features, latents.

        Args:
            given: noise passed as arguments, by field of [`Noise`].
            from_image: the image features are encoded, not generated.
        """
        factor, (height, width) = self.vae_scale_factor, settings.size.target_size
        if min(height, width) < factor:
            raise ValueError(f"height={height}, width={width}: the smallest side is {factor} pixels.")
        latents = (self.unet.config.in_channels, height // factor, width // factor)
        shapes = {"features": self.feature_shape, "negative": self.feature_shape, "latents": latents}
        names = {"features": "feature_latents", "negative": "negative_feature_latents", "latents": "latents"}
        counts = {"features": [count], "negative": [count, 1], "latents": [count]}
        noise = {n: read_noise(names[n], given.get(n), shapes[n], counts[n]) for n in shapes}
        unused = {
            "features": from_image,
            "negative": from_image or not settings.guided,
            "latents": settings.output_type == "features",
        }
        wanted = [n for n in shapes if noise[n] is None and not unused[n]]
        drawn: dict[str, list[torch.Tensor]] = {n: [] for n in wanted}
        for one in read_generators(generator, count):
            for n in wanted:
                drawn[n].append(self.draw_noise((1, *shapes[n]), one))
        noise |= {n: torch.cat(parts) for n, parts in drawn.items()}
        return Noise(**{n: None if unused[n] else value for n, value in noise.items()})

    def _decode(self, features: torch.Tensor, negative: torch.Tensor | None, noise: Noise, settings: DecoderSettings):
        """(B, tokens, C) image features -> images of the output type."""
        if settings.output_type == "features":
            return features
        if negative is not None:
            negative = negative.expand(len(features), -1, -1)
        assert noise.latents is not None
        self._num_timesteps = settings.num_steps
        pipe: Any = self  # diffusers' decorator hides the signature of progress_bar from type checkers
        with pipe.progress_bar(total=settings.num_steps) as progress:
            latents = sample_image_latents(
                self.unet,
                self.decoder_scheduler,
                features,
                negative,
                noise.latents.to(self._execution_device),
                settings.size,
                settings.num_steps,
                settings.guidance_scale,
                self._step_end(settings.callback, progress),
            )
        return self.decode_latents(latents, settings.output_type)

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil"):
        """(B, 4, H / 8, W / 8) latents -> images of an output type of the pipeline's call."""
        if output_type == "latent":
            return latents
        onload(self.vae)
        return VaeImageProcessor().postprocess(decode_latents(self.vae, latents).float(), output_type=output_type)

    def _step_end(self, callback: Callable | None, progress):
        def on_step_end(step: int, timestep: torch.Tensor, predicted: torch.Tensor, latents: torch.Tensor):
            if callback is not None:
                latents = (callback(self, step, timestep, {"latents": latents}) or {}).get("latents", latents)
            progress.update()
            return latents

        return on_step_end

    def _settings(
        self, height, width, original_size, crop, num_steps, scale, output_type, callback
    ) -> DecoderSettings:
        default = self.config["default_size"]
        height, width = (default if value is None else value for value in (height, width))
        check_whole_numbers(height=height, width=width, num_inference_steps=num_steps)
        check_numbers(guidance_scale=scale)
        check_output_type(output_type)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end is a {type(callback).__name__}; give a function.")
        original = (default, default) if original_size is None else read_pair("original_size", original_size)
        size = ImageSize(original, read_pair("crops_coords_top_left", crop), (height, width))
        return DecoderSettings(size, num_steps, scale, output_type, callback)
