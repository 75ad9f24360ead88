"""The interface between the trainer and a model.

The trainer knows recipes, rows, steps, processes and checkpoints. A [`Backbone`] knows one model: which components
train, how a row becomes a sample and samples become a batch, the losses of a batch, and what a step costs.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import nn

from echo4o.training.recipe import TrainingRecipe, ValidationSettings


class PreparedRow(Protocol):
    """A tokenized and encoded row, shared by all epochs."""

    @property
    def id(self) -> str: ...

    @property
    def nbytes(self) -> int:
        """Memory of the row's tensors."""
        ...

    def to_cache(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Named tensors to store, and JSON facts that [`Backbone.from_cache`] needs beside them."""
        ...


class TrainingSample(Protocol):
    """One prepared row with the random choices of one epoch."""

    @property
    def id(self) -> str: ...

    @property
    def full_length(self) -> int:
        """Tokens with all conditions present; whether a sample is too long does not depend on dropout."""
        ...

    def __len__(self) -> int:
        """Tokens of this sample, without dropped conditions, for packing."""
        ...


class TrainingBatch(Protocol):
    """Samples of one forward pass."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: torch.device | str) -> Self: ...


class RowPreparation(Protocol):
    """The methods of a backbone that read rows; a latent cache can replace them."""

    def prepare(self, rows: Sequence[dict]) -> Sequence[Any]: ...

    def sample(self, prepared: Any, epoch: int) -> Any: ...

    def noise_levels(self, settings: ValidationSettings) -> list[float]: ...

    def validation_samples(self, prepared: Any, times: Sequence[float]) -> Sequence[Any]: ...


class WrappedPreparation:
    """Does what another preparation does. Derived classes change one step of it, for example what is prepared."""

    def __init__(self, source: RowPreparation):
        self.source = source

    def prepare(self, rows: Sequence[dict]) -> Sequence[Any]:
        return self.source.prepare(rows)

    def sample(self, prepared: Any, epoch: int) -> Any:
        return self.source.sample(prepared, epoch)

    def noise_levels(self, settings: ValidationSettings) -> list[float]:
        return self.source.noise_levels(settings)

    def validation_samples(self, prepared: Any, times: Sequence[float]) -> Sequence[Any]:
        return self.source.validation_samples(prepared, times)


class LossTerm(NamedTuple):
    """One loss of a batch before any reduction; the trainer sums numerators and denominators over processes.

    The mean loss is `(values * weights).sum() / weights.sum()`.
    """

    values: torch.Tensor  # (N,) or (N, C)
    weights: torch.Tensor | None  # (N,); None: every value weighs 1
    sample: torch.Tensor  # (N,) index into the batch's ids
    correct: torch.Tensor | None = None  # (N,) for text, without gradients: whether the likeliest token is the label

    def weighted_sum(self) -> torch.Tensor:
        return (self.values if self.weights is None else self.values * self.weights).sum()


class StepMemory(NamedTuple):
    """Bytes of one forward and backward pass of one process, without weights and gradients."""

    activations: float  # kept between forward and backward pass, `recomputed` included
    recomputed: float  # of these: one layer, recomputed under gradient checkpointing
    workspace: float  # inside the widest operation of the backward pass
    encoding: float  # encoding one image of the largest size
    description: str  # what was assumed, for the plan's notes


class ImageCall(NamedTuple):
    """A call of the pipeline to plan: `batch` prompts of one image each, with references of the largest size."""

    height: int | None  # pixels; None: the largest
    width: int | None
    batch: int = 1
    references: int = 1
    text_tokens: int = 128  # of each prompt


class CallMemory(NamedTuple):
    """What a call of the pipeline needs, in bytes unless named otherwise."""

    height: int  # pixels
    width: int
    branches: int  # guidance branches that an update evaluates
    caches: float  # contexts of all prompts
    update: float  # activations of one update
    reference_side: int  # pixels of the largest reference to encode; 0 without references


@dataclass(frozen=True)
class Precision:
    """Bytes per value in a training step.

    Args:
        compute: inputs of matrix products and attention.
        residual: the stream between layers; wider than `compute` where float32 weights run under autocast.
    """

    compute: int = 4
    residual: int = 4


class Backbone(ABC):
    """One model as the trainer sees it. Subclasses implement all of its methods.

    Args:
        pipeline: the loaded pipeline; its components are used as they are.
        recipe: of the class [`recipe_class`].
    """

    recipe_class: ClassVar[type[TrainingRecipe]]
    component_classes: ClassVar[dict[str, type]]  # weighted components by name, for planning without weights
    trained_components: ClassVar[tuple[str, ...]]  # those whose weights or adapters can train
    # Frozen components that encode rows in 16 bit where the run computes in 16 bit
    encoder_components: ClassVar[tuple[str, ...]] = ()
    takes_references: ClassVar[bool] = True  # whether prompts can have reference images
    rows_at_once: int = 1  # that `echo4o dataset precompute` prepares in one call
    updated_by: ClassVar[str] = "transformer"  # the component that an update of the image's latents runs
    release_configs: ClassVar[dict[str, dict]]  # configurations of the released checkpoint, by component

    def __init__(self, pipeline, recipe: TrainingRecipe):
        self.pipeline, self.recipe = pipeline, recipe

    @classmethod
    def idle_components(cls, recipe: Any) -> tuple[str, ...]:
        """Frozen components that a run does not compute with; they stay on the CPU.

        By default the encoders, if a cache holds what they would compute and no sample images are generated.
        """
        cached = recipe.latents is not None or recipe.distill is not None
        return cls.encoder_components if cached and recipe.images is None else ()

    @classmethod
    def quantized_components(cls, recipe: Any) -> tuple[str, ...]:
        """Frozen components that the recipe loads in 4 bit."""
        return ()

    @abstractmethod
    def encoder_settings(self) -> dict[str, Any]:
        """Everything that cached tensors depend on apart from the row: fingerprints and sizes (JSON values)."""

    @abstractmethod
    def prepare(self, rows: Sequence[dict]) -> Sequence[PreparedRow]:
        """Tokenize and encode rows with the dataset's features, images decoded. Raises ValueError for a bad row."""

    @abstractmethod
    def from_cache(self, row: dict, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> PreparedRow:
        """The prepared row from what [`PreparedRow.to_cache`] stored; equal to `prepare` bit for bit."""

    @abstractmethod
    def sample(self, prepared: Any, epoch: int) -> TrainingSample:
        """Sample everything random about a row for one epoch, from generators seeded by the row and the epoch."""

    def noise_levels(self, settings: ValidationSettings) -> list[float]:
        """The times at which rows are validated."""
        return settings.noise_levels()

    def validation_samples(self, prepared: Any, times: Sequence[float]) -> Sequence[TrainingSample]:
        """The samples that validate a row, with all its conditions: one for each time, or one if it has no noise.

        Random numbers come from generators named by the row alone, not by the recipe's seed.

        Args:
            times: amounts of noise between 0 (clean) and 1 (noise alone).

        Raises:
            ValueError: the backbone cannot validate.
        """
        raise ValueError(f"validation: backbone {self.recipe.backbone} has no samples at fixed times.")

    # --- distillation (training/distillation.py): a velocity at a time under the conditions of a row ---

    def latent_shape(self, row: dict, height: int | None, width: int | None) -> tuple[int, ...]:
        """The shape of the latent that the pipeline generates for a row. None: the pipeline's default in pixels."""
        raise self._not_distilled()

    def generation_times(self, steps: int, latent_shape: Sequence[int]) -> list[float]:
        """Amounts of noise before each of the pipeline's updates and after the last: from 1 to 0, `steps` + 1 numbers."""
        raise self._not_distilled()

    def conditions(self, row: dict) -> PreparedRow:
        """A row without its target, encoded as in a call of the pipeline."""
        raise self._not_distilled()

    def line_sample(
        self, prepared: Any, image: torch.Tensor, noise: torch.Tensor, time: float, references: torch.Generator
    ) -> TrainingSample:
        """A sample with all conditions at a point of the straight line from `image` to `noise`.

        Args:
            prepared: of [`conditions`].
            image, noise: latents as in the pipeline.
            time: amount of noise, in (0, 1].
            references: samples the latents of reference images, in the order of a call.
        """
        raise self._not_distilled()

    def _not_distilled(self) -> ValueError:
        return ValueError(f"backbone {self.recipe.backbone} cannot be distilled.")

    # --- batches ---

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> TrainingBatch:
        """Pack samples into one batch on the CPU."""

    @abstractmethod
    def loss_weights(self) -> dict[str, float]:
        """Name of each loss and its weight in the total, in the order in which they are logged."""

    @abstractmethod
    def denominators(self, batch: Any) -> dict[str, float]:
        """For each loss the sum of its weights in the batch, known before the forward pass."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> dict[str, LossTerm]:
        """One forward pass of the components in `model` (attributes named as in `trained_components`)."""

    @abstractmethod
    def flops(self, batch: Any) -> float:
        """Floating point operations of matrix products in one forward and backward pass, without recomputation."""

    @staticmethod
    @abstractmethod
    def step_memory(
        recipe: Any,
        components: dict[str, nn.Module],
        index: dict,
        num_processes: int,
        precision: Precision,
    ) -> StepMemory:
        """What a step of one process needs.

        Args:
            components: models by name, on the meta device, set up to train as the recipe says.
            index: the checkpoint's model_index.json; empty for the release.
        """

    @staticmethod
    @abstractmethod
    def call_memory(components: dict[str, nn.Module], index: dict, call: ImageCall, itemsize: int) -> CallMemory:
        """What a call of the pipeline needs; arguments as in [`step_memory`], `itemsize` in bytes per value."""


def named_generator(seed: int, sample_id: str, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by a hash of its arguments.

    A run therefore samples the same numbers for any batching and number of processes.
    """
    name = f"{seed}\0{epoch}\0{purpose}\0{sample_id}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big"))
