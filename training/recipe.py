"""What a training run is, in one file: unknown keys, impossible values and settings without effect are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Strict):
    """Which rows to train on: anything with the features of Echo-4o-Image."""

    path: str  # folder of Parquet files, folder saved by `datasets`, or Hub repository
    name: str | None = None  # configuration of the dataset
    split: str = "train"


class Objective(_Strict):
    """The losses (golden/bagel/README.md) and the dropout of conditions; defaults are the original's."""

    time_shift: float = Field(1.0, gt=0)
    mse_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(1.0, ge=0)
    ce_reweight: bool = False  # each text's labels weigh 1/sqrt(n) instead of 1
    text_dropout: float = Field(0.1, ge=0, le=1)
    vit_dropout: float = Field(0.3, ge=0, le=1)
    vae_dropout: float = Field(0.3, ge=0, le=1)


class Optimizer(_Strict):
    """`muon` updates the layers' matrices by orthogonalised momentum (at `muon_lr`) and the rest by AdamW (at `lr`)."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(2e-5, gt=0)
    muon_lr: float | None = Field(None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_muon(self):
        if (self.name == "muon") != (self.muon_lr is not None):
            raise ValueError("`muon_lr` belongs to `name: muon`: give both or neither.")
        return self


class Recipe(_Strict):
    """A run of `python -m echo4o.training.train RECIPE.yaml`."""

    model: str  # pipeline folder or Hub repository to start from
    output_dir: Path
    data: Data
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    steps: int = Field(gt=0)  # optimizer steps
    max_seconds: float | None = Field(None, gt=0)  # stop, with the schedule run to its end, when this comes first
    batch_size: int = Field(gt=0)  # samples per optimizer step, over all processes
    micro_batch_size: int | None = Field(None, gt=0)  # samples per forward pass and process; None: no accumulation
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Literal["no", "bf16"] = "no"
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_sizes(self):
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={self.micro_batch_size}."
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.optimizer.warmup_steps} must be below steps={self.steps}.")
        return self


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names each key and what is wrong with it."""


def load_recipe(path: str | Path, changes: dict | None = None) -> Recipe:
    """Read a YAML recipe. Relative paths in it are relative to the working folder.

    Args:
        changes: settings that replace the file's, by dotted name: `{"optimizer.lr": 1e-4}`.

    Raises:
        RecipeError: the file is unreadable or a setting is unknown or impossible; all of them are listed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no mapping of settings.")
    for name, value in (changes or {}).items():
        *parents, key = name.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{describe(error)}") from error


def describe(error: ValidationError) -> str:
    """One line per wrong setting, as `key: what is wrong (given: value)`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "recipe"
        known = "" if item["type"] != "extra_forbidden" else f"; known here: {', '.join(_siblings(item['loc']))}"
        given = "" if item["type"] in ("missing", "value_error") else f" (given: {item['input']!r})"
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        lines.append(f"  {key}: {message}{given}{known}")
    return "\n".join(lines)


def _siblings(location: tuple) -> list[str]:
    model = Recipe
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def shipped_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package."""
    return Path(__file__).parent / "recipes" / f"{name}.yaml"
