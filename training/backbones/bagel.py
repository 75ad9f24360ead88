"""BAGEL as a backbone: rows to segments, segments to packed batches, flow matching and cross-entropy.

A sample is a list of segments: `references (vae, vit) ..., instruction, target image`. A row with an `answer` instead
of an image becomes `references (vit) ..., question, answer` with a loss on the answer's text.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from pydantic import Field, model_validator
from torch import nn

from echo4o.dataset_scripts.images import MAX_PIXELS
from echo4o.modeling.bagel.image_processor_bagel import to_patches
from echo4o.modeling.bagel.segments_bagel import (
    PackedSequence,
    Segment,
    drop,
    image_segment,
    pack,
    patchify,
    text_segment,
)
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.modeling.common.image_files import to_rgb
from echo4o.modeling.common.images import to_pixels
from echo4o.training.backbones import bagel_costs
from echo4o.training.backbones.bagel_objective import add_noise, bagel_losses, raw_time_of
from echo4o.training.backbones.base import Backbone, LossTerm, named_generator
from echo4o.training.recipe import FullTuning, LoraTuning, Section, TrainingRecipe

Expert = Literal["gen", "und"]
TrainablePart = Literal["gen", "und", "text", "vision"]
PARTS: tuple[TrainablePart, ...] = ("gen", "und", "text", "vision")


# --- the recipe's sections ------------------------------------------------------------------------------------------


class BagelFullTuning(FullTuning):
    """Train the weights themselves, of the named parts; the others are frozen.

    `gen`: the generation expert with the latent in- and outputs; `und`: the understanding expert; `text`: token
    embedding and language head; `vision`: the vision tower and its connector.
    """

    parts: tuple[TrainablePart, ...] = Field(default=PARTS, min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]

    def describe(self) -> str:
        if set(self.parts) == set(PARTS):
            return "Full fine-tuning of all weights but the VAE's."
        return super().describe()


class BagelLoraTuning(LoraTuning):
    """Train low-rank additions to the experts' matrices; everything else is frozen."""

    experts: tuple[Expert, ...] = Field(default=("gen",), min_length=1)

    def describe(self) -> str:
        experts = " and ".join({"gen": "generation", "und": "understanding"}[e] for e in self.experts)
        return f"LoRA of rank {self.rank} on the {experts} expert, everything else frozen."

    def target_modules(self, targets: dict[str, str]) -> str:
        return targets["both" if len(set(self.experts)) == 2 else self.experts[0]]


class BagelObjective(Section):
    """Losses (tests/parity/golden/README.md) and dropout of conditions; the defaults are the original's."""

    time_shift: float = Field(default=1.0, gt=0)
    mse_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    ce_reweight: bool = False  # each text's labels weigh 1/sqrt(n) instead of 1
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    vit_dropout: float = Field(default=0.3, ge=0, le=1)
    vae_dropout: float = Field(default=0.3, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self):
        if self.mse_weight == 0 and self.ce_weight == 0:
            raise ValueError("objective.mse_weight and objective.ce_weight are both 0: nothing would be trained.")
        return self

    def dropout(self, kind: str) -> float:
        """Probability that a condition segment of this kind is left out."""
        return {"text": self.text_dropout, "vit": self.vit_dropout, "vae": self.vae_dropout}[kind]


class BagelRecipe(TrainingRecipe):
    """A run of `echo4o train RECIPE.yaml` on BAGEL."""

    # Models are frozen, so narrower types are safe; pyright takes fields for mutable.
    tune: Annotated[BagelFullTuning | BagelLoraTuning, Field(discriminator="method")] = BagelFullTuning()  # pyright: ignore[reportIncompatibleVariableOverride]
    objective: BagelObjective = BagelObjective()  # pyright: ignore[reportIncompatibleVariableOverride]

    def _rules(self) -> list[tuple[bool, str]]:
        only_text = isinstance(self.tune, BagelFullTuning) and self.tune.parts == ("text",)
        muon = self.optimizer.name == "muon"
        return [*super()._rules(), (muon and only_text, "muon is for the layers' matrices: `text` has none.")]


# --- rows, samples, batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BagelRow:
    """A prepared row: tokens, VAE moments, vision patches."""

    id: str
    text: tuple[int, ...]
    reference_moments: list[torch.Tensor]  # each (2*C, h, w): mean and log-variance
    reference_patches: list[tuple[tuple[int, int], torch.Tensor]]  # (grid, patches (rows*columns, p*p*3))
    moments: torch.Tensor | None  # (2*C, h, w) of the target image
    answer: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        tensors = [*self.reference_moments, *(patches for _, patches in self.reference_patches)]
        return sum(t.nbytes for t in tensors + ([] if self.moments is None else [self.moments]))

    def to_cache(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Moments in float32, patches as the bytes they were made from."""
        tensors = {} if self.moments is None else {"moments": self.moments.contiguous()}
        for index, moments in enumerate(self.reference_moments):
            tensors[f"{index}.moments"] = moments.contiguous()
        for index, (_, patches) in enumerate(self.reference_patches):
            tensors[f"{index}.patches"] = pixels_to_bytes(patches)
        grids = [grid for grid, _ in self.reference_patches]
        return tensors, {
            "grids": grids,
            "target": self.moments is not None,
            "references": len(self.reference_moments),
        }


def pixels_to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] -> uint8. [`bytes_to_pixels`] restores the same bits."""
    stored = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(bytes_to_pixels(stored), pixels)
    return stored


def bytes_to_pixels(stored: torch.Tensor) -> torch.Tensor:
    """uint8 -> pixels in [-1, 1], with the arithmetic of `to_pixels`."""
    return (stored.float() / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class BagelSample:
    """One sample with its segments, noise and times."""

    id: str
    segments: list[Segment]
    noise: torch.Tensor  # (N, C) for the tokens of its noised images, in order
    raw_time: torch.Tensor  # (P,) one per noised image; see `add_noise`

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments if not segment.dropped)

    @property
    def full_length(self) -> int:
        """Tokens with all conditions present; whether a sample is too long does not depend on dropout."""
        return sum(map(len, self.segments))


@dataclass(frozen=True)
class BagelBatch:
    """Samples packed for one forward pass."""

    ids: list[str]
    sequence: PackedSequence
    noise: torch.Tensor  # (N, C)
    raw_time: torch.Tensor  # (P,)

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.input_ids) + len(self.sequence.gen_segment)

    def to(self, device: torch.device | str) -> BagelBatch:
        """The same batch on `device`."""
        return BagelBatch(self.ids, self.sequence.to(device), self.noise.to(device), self.raw_time.to(device))


def collate(samples: Sequence[BagelSample], latent_positions: int, patch_positions: int) -> BagelBatch:
    """Pack samples. The last two arguments are the sides of the model's position tables."""
    return BagelBatch(
        ids=[sample.id for sample in samples],
        sequence=pack(
            [sample.segments for sample in samples],
            latent_positions=latent_positions,
            patch_positions=patch_positions,
        ),
        noise=torch.cat([sample.noise for sample in samples]),
        raw_time=torch.cat([sample.raw_time for sample in samples]),
    )


# --- the backbone ---------------------------------------------------------------------------------------------------


class BagelBackbone(Backbone):
    """BAGEL with its two experts, vision tower and frozen VAE."""

    recipe_class = BagelRecipe
    component_classes = {
        "transformer": BagelTransformer2DModel,
        "vision_model": BagelVisionModel,
        "vae": AutoencoderKL,
    }
    trained_components = ("transformer", "vision_model")
    release_configs = {  # BAGEL's own sizes are the defaults of our classes; the VAE is FLUX's
        "transformer": {},
        "vision_model": {},
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    }

    def __init__(self, pipeline, recipe: BagelRecipe):
        super().__init__(pipeline, recipe)
        self.objective, self.seed = recipe.objective, recipe.seed
        self.tokenizer, self.vae, self.special = pipeline.tokenizer, pipeline.vae, pipeline.special_tokens
        self.max_references = pipeline.config.get("max_references", 4)
        self.vae_limits, self.vision_limits = pipeline.vae_limits, pipeline.vision_limits
        transformer, vision = pipeline.transformer.config, pipeline.vision_model.config
        self.latent_positions, self.patch_positions = transformer.max_latent_size, vision.max_patches_per_side
        self.latent_patch, self.vit_patch = transformer.latent_patch_size, vision.patch_size
        self.token_channels = transformer.latent_channels * self.latent_patch**2

    # --- rows ---

    def encoder_settings(self) -> dict[str, Any]:
        """The VAE's encoder, both image limits and the patch size."""
        return {
            "vae": vae_encoder_hash(self.vae),
            "vae_limits": asdict(self.vae_limits),
            "vision_limits": asdict(self.vision_limits),
            "vit_patch": self.vit_patch,
        }

    def prepare(self, rows: Sequence[dict]) -> Sequence[BagelRow]:
        """Tokenize, resize and encode rows with the dataset's features (images decoded to PIL)."""
        for row in rows:
            for name in ("id", "instruction"):
                if not isinstance(row[name], str):
                    raise ValueError(f"its {name} is {row[name]!r}; give text.")
            if not row["instruction"].strip():
                raise ValueError("its instruction is empty.")
            if len(row["reference_images"] or []) > self.max_references:
                raise ValueError(
                    f"it has {len(row['reference_images'])} references; the model takes {self.max_references}."
                )
        references = [
            [to_rgb(image, f"a reference of {row['id']}", MAX_PIXELS) for image in row["reference_images"] or []]
            for row in rows
        ]
        answers = [row.get("answer") for row in rows]
        to_encode = [
            to_rgb(row["image"], f"image of {row['id']}", MAX_PIXELS)
            for row, answer in zip(rows, answers)
            if not answer
        ]
        to_encode += [image for images, answer in zip(references, answers) if not answer for image in images]
        moments = iter(self.encode(to_encode))
        targets = [None if answer else next(moments) for answer in answers]
        return [
            BagelRow(
                id=row["id"],
                text=self.token_ids(row["instruction"]),
                reference_moments=[] if answer else [next(moments) for _ in images],
                reference_patches=[self.patches(image) for image in images],
                moments=target,
                answer=self.token_ids(answer) if answer else None,
            )
            for row, images, target, answer in zip(rows, references, targets, answers)
        ]

    def from_cache(self, row: dict, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> BagelRow:
        answer, grids = row.get("answer"), facts["grids"]
        patches = [bytes_to_pixels(tensors[f"{index}.patches"]) for index in range(len(grids))]
        return BagelRow(
            id=row["id"],
            text=self.token_ids(row["instruction"]),
            reference_moments=[tensors[f"{index}.moments"] for index in range(facts["references"])],
            reference_patches=[(tuple(grid), p) for grid, p in zip(grids, patches)],
            moments=tensors["moments"] if facts["target"] else None,
            answer=self.token_ids(answer) if answer else None,
        )

    def token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """VAE moments (2*C, h, w) of each image at its own size.

        Images are encoded one by one: in a batch, the last bits would depend on the neighbours, which differ after a
        resume.
        """
        pixels = [to_pixels(self.vae_limits.resize(image)).to(self.vae.device, self.vae.dtype) for image in images]
        return [self.vae.encode(image[None]).latent_dist.parameters[0].float().cpu() for image in pixels]

    def patches(self, image: Image.Image) -> tuple[tuple[int, int], torch.Tensor]:
        """Vision patches of the original image; generation resizes it to a size for the VAE first, training does not."""
        pixels = to_pixels(self.vision_limits.resize(image))
        grid = (pixels.shape[1] // self.vit_patch, pixels.shape[2] // self.vit_patch)
        return grid, to_patches(pixels, self.vit_patch)

    # --- samples ---

    def latent_tokens(self, moments: torch.Tensor, generator: torch.Generator) -> tuple[tuple[int, int], torch.Tensor]:
        """Sample from VAE moments -> grid, tokens (rows*columns, p*p*C) in the model's scale."""
        mean, logvar = moments.chunk(2)
        noise = torch.randn(mean.shape, generator=generator)
        sampled = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        latent = (sampled - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        patch = self.latent_patch
        return (latent.shape[1] // patch, latent.shape[2] // patch), patchify(latent, patch)

    def sample(self, prepared: BagelRow, epoch: int) -> BagelSample:
        row = prepared

        def generator(purpose: str) -> torch.Generator:
            return named_generator(self.seed, row.id, epoch, purpose)

        if row.answer is not None:
            return self._question(row)
        latents = generator("latents")
        segments = self._conditions(row, latents)
        chances = torch.rand(len(segments), generator=generator("dropout")).tolist()
        segments = [drop(s) if chance < self.objective.dropout(s.kind) else s for s, chance in zip(segments, chances)]
        target = self._target(row, latents)
        assert target.data is not None
        noise = torch.randn(target.data.shape, generator=generator("noise"))
        return BagelSample(row.id, [*segments, target], noise, torch.randn(1, generator=generator("time")))

    def validation_samples(self, prepared: BagelRow, times: Sequence[float]) -> list[BagelSample]:
        if prepared.answer is not None:
            return [self._question(prepared)]
        latents = named_generator(0, prepared.id, 0, "validation latents")
        segments = [*self._conditions(prepared, latents), self._target(prepared, latents)]
        assert segments[-1].data is not None
        noise = torch.randn(segments[-1].data.shape, generator=named_generator(0, prepared.id, 0, "validation noise"))
        raw_times = [raw_time_of(time, self.objective.time_shift) for time in times]
        return [BagelSample(prepared.id, segments, noise, torch.tensor([raw_time])) for raw_time in raw_times]

    # --- distillation ---

    def latent_shape(self, row: dict, height: int | None, width: int | None) -> tuple[int, ...]:
        images, side = row["reference_images"] or [], self.vae_limits.max_size
        own_width, own_height = self.vae_limits.size(*images[-1].size) if images else (side, side)
        factor = self.pipeline.vae_scale_factor
        return self.vae.config.latent_channels, (height or own_height) // factor, (width or own_width) // factor

    def generation_times(self, steps: int, latent_shape: Sequence[int]) -> list[float]:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        return [float(sigma) for sigma in scheduler.sigmas]

    def conditions(self, row: dict) -> BagelRow:
        if row.get("answer"):
            raise ValueError("it has an answer, and only images are distilled.")
        images = [to_rgb(image, f"a reference of {row['id']}", MAX_PIXELS) for image in row["reference_images"] or []]
        return BagelRow(
            id=row["id"],
            text=self.token_ids(row["instruction"]),
            reference_moments=self.encode(images),
            reference_patches=[self.patches(self.vae_limits.resize(image)) for image in images],
            moments=None,
        )

    def line_sample(
        self, prepared: BagelRow, image: torch.Tensor, noise: torch.Tensor, time: float, references: torch.Generator
    ) -> BagelSample:
        patch = self.latent_patch
        grid = (image.shape[1] // patch, image.shape[2] // patch)
        target = image_segment("noise", grid, self.special, patchify(image, patch))
        raw_time = torch.tensor([raw_time_of(time, self.objective.time_shift)])
        segments = [*self._conditions(prepared, references), target]
        return BagelSample(prepared.id, segments, patchify(noise, patch), raw_time)

    # --- parts of samples, batches ---

    def _question(self, row: BagelRow) -> BagelSample:
        assert row.answer is not None
        images = [image_segment("vit", grid, self.special, patches) for grid, patches in row.reference_patches]
        texts = [text_segment(row.text, self.special), text_segment(row.answer, self.special, loss=True)]
        return BagelSample(row.id, [*images, *texts], torch.zeros(0, self.token_channels), torch.zeros(0))

    def _conditions(self, row: BagelRow, latents: torch.Generator) -> list[Segment]:
        """The references and the instruction of a row with a target image."""
        segments = []
        for moments, (grid, patches) in zip(row.reference_moments, row.reference_patches):
            segments.append(self._latent_segment("vae", moments, latents))
            segments.append(image_segment("vit", grid, self.special, patches))
        return [*segments, text_segment(row.text, self.special)]

    def _target(self, row: BagelRow, latents: torch.Generator) -> Segment:
        assert row.moments is not None
        return self._latent_segment("noise", row.moments, latents)

    def _latent_segment(self, kind: str, moments: torch.Tensor, latents: torch.Generator) -> Segment:
        grid, tokens = self.latent_tokens(moments, latents)
        return image_segment(kind, grid, self.special, tokens)

    def collate(self, samples: Sequence[BagelSample]) -> BagelBatch:
        return collate(samples, self.latent_positions, self.patch_positions)

    # --- losses ---

    def loss_weights(self) -> dict[str, float]:
        return {"mse": self.objective.mse_weight, "ce": self.objective.ce_weight}

    def denominators(self, batch: BagelBatch) -> dict[str, float]:
        labelled = batch.sequence.labels >= 0
        if self.objective.ce_reweight:
            labels = float(batch.sequence.label_weights[labelled].sum())
        else:
            labels = float(labelled.sum())
        return {"mse": float(batch.noise.numel()), "ce": labels}

    def losses(self, model: Any, batch: BagelBatch) -> dict[str, LossTerm]:
        sequence, noised = batch.sequence, None
        if sequence.latents is not None:
            noised = add_noise(sequence, batch.noise, batch.raw_time, self.objective.time_shift)
        terms = bagel_losses(model.transformer, model.vision_model, sequence, noised)
        noised_sample = sequence.segment_sample[sequence.gen_segment[sequence.gen_noised]]
        labelled_sample = sequence.segment_sample[sequence.und_segment[sequence.labels >= 0]]
        weights = terms.weights if self.objective.ce_reweight else None
        return {
            "mse": LossTerm(terms.mse, None, noised_sample),
            "ce": LossTerm(terms.cross_entropy, weights, labelled_sample, terms.correct),
        }

    # --- costs ---

    def flops(self, batch: BagelBatch) -> float:
        sequence, transformer, vision = batch.sequence, self.pipeline.transformer, self.pipeline.vision_model
        inputs_train = transformer.embed_tokens.weight.requires_grad or vision.trains()
        labels = int((sequence.labels >= 0).sum())
        return transformer.flops(sequence.spans, labels, inputs_train) + vision.flops(sequence.patch_lengths)

    step_memory = staticmethod(bagel_costs.step_memory)
    call_memory = staticmethod(bagel_costs.call_memory)


def vae_encoder_hash(vae: nn.Module) -> str:
    """A hash of the encoder's weights in float32, whatever dtype they are stored in."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


BACKBONE = BagelBackbone
