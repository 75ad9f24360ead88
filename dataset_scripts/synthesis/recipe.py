"""What a synthesis is, in one file: unknown keys and impossible values are errors, before anything is paid for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from echo4o.common.configuration import StrictModel, describe
from echo4o.model_cards.facts import About

BREAKS = ("colour", "shape", "size", "material", "combination", "time", "environment", "several")
TAGS = (
    "color_attr",
    "counting",
    "color_count_attr",
    "color_spatial_attr",
    "spatial_count_attr",
    "size_spatial_attr",
    "multi_object_count_attr",
)
TYPES = ("person", "object", "scene", "animal")


class PriceSettings(StrictModel):
    """What you pay, in USD: of a picture, or of a million tokens asked with and answered."""

    picture: float | None = Field(default=None, ge=0)
    input: float | None = Field(default=None, ge=0)
    output: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self):
        if (self.input is None) != (self.output is None):
            raise ValueError("give both input and output, or neither; half a price would be a wrong one")
        if self.picture is not None and self.input is not None:
            raise ValueError("give picture, or input and output: as your provider bills")
        return self

    @property
    def known(self) -> bool:
        return self.picture is not None or self.input is not None

    def usd(self, input_tokens: int, output_tokens: int, pictures: int = 1) -> float:
        """Of one call."""
        if self.picture is not None:
            return pictures * self.picture
        return (input_tokens * (self.input or 0.0) + output_tokens * (self.output or 0.0)) / 1e6


class ModelSettings(StrictModel):
    """A model, as configuration: models are retired, recipes stay."""

    name: str = Field(min_length=1)
    url: str | None = None  # of any OpenAI-compatible endpoint; None: OPENAI_BASE_URL, else OpenAI
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    price: PriceSettings = PriceSettings()
    timeout: float = Field(default=300.0, gt=0)
    seconds: float = Field(default=5.0, gt=0)  # about how long one call takes, for --plan

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value and any(mark in value for mark in "@?#"):
            raise ValueError(
                "a URL with a user, a query or a fragment may hold a key; the key belongs into the environment variable "
                "that key_variable names"
            )
        return value

    @field_validator("key_variable")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):  # the value is not repeated: it may be the key itself
            raise ValueError(
                "this is the name of an environment variable, such as OPENAI_API_KEY, and not the key itself"
            )
        return value

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine, for nothing."""
        return False


class TextModelSettings(ModelSettings):
    """Writes properties, instructions and paraphrases."""

    temperature: float | None = Field(default=1.0, ge=0)  # null leaves it to the endpoint: some models take no other
    max_tokens: int = Field(default=600, gt=0)

    @field_validator("price")
    @classmethod
    def _of_tokens(cls, value: PriceSettings) -> PriceSettings:
        if value.picture is not None:
            raise ValueError("words are billed by tokens: give input and output")
        return value


class ImageModelSettings(ModelSettings):
    """Draws; `options` is sent as it is (quality, output_format, ...)."""

    size: str = Field(default="1024x1024", pattern=r"^(auto|\d+x\d+)$")
    options: dict[str, Any] = {}
    send_seed: bool = False  # for endpoints that take a seed
    seconds: float = Field(default=30.0, gt=0)

    @property
    def is_openai(self) -> bool:
        """Whether OpenAI's terms hold: by the endpoint, or by the name where a gateway passes the request on."""
        url = self.url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        host = urlsplit(url).hostname or ""
        return f".{host}".endswith((".openai.com", ".openai.azure.com")) or bool(
            re.search("gpt|dall-e", self.name, re.I)
        )


class JudgeSettings(TextModelSettings):
    """Sees pictures; `name: pixels` is the quickstart's detector, which costs nothing, and `hf:MODEL` a local model."""

    temperature: float | None = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=1024, gt=0)

    @property
    def is_local(self) -> bool:
        return self.name == "pixels" or self.name.startswith("hf:")


class ModelsSettings(StrictModel):
    text: TextModelSettings
    image: ImageModelSettings
    edit: ImageModelSettings | None = None  # draws from references; None: `image`
    judge: JudgeSettings | None = None
    check: bool = True  # ask the endpoints, before anything is paid for, whether they offer these models

    def all(self) -> list[ModelSettings]:
        return [model for model in (self.text, self.image, self.edit, self.judge) if model is not None]


class RateSettings(StrictModel):
    concurrency: int = Field(default=8, gt=0)  # calls of each model that are open at once
    per_minute: int | None = Field(default=None, gt=0)  # calls of each model
    tries: int = Field(default=6, gt=0)  # of one call, before its failure is accepted
    first_wait: float = Field(default=1.0, ge=0)
    give_up_after: int = Field(default=8, gt=0)  # failures in a row that stop the run


class SurrealFantasySettings(StrictModel):
    rows: int = Field(ge=0)
    objects: Path | None = None
    colours: Path | None = None
    breaks: tuple[Literal[BREAKS], ...] = Field(default=BREAKS, min_length=1)


class ReferencesSettings(StrictModel):
    """Where reference pictures come from: a built dataset (or a Hub repository), or a folder with one folder per type."""

    path: str
    configuration: str = "all"
    column: str = "image"
    type_column: str = "category"
    types: dict[Literal[TYPES], tuple[str, ...]] = Field(
        default={t: (t,) for t in TYPES}, min_length=1
    )  # type -> its values


class MultiReferenceSettings(StrictModel):
    rows: int = Field(ge=0)
    references: ReferencesSettings
    least: int = Field(default=2, ge=2, le=4)
    most: int = Field(default=4, ge=2, le=4)

    @model_validator(mode="after")
    def _check(self):
        if self.least > self.most:
            raise ValueError(f"least is {self.least} and most is {self.most}")
        if set(self.references.types) == {"scene"}:
            raise ValueError("references.types names only scenes; name something that stands in them, too")
        return self


class InstructionFollowingSettings(StrictModel):
    rows: int = Field(ge=0)
    objects: Path | None = None
    colours: Path | None = None
    tags: tuple[Literal[TAGS], ...] = Field(default=TAGS, min_length=1)  # they take turns
    most_count: int = Field(default=7, ge=2, le=12)
    paraphrase: bool = True
    otherwise: Literal["template", "reject"] = "template"  # when no paraphrase keeps the structure


class ContaminationSettings(StrictModel):
    benchmarks: tuple[str, ...] = ("genevalpp", "imagine_bench")
    prompts: tuple[Path, ...] = ()  # files of more prompts, or of these where they cannot be downloaded
    overlap: float = Field(default=0.5, gt=0, le=1)
    action: Literal["refuse", "count"] = "refuse"

    @model_validator(mode="after")
    def _check(self):
        if not self.benchmarks and not self.prompts:
            raise ValueError("name benchmarks or files of prompts; contamination: null switches the gate off")
        return self


class GatesSettings(StrictModel):
    verify: bool = True  # by `models.judge`
    pictures: int = Field(default=3, gt=0)  # drawn for one row at most, until one passes
    answers: int = Field(default=3, gt=0)  # asked for at most, until one can be used
    duplicate_instructions: bool = True
    # Two pictures are the same when their 8 x 8 miniatures differ by no more than this, of 255, on average; null: off
    duplicate_pictures: float | None = Field(default=2.0, ge=0)
    blocked: tuple[str, ...] | Path | None = None  # words, or a file of them; null: a short list that comes along
    size: bool = True  # as asked for, or at least of that aspect
    contamination: ContaminationSettings | None = ContaminationSettings()


class SynthesisRecipe(StrictModel):
    """A run of `echo4o dataset synthesize RECIPE.yaml`."""

    version: str  # yours; it goes into every row
    seed: int = Field(default=0, ge=0)
    models: ModelsSettings
    rate: RateSettings = RateSettings()
    gates: GatesSettings = GatesSettings()
    surreal_fantasy: SurrealFantasySettings | None = None
    multi_reference: MultiReferenceSettings | None = None
    instruction_following: InstructionFollowingSettings | None = None

    @model_validator(mode="after")
    def _check(self):
        if not sum(self.rows.values()):
            raise ValueError("no part has rows: give surreal_fantasy, multi_reference or instruction_following some")
        if self.gates.verify and self.models.judge is None:
            raise ValueError("gates.verify needs models.judge (or set gates.verify: false)")
        return self

    @property
    def rows(self) -> dict[str, int]:
        """Rows by part."""
        parts = ("surreal_fantasy", "multi_reference", "instruction_following")
        return {name: part.rows for name in parts if (part := getattr(self, name)) is not None}

    def image_model(self, part: str) -> ImageModelSettings:
        return (self.models.edit or self.models.image) if part == "multi_reference" else self.models.image

    def about(self) -> About:
        """What the card of the made rows says of them."""
        painters = {
            model.name: model for model in (self.image_model(part) for part, rows in self.rows.items() if rows)
        }
        named = " and ".join(f"`{name}`" for name in painters)
        return About(
            title="Synthetic rows for Echo-4o",
            pictures=f"Pictures drawn by {named} to instructions that were sampled and worded for them with "
            f"`echo4o dataset synthesize` (recipe version `{self.version}`). The terms of the models' providers apply.",
            from_openai=any(model.is_openai for model in painters.values()),
        )

    def decides(self) -> dict[str, Any]:
        """All that decides what a row is; more rows, other rates, prices and keys are still the same recipe."""
        values = self.model_dump(mode="json", exclude={"rate", "gates"})
        for part in self.rows:
            values[part].pop("rows")
        for model in filter(None, values["models"].values()):
            if isinstance(model, dict):
                for name in ("key_variable", "price", "timeout", "seconds"):
                    model.pop(name)
        values["models"].pop("check")
        return values

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.decides(), sort_keys=True).encode()).hexdigest()[:16]


class SynthesisRecipeError(ValueError):
    """A recipe that cannot be run; the message names each key and what is wrong with it."""


def bundled_names() -> list[str]:
    return sorted(file.stem for file in (Path(__file__).parent / "recipes").glob("*.yaml"))


def load_recipe(path: str | Path) -> SynthesisRecipe:
    """Read a YAML recipe, or one that comes along by its name. Paths in it are relative to the working folder.

    Raises:
        RecipeError: the file is unreadable, a setting is unknown or impossible (all of them are listed), or it holds a key.
    """
    is_shipped = str(path) in bundled_names() and not Path(path).exists()
    file = Path(__file__).parent / "recipes" / f"{path}.yaml" if is_shipped else Path(path)
    try:
        text = file.read_text("utf-8-sig")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        names = ", ".join(bundled_names())
        raise SynthesisRecipeError(f"{path} cannot be read: {error} (recipes that come along: {names})") from error
    if not isinstance(values, dict):
        raise SynthesisRecipeError(f"{path} is not a mapping of settings")
    try:
        recipe = SynthesisRecipe.model_validate(values)
    except ValidationError as error:
        raise SynthesisRecipeError(f"{path}:\n{describe(error)}") from error
    for variable in {model.key_variable for model in recipe.models.all()}:
        if len(key := os.environ.get(variable, "")) >= 6 and key in text:
            raise SynthesisRecipeError(
                f"{path} holds the key of {variable}: remove it, recipes are copied into what they make"
            )
    return recipe
