"""BLIP3-o as a backbone: rows of text and image to token ids and EVA-CLIP features, flow matching to these features.

The language model, the EVA-CLIP tower and the decoder are frozen. `echo4o dataset precompute` stores the features. It
stores the states of the queries as well where the queries do not train (LoRA, or `parts: [head]`), so that training
needs no language model. Where the queries train, the states change at every step. The keys and values of the text
before them do not, but they are neither stored (at the released size they take 57 kB per token in 16 bit) nor computed
apart from the queries: transformers drops a cache of keys and values under gradient checkpointing. The text is therefore
part of the forward and backward pass of every step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import Field
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from echo4o.modeling.blip3o.conditions_blip3o import query_states
from echo4o.modeling.blip3o.prompts_blip3o import CAPTION, encode, training_text
from echo4o.modeling.blip3o.release_sizes import release_configs
from echo4o.modeling.blip3o.transformer_blip3o import Blip3oTransformer2DModel
from echo4o.modeling.blip3o.vision_blip3o import EvaClipVisionModel
from echo4o.modeling.common.image_files import to_rgb
from echo4o.training.backbones import blip3o_costs
from echo4o.training.backbones.base import Backbone, LossTerm, named_generator
from echo4o.training.backbones.blip3o_objective import HeadCondition, TimeTable, add_noise, blip3o_errors
from echo4o.training.recipe import FullTuning, LoraTuning, RecipeError, Section, TrainingRecipe

TrainablePart = Literal["queries", "head"]
PARTS: tuple[TrainablePart, ...] = ("queries", "head")


# --- the recipe's sections ------------------------------------------------------------------------------------------


class Blip3oFullTuning(FullTuning):
    """Train the weights of the diffusion head and the learned queries; everything else is frozen."""

    parts: tuple[TrainablePart, ...] = Field(default=PARTS, min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]

    def describe(self) -> str:
        if set(self.parts) == set(PARTS):
            return "Full fine-tuning of the diffusion head and the queries; the other parts are frozen."
        return super().describe()


class Blip3oLoraTuning(LoraTuning):
    """Train low-rank additions to matrices of the diffusion head; the queries are frozen as well."""

    targets: Literal["attention", "all"] = "attention"  # all: the feed-forward's matrices as well

    def describe(self) -> str:
        matrices = {"attention": "attention's matrices", "all": "matrices"}[self.targets]
        return f"LoRA of rank {self.rank} on the {matrices} of the diffusion head, everything else frozen."

    def target_modules(self, targets: dict[str, str]) -> str:
        return targets[self.targets]


class Blip3oObjective(Section):
    """Template and dropout; the defaults are those of the released training code.

    `template: released` closes the empty answer before the queries, which generation does not; `matched` is the
    template of generation.
    """

    template: Literal["released", "matched"] = "released"
    condition_dropout: float = Field(default=0.1, ge=0, le=1)


class Blip3oRecipe(TrainingRecipe):
    """A run of `echo4o train RECIPE.yaml` on BLIP3-o."""

    # Models are frozen, so narrower types are safe; pyright takes fields for mutable.
    tune: Annotated[Blip3oFullTuning | Blip3oLoraTuning, Field(discriminator="method")] = Blip3oFullTuning()  # pyright: ignore[reportIncompatibleVariableOverride]
    objective: Blip3oObjective = Blip3oObjective()  # pyright: ignore[reportIncompatibleVariableOverride]
    quantize_language_model: Literal["nf4"] | None = None  # the frozen language model, in 4 bit

    @property
    def trains_queries(self) -> bool:
        return isinstance(self.tune, Blip3oFullTuning) and "queries" in self.tune.parts

    def _rules(self) -> list[tuple[bool, str]]:
        only_queries = isinstance(self.tune, Blip3oFullTuning) and self.tune.parts == ("queries",)
        muon = self.optimizer.name == "muon"
        cached = self.latents is not None and self.images is None and not self.trains_queries
        return [
            *super()._rules(),
            (muon and only_queries, "muon is for the layers' matrices: `queries` has none."),
            (
                cached and self.quantize_language_model is not None,
                "quantize_language_model has no effect: the cache holds what the language model computes.",
            ),
        ]


# --- rows, samples, batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blip3oRow:
    """A prepared row.

    Args:
        tokens: ids of the text with its template, up to and including `[IMG]`.
        features: (C, rows, columns) EVA-CLIP features of the image.
        states: (K, hidden) states of the queries; None if the queries train.
    """

    id: str
    tokens: tuple[int, ...]
    features: torch.Tensor
    states: torch.Tensor | None
    text_hash: str  # of the instruction, by which a cached row is recognised

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + (0 if self.states is None else self.states.nbytes)

    def to_cache(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {"features": self.features.contiguous()}
        if self.states is not None:
            tensors["states"] = self.states.contiguous()
        return tensors, {"instruction": self.text_hash}


@dataclass(frozen=True)
class Blip3oSample:
    """One row with the random choices of one epoch."""

    row: Blip3oRow
    noise: torch.Tensor  # (C, rows, columns)
    u: torch.Tensor  # () uniform in [0, 1), which picks the time
    dropped: bool  # the head gets the null condition
    full_length: int  # tokens of the language model, if it runs, and of the head

    @property
    def id(self) -> str:
        return self.row.id

    def __len__(self) -> int:
        return self.full_length


@dataclass(frozen=True)
class Blip3oBatch:
    """Samples of one forward pass."""

    ids: list[str]
    tokens: list[tuple[int, ...]]
    states: torch.Tensor | None  # (B, K, hidden)
    features: torch.Tensor  # (B, C, rows, columns)
    noise: torch.Tensor  # (B, C, rows, columns)
    u: torch.Tensor  # (B,)
    dropped: torch.Tensor  # (B,) bool
    num_tokens: int

    def to(self, device: torch.device | str) -> Blip3oBatch:
        """The same batch on `device`."""
        states = None if self.states is None else self.states.to(device)
        features, noise, u, dropped = (x.to(device) for x in (self.features, self.noise, self.u, self.dropped))
        return Blip3oBatch(self.ids, self.tokens, states, features, noise, u, dropped, self.num_tokens)


def collate(samples: Sequence[Blip3oSample]) -> Blip3oBatch:
    """Put samples into one batch."""
    rows = [sample.row for sample in samples]
    states = [row.states for row in rows if row.states is not None]
    return Blip3oBatch(
        ids=[row.id for row in rows],
        tokens=[row.tokens for row in rows],
        states=torch.stack(states) if states else None,
        features=torch.stack([row.features for row in rows]).float(),
        noise=torch.stack([sample.noise for sample in samples]),
        u=torch.stack([sample.u for sample in samples]),
        dropped=torch.tensor([sample.dropped for sample in samples]),
        num_tokens=sum(map(len, samples)),
    )


# --- the backbone ---------------------------------------------------------------------------------------------------


class Blip3oBackbone(Backbone):
    """BLIP3-o with its trainable head and queries."""

    recipe_class = Blip3oRecipe
    component_classes = {
        "transformer": Blip3oTransformer2DModel,
        "language_model": Qwen2_5_VLForConditionalGeneration,
        "vision_model": EvaClipVisionModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    }
    trained_components = ("transformer",)
    encoder_components = ("language_model", "vision_model")
    takes_references = False
    updated_by = "unet"
    release_configs = release_configs("8B")

    def __init__(self, pipeline, recipe: Blip3oRecipe):
        super().__init__(pipeline, recipe)
        self.objective, self.seed, self.special = recipe.objective, recipe.seed, pipeline.token_ids
        self.trains_queries = recipe.trains_queries
        # A copy: sharding splits the parameter.
        self.queries = None if self.trains_queries else pipeline.transformer.queries().detach().clone()
        self.table = TimeTable.of(pipeline.scheduler.config)
        config = pipeline.transformer.config
        self.room = pipeline.config.tokenizer_max_length - config.num_queries - 1  # tokens of a text
        if self.room < 1:
            raise RecipeError(f"tokenizer_max_length={self.room + config.num_queries + 1} has no room for a text.")
        if recipe.gradient_checkpointing and self.trains_queries:
            # The backward pass runs through the frozen layers; transformers checkpoints in training mode only.
            model = pipeline.language_model
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # 5.23
            enable({"use_reentrant": False})
            model.train()

    @classmethod
    def idle_components(cls, recipe: Any) -> tuple[str, ...]:
        """The decoder is for sample images; a cache replaces the encoders, but the language model if the queries train."""
        idle = [] if recipe.images else ["unet", "vae"]
        if recipe.latents is not None:
            idle.append("vision_model")
            if not recipe.images and not recipe.trains_queries:
                idle.append("language_model")
        return tuple(idle)

    @classmethod
    def quantized_components(cls, recipe: Any) -> tuple[str, ...]:
        return ("language_model",) if recipe.quantize_language_model else ()

    # --- rows ---

    def encoder_settings(self) -> dict[str, Any]:
        """The EVA-CLIP tower, and what the states of frozen queries depend on."""
        vision = self._vision_model
        settings: dict[str, Any] = {
            "vision_model": self._hashes["vision_model"],
            "vision_dtype": str(vision.dtype).removeprefix("torch."),
        }
        if not self.trains_queries:
            settings |= {
                "language_model": self._hashes["language_model"],
                "language_dtype": str(self.pipeline.language_model.dtype).removeprefix("torch."),
                "queries": self._hashes["queries"],
                "template": self.objective.template,
                "max_text_tokens": self.room,
            }
        return settings

    @cached_property
    def _hashes(self) -> dict[str, str]:
        model = self.pipeline.language_model
        hashes = {"vision_model": weights_hash(self._vision_model.state_dict())}
        if self.queries is not None:
            hashes["language_model"] = weights_hash(model.model.language_model.state_dict())
            hashes["queries"] = weights_hash({"queries": self.queries})
        return hashes

    @property
    def _vision_model(self) -> nn.Module:
        if self.pipeline.vision_model is None:
            raise RecipeError(
                "model: it has no vision_model (EVA-CLIP), which encodes the images to train on. Convert it together "
                "with eva_clip_vision_tower/pytorch_model.bin."
            )
        return self.pipeline.vision_model

    def prepare(self, rows: Sequence[dict]) -> Sequence[Blip3oRow]:
        """Tokenize rows with the dataset's features (images decoded to PIL) and encode their images."""
        return [self._prepare(row) for row in rows]

    def _prepare(self, row: dict) -> Blip3oRow:
        for name in ("id", "instruction"):
            if not isinstance(row[name], str):
                raise ValueError(f"its {name} is {row[name]!r}; give text.")
        if row.get("answer"):
            raise ValueError("it has an answer; BLIP3-o's language model is frozen, so only images train.")
        if references := row["reference_images"]:
            raise ValueError(f"it has {len(references)} references; BLIP3-o trains text to image only.")
        tokens = self.token_ids(row["instruction"])
        return Blip3oRow(
            id=row["id"],
            tokens=tokens,
            features=self.encode_image(to_rgb(row["image"], "its image")),
            states=None if self.trains_queries else self.states(tokens),
            text_hash=_text_hash(row["instruction"]),
        )

    def from_cache(self, row: dict, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Blip3oRow:
        """Raises ValueError if the row has another instruction than when the cache was made."""
        if facts["instruction"] != _text_hash(row["instruction"]):
            raise ValueError(f"row {row['id']} has another instruction than when the cache was made.")
        states = None if self.trains_queries else tensors["states"]
        tokens = self.token_ids(row["instruction"])
        return Blip3oRow(row["id"], tokens, tensors["features"], states, facts["instruction"])

    def token_ids(self, caption: str) -> tuple[int, ...]:
        """Ids of a caption with the recipe's template, cut as in the original, and of `[IMG]`."""
        text = training_text(CAPTION + caption, matched=self.objective.template == "matched")
        return (*encode(self.pipeline.tokenizer, text)[: self.room], self.special.image_start)

    @torch.no_grad()
    def encode_image(self, image) -> torch.Tensor:
        """EVA-CLIP features (C, rows, columns) of an RGB image, in the tower's dtype."""
        side = self.pipeline.transformer.config.sample_size
        _ = self._vision_model
        return self.pipeline.encode_image(image).T.unflatten(1, (side, side)).contiguous().cpu()

    @torch.no_grad()
    def states(self, tokens: Sequence[int]) -> torch.Tensor:
        """States (K, hidden) of the queries behind a text.

        Texts are encoded one by one: in a padded batch, the last bits would depend on the neighbours.
        """
        model = self.pipeline.language_model
        assert self.queries is not None
        return query_states(model, [tokens], self.queries.to(model.device), self.special.pad)[0].cpu()

    # --- samples ---

    def sample(self, prepared: Blip3oRow, epoch: int) -> Blip3oSample:
        def generator(purpose: str) -> torch.Generator:
            return named_generator(self.seed, prepared.id, epoch, purpose)

        u = torch.rand((), generator=generator("time"))
        dropped = bool(torch.rand((), generator=generator("dropout")) < self.objective.condition_dropout)
        return self._sample(prepared, generator("noise"), u, dropped)

    def validation_samples(self, prepared: Blip3oRow, times: Sequence[float]) -> list[Blip3oSample]:
        """One sample for each amount of noise; the table of times runs from noise to data."""
        draws = [named_generator(0, prepared.id, 0, "validation noise") for _ in times]
        return [self._sample(prepared, g, torch.tensor(1.0 - t), False) for g, t in zip(draws, times, strict=True)]

    def _sample(self, row: Blip3oRow, noise: torch.Generator, u: torch.Tensor, dropped: bool) -> Blip3oSample:
        head = self.pipeline.transformer
        length = head.num_tokens + head.config.num_queries + (len(row.tokens) if self.trains_queries else 0)
        return Blip3oSample(row, torch.randn(row.features.shape, generator=noise), u, dropped, length)

    def collate(self, samples: Sequence[Blip3oSample]) -> Blip3oBatch:
        return collate(samples)

    # --- losses ---

    def loss_weights(self) -> dict[str, float]:
        return {"mse": 1.0}

    def denominators(self, batch: Blip3oBatch) -> dict[str, float]:
        return {"mse": float(batch.noise.numel())}

    def losses(self, model: Any, batch: Blip3oBatch) -> dict[str, LossTerm]:
        noised = add_noise(batch.features, batch.noise, batch.u, self.table)
        condition = HeadCondition(batch.tokens, self.special.pad, batch.dropped, batch.states)
        errors = blip3o_errors(model.transformer, self.pipeline.language_model, noised, condition)
        sample = torch.arange(len(errors), device=errors.device).repeat_interleave(errors[0].numel())
        return {"mse": LossTerm(errors.flatten(), None, sample)}

    # --- costs ---

    def flops(self, batch: Blip3oBatch) -> float:
        head, total = self.pipeline.transformer, self.pipeline.transformer.flops(len(batch.ids))
        if batch.states is None:
            lengths = [len(tokens) + head.config.num_queries for tokens in batch.tokens]
            total += blip3o_costs.language_flops(self.pipeline.language_model.config, lengths)
        return total

    step_memory = staticmethod(blip3o_costs.step_memory)
    call_memory = staticmethod(blip3o_costs.call_memory)


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """A hash of a state dict in float32, whatever dtype it is stored in."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


BACKBONE = Blip3oBackbone
