"""From a row of the dataset to a training sample, and from samples to a batch.

A sample is a list of segments: `references (vae, vit) ..., instruction, picture to draw`, or, for a row with an
`answer` instead of a picture, `references (vit) ..., question, answer` with a loss on the answer's text. What is random
about it (condition dropout, the latents' sampling, noise and time) is drawn from generators named by the sample and the
epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from echo4o.modeling.bagel.image_processor_bagel import to_patches, to_pixels, to_rgb
from echo4o.modeling.bagel.segments_bagel import (
    PackedSequence,
    Segment,
    drop,
    image_segment,
    pack,
    patchify,
    text_segment,
)
from echo4o.training.objective import named_generator


@dataclass(frozen=True)
class Dropout:
    """Probabilities with which each condition is left out; the original's defaults."""

    text: float = 0.1
    vit: float = 0.3
    vae: float = 0.3


@dataclass(frozen=True)
class TrainingSample:
    """One sample with everything that was drawn for it."""

    id: str
    segments: list[Segment]
    noise: torch.Tensor  # (N, C) for the tokens of its noised pictures, in order
    raw_time: torch.Tensor  # (P,) one per noised picture; see objective.add_noise

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments if not segment.dropped)

    @property
    def full_length(self) -> int:
        """Tokens of the sample with all its conditions: no draw decides whether it is too long."""
        return sum(map(len, self.segments))


@dataclass(frozen=True)
class TrainingBatch:
    """Samples packed for one forward pass."""

    ids: list[str]
    sequence: PackedSequence
    noise: torch.Tensor  # (N, C)
    raw_time: torch.Tensor  # (P,)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The same batch on `device`."""
        return TrainingBatch(self.ids, self.sequence.to(device), self.noise.to(device), self.raw_time.to(device))


def collate(samples: Sequence[TrainingSample], latent_positions: int, patch_positions: int) -> TrainingBatch:
    """Pack samples; the two sides are those of the model's position tables."""
    return TrainingBatch(
        ids=[sample.id for sample in samples],
        sequence=pack(
            [sample.segments for sample in samples],
            latent_positions=latent_positions,
            patch_positions=patch_positions,
        ),
        noise=torch.cat([sample.noise for sample in samples]),
        raw_time=torch.cat([sample.raw_time for sample in samples]),
    )


@dataclass(frozen=True)
class PreparedRow:
    """A row after the work that every epoch would repeat: tokens, VAE moments, vision patches."""

    id: str
    text: tuple[int, ...]
    reference_moments: list[torch.Tensor]  # each (2*C, h, w): mean and log-variance
    reference_patches: list[tuple[tuple[int, int], torch.Tensor]]  # (grid, patches)
    moments: torch.Tensor | None  # of the picture to draw
    answer: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the row's tensors take."""
        tensors = [*self.reference_moments, *(patches for _, patches in self.reference_patches)]
        return sum(t.nbytes for t in tensors + ([] if self.moments is None else [self.moments]))


class SampleMaker:
    """Turns dataset rows into training samples for one pipeline's tokenizer, VAE and picture limits.

    Args:
        pipeline: an `Echo4oPipeline`; only its tokenizer, VAE and configuration are used.
        dropout: condition dropout.
        seed: the run's seed, first part of every draw's name.
    """

    def __init__(self, pipeline, dropout: Dropout, seed: int):
        self.tokenizer, self.vae, self.special = pipeline.tokenizer, pipeline.vae, pipeline.special_tokens
        self.vae_limits, self.vision_limits = pipeline.vae_limits, pipeline.vision_limits
        self.latent_patch = pipeline.transformer.config.latent_patch_size
        self.vit_patch = pipeline.vision_model.config.patch_size
        self.token_channels = pipeline.transformer.config.latent_channels * self.latent_patch**2
        self.dropout, self.seed = dropout, seed

    def prepare(self, rows: Sequence[dict]) -> list[PreparedRow]:
        """Tokenise, resize and encode rows with the dataset's features (pictures decoded to PIL)."""
        for row in rows:
            for name in ("id", "instruction"):
                if not isinstance(row[name], str):
                    raise ValueError(f"its {name} is {row[name]!r}; give text.")
        references = [[to_rgb(image) for image in row["reference_images"] or []] for row in rows]
        answers = [row.get("answer") for row in rows]
        to_encode = [to_rgb(row["image"], f"image of {row['id']}") for row, answer in zip(rows, answers) if not answer]
        to_encode += [image for images, answer in zip(references, answers) if not answer for image in images]
        moments = iter(self.encode(to_encode))
        targets = [None if answer else next(moments) for answer in answers]
        return [
            PreparedRow(
                id=row["id"],
                text=self.token_ids(row["instruction"]),
                reference_moments=[] if answer else [next(moments) for _ in images],
                reference_patches=[self.patches(image) for image in images],
                moments=target,
                answer=self.token_ids(answer) if answer else None,
            )
            for row, images, target, answer in zip(rows, references, targets, answers)
        ]

    def token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """VAE moments (2*C, h, w) of each picture at its own size.

        One by one: in a batch, the last bits of a picture's moments would depend on its neighbours, and a resumed run
        has other ones than an uninterrupted run.
        """
        pixels = [to_pixels(self.vae_limits.resize(image)).to(self.vae.device, self.vae.dtype) for image in images]
        return [self.vae.encode(picture[None]).latent_dist.parameters[0].float().cpu() for picture in pixels]

    def patches(self, image: Image.Image) -> tuple[tuple[int, int], torch.Tensor]:
        """Vision patches of the raw picture (training, unlike drawing, does not pass it through the VAE's size)."""
        pixels = to_pixels(self.vision_limits.resize(image))
        grid = (pixels.shape[1] // self.vit_patch, pixels.shape[2] // self.vit_patch)
        return grid, to_patches(pixels, self.vit_patch)

    def latent_tokens(self, moments: torch.Tensor, generator: torch.Generator) -> tuple[tuple[int, int], torch.Tensor]:
        """Sample from VAE moments -> grid, tokens (rows*columns, p*p*C) in the model's scale."""
        mean, logvar = moments.chunk(2)
        noise = torch.randn(mean.shape, generator=generator)
        sampled = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        latent = (sampled - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        patch = self.latent_patch
        return (latent.shape[1] // patch, latent.shape[2] // patch), patchify(latent, patch)

    def sample(self, row: PreparedRow, epoch: int) -> TrainingSample:
        """Draw everything random about a row for one epoch."""

        def named(purpose: str) -> torch.Generator:
            return named_generator(self.seed, row.id, epoch, purpose)

        if row.answer is not None:
            pictures = [image_segment("vit", grid, self.special, patches) for grid, patches in row.reference_patches]
            texts = [text_segment(row.text, self.special), text_segment(row.answer, self.special, loss=True)]
            return TrainingSample(row.id, [*pictures, *texts], torch.zeros(0, self.token_channels), torch.zeros(0))

        latents = named("latents")

        def latent_segment(kind: str, moments: torch.Tensor) -> Segment:
            grid, tokens = self.latent_tokens(moments, latents)
            return image_segment(kind, grid, self.special, tokens)

        segments = []
        for moments, (grid, patches) in zip(row.reference_moments, row.reference_patches):
            segments.append(latent_segment("vae", moments))
            segments.append(image_segment("vit", grid, self.special, patches))
        segments.append(text_segment(row.text, self.special))
        chance = torch.rand(len(segments), generator=named("dropout")).tolist()
        segments = [drop(s) if c < getattr(self.dropout, s.kind) else s for s, c in zip(segments, chance)]
        target = latent_segment("noise", row.moments)
        noise = torch.randn(target.data.shape, generator=named("noise"))
        return TrainingSample(row.id, [*segments, target], noise, torch.randn(1, generator=named("time")))
