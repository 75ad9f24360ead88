"""The recipe of a synthesis. Unknown keys and impossible values raise errors before anything is paid for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from echo4o.common.configuration import StrictModel, describe
from echo4o.model_cards.facts import About

Break = Literal["colour", "shape", "size", "material", "combination", "time", "environment", "several"]
Tag = Literal[
    "color_attr",
    "counting",
    "color_count_attr",
    "color_spatial_attr",
    "spatial_count_attr",
    "size_spatial_attr",
    "multi_object_count_attr",
]
SubjectType = Literal["person", "object", "scene", "animal"]
BREAKS: tuple[Break, ...] = get_args(Break)
TAGS: tuple[Tag, ...] = get_args(Tag)
TYPES: tuple[SubjectType, ...] = get_args(SubjectType)


class PriceSettings(StrictModel):
    """Prices in USD: per image (`picture`), or per million input and output tokens."""

    picture: float | None = Field(default=None, ge=0)
    input: float | None = Field(default=None, ge=0)
    output: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self):
        if (self.input is None) != (self.output is None):
            raise ValueError("set both input and output, or neither")
        if self.picture is not None and self.input is not None:
            raise ValueError("set either picture, or input and output, depending on how your provider bills")
        return self

    @property
    def known(self) -> bool:
        """Whether any price is set."""
        return self.picture is not None or self.input is not None

    def usd(self, input_tokens: int, output_tokens: int, images: int = 1) -> float:
        """Returns the cost of one call in USD."""
        if self.picture is not None:
            return images * self.picture
        return (input_tokens * (self.input or 0.0) + output_tokens * (self.output or 0.0)) / 1e6


class ModelSettings(StrictModel):
    """A model behind an endpoint. Recipes configure the name because providers retire models."""

    name: str = Field(min_length=1)
    url: str | None = None  # an OpenAI-compatible endpoint; None: OPENAI_BASE_URL, else OpenAI
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    price: PriceSettings = PriceSettings()
    timeout: float = Field(default=300.0, gt=0)
    seconds: float = Field(default=5.0, gt=0)  # estimated duration of one call in seconds, for --plan

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value and any(mark in value for mark in "@?#"):
            raise ValueError(
                "a URL with a user, a query or a fragment may contain a key; put the key into the environment variable "
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
        """Whether the model runs on this machine, without costs."""
        return False


class TextModelSettings(ModelSettings):
    """The model that writes properties, instructions and paraphrases."""

    temperature: float | None = Field(
        default=1.0, ge=0
    )  # null: the default of the endpoint; some models accept no other
    max_tokens: int = Field(default=600, gt=0)

    @field_validator("price")
    @classmethod
    def _of_tokens(cls, value: PriceSettings) -> PriceSettings:
        if value.picture is not None:
            raise ValueError("text is billed by tokens: set input and output")
        return value


class ImageModelSettings(ModelSettings):
    """A model that generates images; `options` (quality, output_format, ...) are sent unchanged."""

    size: str = Field(default="1024x1024", pattern=r"^(auto|\d+x\d+)$")
    options: dict[str, Any] = {}
    send_seed: bool = False  # for endpoints that accept a seed
    seconds: float = Field(default=30.0, gt=0)

    @property
    def is_openai(self) -> bool:
        """Whether OpenAI's terms apply: judged by the endpoint, or by the model name behind a gateway."""
        url = self.url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        host = urlsplit(url).hostname or ""
        return f".{host}".endswith((".openai.com", ".openai.azure.com")) or bool(
            re.search("gpt|dall-e", self.name, re.I)
        )


class JudgeSettings(TextModelSettings):
    """The judge of the images. `name: pixels` is the free detector of the quickstart, `hf:MODEL` a local model."""

    temperature: float | None = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=1024, gt=0)

    @property
    def is_local(self) -> bool:
        return self.name == "pixels" or self.name.startswith("hf:")


class ModelsSettings(StrictModel):
    text: TextModelSettings
    image: ImageModelSettings
    edit: ImageModelSettings | None = None  # generates from references; None: `image`
    judge: JudgeSettings | None = None
    check: bool = True  # before the first paid call, check that the endpoints offer these models

    def all(self) -> list[ModelSettings]:
        """Returns all models that are set."""
        return [model for model in (self.text, self.image, self.edit, self.judge) if model is not None]


class RateSettings(StrictModel):
    concurrency: int = Field(default=8, gt=0)  # parallel calls of each model
    per_minute: int | None = Field(default=None, gt=0)  # calls of each model per minute
    tries: int = Field(default=6, gt=0)  # attempts per call
    first_wait: float = Field(default=1.0, ge=0)
    give_up_after: int = Field(default=8, gt=0)  # consecutive failures that stop the run


class SurrealFantasySettings(StrictModel):
    rows: int = Field(ge=0)
    objects: Path | None = None
    colours: Path | None = None
    breaks: tuple[Break, ...] = Field(default=BREAKS, min_length=1)


class ReferencesSettings(StrictModel):
    """Source of the reference images: a built dataset, a Hub repository, or a folder with one subfolder per type."""

    path: str
    configuration: str = "all"
    column: str = "image"
    type_column: str = "category"
    types: dict[SubjectType, tuple[str, ...]] = Field(
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
            raise ValueError("references.types has only scenes; add a type of subject")
        return self


class InstructionFollowingSettings(StrictModel):
    rows: int = Field(ge=0)
    objects: Path | None = None
    colours: Path | None = None
    tags: tuple[Tag, ...] = Field(default=TAGS, min_length=1)  # used in turn
    most_count: int = Field(default=7, ge=2, le=12)
    paraphrase: bool = True
    otherwise: Literal["template", "reject"] = "template"  # if no paraphrase keeps the structure


class ContaminationSettings(StrictModel):
    benchmarks: tuple[str, ...] = ("genevalpp", "imagine_bench")
    prompts: tuple[Path, ...] = ()  # prompt files, in addition to or instead of downloaded benchmarks
    overlap: float = Field(default=0.5, gt=0, le=1)
    action: Literal["refuse", "count"] = "refuse"

    @model_validator(mode="after")
    def _check(self):
        if not self.benchmarks and not self.prompts:
            raise ValueError("set benchmarks or prompts; contamination: null disables the gate")
        return self


class GatesSettings(StrictModel):
    verify: bool = True  # by `models.judge`
    pictures: int = Field(default=3, gt=0)  # maximum number of images generated for a row
    answers: int = Field(default=3, gt=0)  # maximum number of answers requested until one is usable
    duplicate_instructions: bool = True
    # Two images are duplicates if their 8 x 8 thumbnails differ by no more than this on average (of 255); null: disabled
    duplicate_pictures: float | None = Field(default=2.0, ge=0)
    blocked: tuple[str, ...] | Path | None = None  # words, or a file of words; null: the bundled list
    size: bool = True  # check the requested size or aspect ratio
    contamination: ContaminationSettings | None = ContaminationSettings()


class SynthesisRecipe(StrictModel):
    """The recipe of `echo4o dataset synthesize RECIPE.yaml`."""

    version: str  # chosen by you; stored in every row
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
            raise ValueError("no part has rows: set rows of surreal_fantasy, multi_reference or instruction_following")
        if self.gates.verify and self.models.judge is None:
            raise ValueError("gates.verify needs models.judge (or set gates.verify: false)")
        return self

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by part."""
        parts = ("surreal_fantasy", "multi_reference", "instruction_following")
        return {name: part.rows for name in parts if (part := getattr(self, name)) is not None}

    def image_model(self, part: str) -> ImageModelSettings:
        """Returns the model that generates the images of a part."""
        return (self.models.edit or self.models.image) if part == "multi_reference" else self.models.image

    def about(self) -> About:
        """Returns the facts for the card of the rows."""
        models = {model.name: model for model in (self.image_model(part) for part, rows in self.rows.items() if rows)}
        names = " and ".join(f"`{name}`" for name in models)
        return About(
            title="Synthetic rows for Echo-4o",
            pictures=f"Images generated by {names} from instructions that were sampled and written with "
            f"`echo4o dataset synthesize` (recipe version `{self.version}`). The terms of the models' providers apply.",
            from_openai=any(model.is_openai for model in models.values()),
        )

    def decides(self) -> dict[str, Any]:
        """Returns the settings that determine the rows. The number of rows, rates, prices and keys are not among them."""
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
        """Returns a hash of `decides()`."""
        return hashlib.sha256(json.dumps(self.decides(), sort_keys=True).encode()).hexdigest()[:16]


class SynthesisRecipeError(ValueError):
    """An invalid recipe; the message names each key and its problem."""


def bundled_names() -> list[str]:
    """Returns the names of the bundled recipes."""
    return sorted(file.stem for file in (Path(__file__).parent / "recipes").glob("*.yaml"))


def load_recipe(path: str | Path) -> SynthesisRecipe:
    """Reads a YAML recipe: a file, or the name of a bundled recipe. Paths in it are relative to the working directory.

    Raises:
        SynthesisRecipeError: the file cannot be read, settings are unknown or invalid (all are listed), or it contains a key.
    """
    is_shipped = str(path) in bundled_names() and not Path(path).exists()
    file = Path(__file__).parent / "recipes" / f"{path}.yaml" if is_shipped else Path(path)
    try:
        text = file.read_text("utf-8-sig")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        names = ", ".join(bundled_names())
        raise SynthesisRecipeError(f"{path} cannot be read: {error} (bundled recipes: {names})") from error
    if not isinstance(values, dict):
        raise SynthesisRecipeError(f"{path} is not a mapping of settings")
    try:
        recipe = SynthesisRecipe.model_validate(values)
    except ValidationError as error:
        raise SynthesisRecipeError(f"{path}:\n{describe(error)}") from error
    for variable in {model.key_variable for model in recipe.models.all()}:
        if len(key := os.environ.get(variable, "")) >= 6 and key in text:
            raise SynthesisRecipeError(
                f"{path} contains the key of {variable}: remove it, because recipes are copied into the output folder"
            )
    return recipe
