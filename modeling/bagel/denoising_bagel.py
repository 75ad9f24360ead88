"""The values of a generation: encoded prompts, noisy images, and the batch of guidance branches of an update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .guidance_bagel import Guidance, guide
from .segments_bagel import (
    KVCache,
    PackedSequence,
    Segment,
    SpecialTokens,
    end_position,
    image_segment,
    patchify,
)


class GuidanceBranch(NamedTuple):
    """The context of an image in one guidance branch: the first `length` tokens of `cache`.

    The image's tokens have the rotary position `position`.
    """

    cache: KVCache
    length: int
    position: int

    @classmethod
    def whole(cls, cache: KVCache) -> "GuidanceBranch":
        """The branch that attends to everything in a cache."""
        return cls(cache, cache.length, cache.position)

    @classmethod
    def after(cls, cache: KVCache, segments: Sequence[Segment]) -> "GuidanceBranch":
        """The branch that attends to `segments`, the first ones of a cache."""
        return cls(cache, sum(map(len, segments)), end_position(segments))


@dataclass
class NoisyImage:
    """An image during denoising.

    Args:
        tokens: (rows*columns, C) float32 latent tokens; each update replaces them.
        grid: number of latent tokens (rows, columns).
        conditional: the context with the whole prompt.
        text_free: the same without the last text; a prefix of the conditional context.
        image_free: the context with the prompt's texts alone; None without image guidance.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    guidance: Guidance
    conditional: GuidanceBranch
    text_free: GuidanceBranch
    image_free: GuidanceBranch | None = None

    def branches(self, t: float) -> list[GuidanceBranch]:
        """The branches that an update at time `t` evaluates, the conditional one first."""
        active = self.guidance.active(t)
        branches = [self.conditional]
        if active.text_free:
            branches.append(self.text_free)
        if active.image_free:
            assert self.image_free is not None
            branches.append(self.image_free)
        return branches


@dataclass
class EncodedPrompt:
    """A prompt as segments, and the caches of its contexts.

    Args:
        segments: in reading order, the system prompt first.
        guidance, grid: of the prompt's images; `grid` counts latent tokens (rows, columns).
        cache: the context with the whole prompt.
        image_free_cache: the context with the texts alone; None without image guidance.
    """

    segments: list[Segment]
    guidance: Guidance
    grid: tuple[int, int]
    cache: KVCache
    image_free_cache: KVCache | None = None

    @property
    def texts(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.kind == "text"]

    def contexts(self) -> list[tuple[KVCache, list[Segment]]]:
        """The prompt's caches, each with the segments that it must hold."""
        contexts = [(self.cache, self.segments)]
        if self.image_free_cache is not None:
            contexts.append((self.image_free_cache, self.texts))
        return contexts

    def noisy_image(self, noise: torch.Tensor, patch: int) -> NoisyImage:
        """An image of the prompt before the first update. Call it when the caches are complete.

        Args:
            noise: (C, H/8, W/8).
            patch: latent pixels per token, per side.
        """
        return NoisyImage(
            tokens=patchify(noise, patch),
            grid=self.grid,
            guidance=self.guidance,
            conditional=GuidanceBranch.whole(self.cache),
            text_free=GuidanceBranch.after(self.cache, self.segments[: before_last_text(self.segments)]),
            image_free=None if self.image_free_cache is None else GuidanceBranch.whole(self.image_free_cache),
        )


@dataclass
class Prepared:
    """What a call of the pipeline denoises: the encoded prompts, and the initial noise of every image.

    Args:
        prompts: one per prompt.
        noise: (C, H/8, W/8) float32 per image; the images of a prompt are consecutive.
    """

    prompts: list[EncodedPrompt]
    noise: list[torch.Tensor]

    def contexts(self) -> list[tuple[KVCache, list[Segment]]]:
        """All caches, each with the segments that it must hold."""
        return [context for prompt in self.prompts for context in prompt.contexts()]

    def noisy_images(self, patch: int, device: torch.device) -> list[NoisyImage]:
        """The images before the first update. Call it when the caches are complete."""
        per_prompt = len(self.noise) // len(self.prompts)
        prompts = [prompt for prompt in self.prompts for _ in range(per_prompt)]
        noise = [x.to(device, torch.float32) for x in self.noise]
        return [prompt.noisy_image(x, patch) for prompt, x in zip(prompts, noise, strict=True)]


@dataclass(frozen=True)
class BranchBatch:
    """The guidance branches of a group of images, packed for the transformer.

    Updates share it until a branch is dropped.

    Args:
        images: the images of the group.
        sequence: one sample per branch: the noised image.
        contexts: of each branch, for the transformer.
        image_index: index of the image that each branch belongs to.
        plan: the transformer's attention plan for `sequence` and `contexts`.
    """

    images: Sequence[NoisyImage]
    sequence: PackedSequence
    contexts: list
    image_index: list[int]
    plan: Any


def group_images(transformer: Any, images: Sequence[NoisyImage], t: float, limit: float) -> list[list[NoisyImage]]:
    """Split the images, in order, into groups whose activations in an update at time `t` need at most `limit` bytes.

    The branches of an image stay together, so that an image larger than the limit is a group of its own.
    """
    groups: list[list[NoisyImage]] = []
    used = 0.0
    for image in images:
        size = transformer.update_bytes(len(image.tokens) * len(image.branches(t)), transformer.dtype.itemsize)
        if not groups or used + size > limit:
            groups.append([])
            used = 0.0
        groups[-1].append(image)
        used += size
    return groups


def pack_branches(
    transformer: Any, images: Sequence[NoisyImage], t: float, tokens: SpecialTokens, pack: Callable
) -> BranchBatch:
    """Pack the branches that an update at time `t` evaluates. `pack` is the pipeline's method."""
    image_index = [index for index, image in enumerate(images) for _ in image.branches(t)]
    branches = [branch for image in images for branch in image.branches(t)]
    noised = [[image_segment("noise", images[index].grid, tokens)] for index in image_index]
    sequence = pack(noised, [branch.position for branch in branches])
    contexts = [branch.cache.first(branch.length) for branch in branches]
    return BranchBatch(images, sequence, contexts, image_index, transformer.plan(sequence, contexts))


def predict_velocity(transformer: Any, batch: BranchBatch, t: float) -> list[torch.Tensor]:
    """Guided velocity (noise - data) of every image of a batch at time `t`: one (n, C) float32 tensor each."""
    images = batch.images
    tokens = torch.cat([images[index].tokens for index in batch.image_index])  # (G, C)
    timestep = torch.full((1,), t, device=tokens.device)
    v = transformer(tokens, timestep, batch.sequence, contexts=batch.contexts, plan=batch.plan).sample.float()
    by_branch = iter(v.split([len(images[index].tokens) for index in batch.image_index]))
    velocities = []
    for image in images:
        active = image.guidance.active(t)
        conditional = next(by_branch)
        text_free = next(by_branch) if active.text_free else None
        image_free = next(by_branch) if active.image_free else None
        velocities.append(guide(conditional, text_free, image_free, image.guidance))
    return velocities


def take_step(
    scheduler: Any, images: Sequence[NoisyImage], velocities: list[torch.Tensor], timestep: torch.Tensor
) -> None:
    """Replace the tokens of all images by those after the scheduler's step."""
    tokens = torch.cat([image.tokens for image in images])
    tokens = scheduler.step(torch.cat(velocities), timestep, tokens, return_dict=False)[0]
    for image, part in zip(images, tokens.split([len(image.tokens) for image in images]), strict=True):
        image.tokens = part


def before_last_text(segments: Sequence[Segment]) -> int:
    """Number of segments before the last one if it is a text, else number of all segments."""
    return len(segments) - 1 if segments and segments[-1].kind == "text" else len(segments)
