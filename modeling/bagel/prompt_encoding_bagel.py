"""Encodes prompts: texts and images to segments, and segments to keys and values in caches.

With the prefill cache, later calls reuse the VAE's moments of an image, the vision model's features of images, and the
keys and values of contexts. common/prefill_cache.py describes the keys of its entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..common.images import to_pixels, vae_scale_factor
from ..common.mixin_base import PipelineMixin
from ..common.prefill_cache import PrefillCache, digest, fingerprint
from ..common.step_cache import uncached_pass
from .denoising_bagel import EncodedPrompt, before_last_text
from .image_processor_bagel import ImageLimits, to_patches
from .inputs_bagel import PromptInputs
from .options_bagel import image_limits
from .segments_bagel import (
    KVCache,
    PackedSequence,
    Segment,
    SpecialTokens,
    end_position,
    image_segment,
    pack,
    patchify,
    text_segment,
)


class PromptEncodingMixin(PipelineMixin):
    """The prompt encoding of a pipeline. Put it before `DiffusionPipeline`."""

    transformer: Any
    vision_model: Any
    vae: Any
    tokenizer: Any

    prefill_cache: PrefillCache | None = None

    # --- sizes of the checkpoint ---

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, per side."""
        return vae_scale_factor(self.vae.config)

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token, per side; heights and widths are multiples of it (release: 16)."""
        return self.vae_scale_factor * self.transformer.config.latent_patch_size

    @property
    def vae_limits(self) -> ImageLimits:
        """Size limits of images for the VAE, and of generated images."""
        return image_limits(self.config["vae_image_limits"], self.latent_stride)

    @property
    def vision_limits(self) -> ImageLimits:
        """Size limits of images for the vision model."""
        return image_limits(self.config["vision_image_limits"], self.vision_model.config.patch_size)

    @property
    def special_tokens(self) -> SpecialTokens:
        return SpecialTokens.from_tokenizer(self.tokenizer)

    # --- texts and images to segments ---

    def text_segment(self, text: str) -> Segment:
        return text_segment(self.tokenizer.encode(text, add_special_tokens=False), self.special_tokens)

    def vision_segment(self, image: Image.Image) -> Segment:
        """The patches of an RGB image of any size, for the vision model."""
        patch = self.vision_model.config.patch_size
        pixels = to_pixels(self.vision_limits.resize(image))
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        return image_segment("vit", grid, self.special_tokens, to_patches(pixels, patch))

    def latent_segment(self, image: Image.Image, generator: torch.Generator | None) -> Segment:
        """The clean latent tokens of an RGB image whose size fits the VAE."""
        latent, patch = self.encode_latent(image, generator), self.transformer.config.latent_patch_size
        grid = (latent.shape[1] // patch, latent.shape[2] // patch)
        return image_segment("vae", grid, self.special_tokens, patchify(latent, patch))

    def encode_latent(self, image: Image.Image, generator: torch.Generator | None) -> torch.Tensor:
        """Sampled and scaled latent of an RGB image whose sides are multiples of the stride: (C, H/8, W/8) float32.

        BAGEL samples the latents of reference images at inference, too (tests/parity/golden/README.md, surprise 11).
        """
        mean, std = self.vae_moments(image)
        latent = mean + std * self.sample_noise(tuple(mean.shape), generator)
        return (latent - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def sample_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        """Standard normal noise in float32. Everything random except sampled text uses this method."""
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def pack(self, samples: Sequence[Sequence[Segment]], starts: Sequence[int] | None = None) -> PackedSequence:
        """Pack samples for the position tables of this checkpoint, on the execution device."""
        return pack(
            samples,
            latent_positions=self.transformer.config.max_latent_size,
            patch_positions=self.vision_model.config.max_patches_per_side,
            starts=starts,
        ).to(self._execution_device)

    # --- segments to caches ---

    def encode_prompt(
        self, prompt: PromptInputs, generator: torch.Generator | None, plan_length: int
    ) -> EncodedPrompt:
        """Segments of a prompt, and empty caches with room for them.

        Args:
            generator: samples the latents of reference images.
            plan_length: room for a plan in tokens; with a plan, the system prompt for it comes first.
        """
        segments: list[Segment] = []
        if plan_length:
            segments.append(self.text_segment(self.config["think_prompts"]["image"]))
        for item in prompt.items:
            if isinstance(item, str):
                segments.append(self.text_segment(item))
            else:
                image = self.vae_limits.resize(item)
                segments += [self.latent_segment(image, generator), self.vision_segment(image)]
        grid = (prompt.height // self.latent_stride, prompt.width // self.latent_stride)
        encoded = EncodedPrompt(segments, prompt.guidance, grid, self.transformer.new_cache())
        if prompt.guidance.uses_images:
            encoded.image_free_cache = self.transformer.new_cache()
        for cache, cached in encoded.contexts():
            room = plan_length if cache is encoded.cache else 0
            cache.reserve(sum(map(len, cached)) + room, scratch=grid[0] * grid[1] + 2)
        return encoded

    def prefill(self, rows: Sequence[tuple[KVCache, list[Segment]]]) -> None:
        """Append clean segments to caches, given as pairs (cache, segments).

        The segments before the last text of all rows are one forward pass and the rest is a second one, so that the
        prefill cache can reuse the first pass for another last text.
        """
        for cache, segments in rows:
            cache.reserve(cache.length + sum(map(len, segments)))
        before, after = [], []
        for cache, segments in rows:
            cut = before_last_text(segments)
            before.append((cache, segments[:cut]))
            after.append((cache, segments[cut:]))
        # A cache that is not empty ends with generated text, which no later call repeats: it is not kept.
        key = None
        if self.prefill_cache is not None and all(cache.length == 0 for cache, _ in rows):
            key = fingerprint(self._execution_device, self.transformer, self.vision_model)
        for part in (before, after):
            if not any(segments for _, segments in part):
                continue
            if self.prefill_cache is None or key is None:
                self._forward_segments(part)
            else:  # the key of the second pass includes the one of the first
                key = digest(key, *([_content(s) for s in segments] for _, segments in part))
                self._recall_segments(self.prefill_cache, key, part)

    def _recall_segments(self, kept: PrefillCache, key: bytes, rows: Sequence[tuple[KVCache, list[Segment]]]) -> None:
        """Append segments to caches, from the prefill cache's entry `key` if there is one."""
        starts = [cache.length for cache, _ in rows]

        def compute() -> list[torch.Tensor]:
            self._forward_segments(rows)
            return [x for (cache, _), start in zip(rows, starts, strict=True) for x in cache.copy_from(start)]

        tensors = iter(kept.recall(key, compute))
        for (cache, segments), start in zip(rows, starts, strict=True):
            states = [next(tensors) for _ in range(2 * cache.num_layers)] if segments else []
            if segments and cache.length == start:
                cache.extend(states, end_position(segments, cache.position))

    def _forward_segments(self, rows: Sequence[tuple[KVCache, list[Segment]]]) -> None:
        """Append segments to caches by one forward pass over the rows that have any."""
        rows = [(cache, segments) for cache, segments in rows if segments]
        sequence = self.pack([segments for _, segments in rows], [cache.position for cache, _ in rows])
        vision_embeds = timestep = None
        if sequence.patches is not None:
            vision_embeds = self.vision_embeds(sequence)
        if sequence.latents is not None:
            timestep = torch.zeros(1, device=sequence.latents.device)
        contexts = [cache.whole() for cache, _ in rows]
        with uncached_pass(self.transformer):
            self.transformer(sequence.latents, timestep, sequence, vision_embeds, contexts)
        for cache, segments in rows:
            cache.position = end_position(segments, cache.position)

    # --- encoders, and what is kept of them ---

    def enable_prefill_cache(self, max_bytes: int = 2**30) -> PrefillCache:
        """Keep encoded prompts for later calls, up to `max_bytes` bytes. Results are the same, bit for bit.

        Later calls reuse the contexts of an equal list of prompts, the segments before the last text of each prompt
        (the same images with another question), and features of the same images, in chat and in generation. Latents
        of references depend on the generator: they, and the segments after them, are computed again for another one.
        Changes of the weights are detected, except for single values written through `.data`; call `clear()` then.

        Returns the cache, also available as `prefill_cache`. Its repr shows its size; `clear()` frees the memory.
        """
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r} must be a whole number of at least 1.")
        self.prefill_cache = PrefillCache(max_bytes)
        return self.prefill_cache

    def disable_prefill_cache(self) -> None:
        """Encode everything in every call, and free the memory of the prefill cache."""
        self.prefill_cache = None

    def vision_embeds(self, sequence: PackedSequence) -> torch.Tensor:
        """Features of all ViT images of a packed sequence: (V, hidden)."""
        inputs = (sequence.patches, sequence.patch_position_ids, sequence.patch_lengths)

        def compute() -> list[torch.Tensor]:
            return [self.vision_model(*inputs).embeds]

        if self.prefill_cache is None:
            return compute()[0]
        weights = fingerprint(self._execution_device, self.vision_model)
        return self.prefill_cache.recall(digest(weights, *inputs), compute)[0]

    def vae_moments(self, image: Image.Image) -> list[torch.Tensor]:
        """Mean and standard deviation of an RGB image's unscaled latent: each (C, H/8, W/8) float32."""

        def compute() -> list[torch.Tensor]:
            pixels = to_pixels(image)[None].to(self._execution_device, self.vae.dtype)
            moments = self.vae.encode(pixels).latent_dist
            return [moments.mean[0].float(), moments.std[0].float()]

        if self.prefill_cache is None:
            return compute()
        weights = fingerprint(self._execution_device, self.vae)
        return self.prefill_cache.recall(digest(weights, image.size, image.tobytes()), compute)


def _content(segment: Segment) -> list:
    """The values that a segment's keys and values depend on: all but its labels."""
    return [value for name, value in vars(segment).items() if name not in ("labels", "label_weights")]
