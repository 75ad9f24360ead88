"""The sections of a training recipe for OmniGen2."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from echo4o.training.recipe import FullTuning, LoraTuning, Section, TrainingRecipe

TrainablePart = Literal["refiners", "layers", "embeddings"]
PARTS: tuple[TrainablePart, ...] = ("refiners", "layers", "embeddings")


class OmniGen2FullTuning(FullTuning):
    """Train the transformer's weights themselves, of the named parts; the others are frozen.

    `layers`: the joint layers; `refiners`: the blocks before them; `embeddings`: everything else.
    """

    parts: tuple[TrainablePart, ...] = Field(default=PARTS, min_length=1)  # pyright: ignore[reportIncompatibleVariableOverride]

    def describe(self) -> str:
        if set(self.parts) == set(PARTS):
            return "Full fine-tuning of the transformer; the language model and the VAE are frozen."
        return super().describe()


class OmniGen2LoraTuning(LoraTuning):
    """Train low-rank additions to matrices of all blocks. The defaults are the original's."""

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=8.0, gt=0)
    targets: Literal["attention", "all"] = "attention"  # all: the feed-forward's matrices as well
    initialization: Literal["gaussian", "kaiming"] = "gaussian"  # of the A matrices; B begins with zeros

    def describe(self) -> str:
        matrices = {"attention": "attention's matrices", "all": "matrices"}[self.targets]
        return f"LoRA of rank {self.rank} on the {matrices} of all blocks, everything else frozen."

    def target_modules(self, targets: dict[str, str]) -> str:
        return targets[self.targets]

    def initial_weights(self) -> bool | Literal["gaussian"]:
        return "gaussian" if self.initialization == "gaussian" else True


class OmniGen2Objective(Section):
    """Dropout of conditions, times, sizes of images and the loss; the defaults are the original's.

    `loss_normalization`: by the latent elements of the whole step ("step": the same result for any number of processes
    and micro-batches), or of each micro-batch, as in the original ("micro_batch"). Large images weigh more either way.
    """

    prefix_dropout: float = Field(default=0.5, ge=0, le=1)  # "The image shows ..." in text-to-image rows
    prompt_dropout: float = Field(default=0.0001, ge=0, le=1)
    reference_dropout: float = Field(default=0.5, ge=0, le=1)  # where the prompt is dropped
    time_shift: Literal["v1", "v2", "none"] = "v1"
    dynamic_time_shift: bool = True  # shift by each target's size, instead of that of the largest
    max_text_tokens: int = Field(default=888, gt=0)
    # by the number of references of a row; the last one holds for more
    max_input_pixels: tuple[int, ...] = Field(default=(1048576, 1048576, 589824, 262144), min_length=1)
    max_output_pixels: int = Field(default=1048576, gt=0)
    max_side_length: int = Field(default=2048, gt=0)
    loss_normalization: Literal["step", "micro_batch"] = "step"

    @model_validator(mode="after")
    def _check(self):
        if any(pixels <= 0 for pixels in self.max_input_pixels):
            raise ValueError(f"objective.max_input_pixels={list(self.max_input_pixels)} must be above 0.")
        return self

    def input_pixels(self, references: int) -> int:
        """Limit of pixels of each reference in a row with so many."""
        return self.max_input_pixels[min(references, len(self.max_input_pixels)) - 1]


class OmniGen2Recipe(TrainingRecipe):
    """A run of `echo4o train RECIPE.yaml` on OmniGen2."""

    # Models are frozen, so narrower types are safe; pyright takes fields for mutable.
    tune: Annotated[OmniGen2FullTuning | OmniGen2LoraTuning, Field(discriminator="method")] = OmniGen2FullTuning()  # pyright: ignore[reportIncompatibleVariableOverride]
    objective: OmniGen2Objective = OmniGen2Objective()  # pyright: ignore[reportIncompatibleVariableOverride]
