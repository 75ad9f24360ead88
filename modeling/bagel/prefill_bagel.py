"""Reading prompts into contexts, and keeping what was read for later calls.

Kept are the VAE's moments of a picture, the vision model's features of pictures, and the keys and values of contexts.
Each is filed under the bytes that it was made of and under the weights that made it, so that a later call either finds
exactly what it would have computed or computes it.
"""

import torch

from ..common.images import to_pixels
from ..common.prefill_cache import PrefillCache, digest, fingerprint
from ..common.step_cache import whole_pass
from .segments_bagel import Segment, end_position


class PrefillMixin:
    """How a pipeline reads. Put before `DiffusionPipeline`."""

    prefill_cache: PrefillCache | None = None

    def enable_prefill_cache(self, max_bytes: int = 2**30) -> PrefillCache:
        """Keep what is read for later calls, up to `max_bytes`. The same numbers, bit for bit, without reading again.

        A call finds what it shares with an earlier one: a whole call's list of prompts; what stands before the last
        text of each (the same pictures and another question); features of the same pictures, in chat and in drawing.
        Latents of references are drawn anew for every generator, and what follows one in a context is read with it.
        Changed weights are noticed, except for single values written through `.data`: `clear()` after that.

        Returns the cache, also `prefill_cache`: print it for its size, `clear()` it to free the memory.
        """
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r} must be a whole number of at least 1.")
        self.prefill_cache = PrefillCache(max_bytes)
        return self.prefill_cache

    def disable_prefill_cache(self) -> None:
        """Read everything in every call, as at first, and free what was kept."""
        self.prefill_cache = None

    def prefill(self, rows: list[tuple]) -> None:
        """Read clean segments into caches: [(cache, segments)]. What stands before each row's last text is one pass
        over all rows, what follows another, so that calls which differ in the last text share the first."""
        for cache, segments in rows:
            cache.reserve(cache.length + sum(map(len, segments)))
        before, after = [], []
        for cache, segments in rows:
            cut = before_last_text(segments)
            before.append((cache, segments[:cut]))
            after.append((cache, segments[cut:]))
        # Contexts that continue others come from text that was sampled; nothing will ask for them again.
        key = None
        if self.prefill_cache is not None and all(cache.length == 0 for cache, _ in rows):
            key = fingerprint(self._execution_device, self.transformer, self.vision_model)
        for part in (before, after):
            if not any(segments for _, segments in part):
                continue
            if key is None:
                self._read(part)
            else:
                key = digest(key, *([_content(s) for s in segments] for _, segments in part))
                self._recall(key, part)

    def _recall(self, key: bytes, rows: list[tuple]) -> None:
        """Extend caches by what is kept of these rows, or read them and keep it."""
        starts = [cache.length for cache, _ in rows]

        def read() -> list[torch.Tensor]:
            self._read(rows)
            return [x for (cache, _), start in zip(rows, starts, strict=True) for x in cache.copy_from(start)]

        kept = iter(self.prefill_cache.recall(key, read))
        for (cache, segments), start in zip(rows, starts, strict=True):
            states = [next(kept) for _ in range(2 * cache.num_layers)] if segments else []
            if segments and cache.length == start:
                cache.extend(states, end_position(segments, cache.position))

    def _read(self, rows: list[tuple]) -> None:
        """One pass over the rows that have something to read."""
        rows = [(cache, segments) for cache, segments in rows if segments]
        sequence = self.pack([segments for _, segments in rows], [cache.position for cache, _ in rows])
        vision_embeds = timestep = None
        if sequence.patches is not None:
            vision_embeds = self.vision_embeds(sequence)
        if sequence.latents is not None:
            timestep = torch.zeros(1, device=sequence.latents.device)
        contexts = [cache.whole() for cache, _ in rows]
        with whole_pass(self.transformer):
            self.transformer(sequence.latents, timestep, sequence, vision_embeds, contexts)
        for cache, segments in rows:
            cache.position = end_position(segments, cache.position)

    def vision_embeds(self, sequence) -> torch.Tensor:
        """Features of all ViT pictures of a packed sequence: (V, hidden)."""

        def see() -> list[torch.Tensor]:
            return [self.vision_model(sequence.patches, sequence.patch_position_ids, sequence.patch_lengths).embeds]

        if self.prefill_cache is None:
            return see()[0]
        weights = fingerprint(self._execution_device, self.vision_model)
        of = (sequence.patches, sequence.patch_position_ids, sequence.patch_lengths)
        return self.prefill_cache.recall(digest(weights, *of), see)[0]

    def vae_moments(self, image) -> list[torch.Tensor]:
        """Mean and standard deviation of an RGB picture's unscaled latent: each (C, H/8, W/8) float32."""

        def encode() -> list[torch.Tensor]:
            pixels = to_pixels(image)[None].to(self._execution_device, self.vae.dtype)
            moments = self.vae.encode(pixels).latent_dist
            return [moments.mean[0].float(), moments.std[0].float()]

        if self.prefill_cache is None:
            return encode()
        weights = fingerprint(self._execution_device, self.vae)
        return self.prefill_cache.recall(digest(weights, image.size, image.tobytes()), encode)


def before_last_text(segments: list[Segment]) -> int:
    """How many segments stand before the last text; all, when a picture comes last."""
    return len(segments) - 1 if segments and segments[-1].kind == "text" else len(segments)


def _content(segment: Segment) -> list:
    """What a segment's hidden states depend on: everything but its labels."""
    return [value for name, value in vars(segment).items() if name not in ("labels", "label_weights")]
