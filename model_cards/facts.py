"""What cards say that their makers must know: where a dataset's pictures come from, how a model was trained."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from echo4o.common.configuration import StrictModel

# The Hub's tasks of models that generate or read images; a family's file names the one under which the Hub lists it.
PipelineTag = Literal[
    "any-to-any",
    "image-text-to-image",
    "image-text-to-text",
    "image-to-image",
    "image-to-text",
    "text-to-image",
]
ABOUT = "about.yaml"  # in the root of a release; without it, the release is Echo-4o-Image's


class About(StrictModel):
    """A dataset in a few words. The defaults are the published Echo-4o-Image's."""

    title: str = Field("Echo-4o-Image", min_length=1)
    pictures: str = Field(
        "Pictures distilled from GPT-4o for text-to-image generation and for drawing from reference pictures "
        "([Echo-4o, arXiv 2508.09987](https://arxiv.org/abs/2508.09987)).",
        min_length=1,
    )
    from_openai: bool = True  # whether a model of OpenAI made the pictures
    license: str | None = None  # the Hub's name of the pictures' license


def read_about(text: str, place: str = ABOUT) -> About:
    """What an `about.yaml` says; ValueError when it says anything else."""
    try:
        return About.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{place} cannot be used: {error}") from error


class WeightSource(StrictModel):
    """A part of a release, with its license."""

    part: str = Field(min_length=1)
    license: str = Field(min_length=1)
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")  # on the Hub; its card states the license


class ModelFamily(StrictModel):
    """What the cards of a model family say; one file in families/ each."""

    name: str = Field(min_length=1)
    architecture: str = Field(min_length=1)  # follows "A diffusers pipeline with"
    library_name: str
    license: str  # the Hub's name of the weights' license
    language: list[str]
    pipeline_tag: PipelineTag
    adapter_pipeline_tag: PipelineTag
    tags: list[str]
    example: str = Field(min_length=1)  # code that uses `pipe`
    limits: list[str]
    sources: list[WeightSource] = Field(min_length=1)


def read_family(name: str) -> ModelFamily:
    """The facts of a model family, from families/NAME.yaml."""
    file = Path(__file__).parent / "families" / f"{name}.yaml"
    return ModelFamily.model_validate(yaml.safe_load(file.read_text("utf-8")))


@dataclass(frozen=True)
class Dataset:
    """A dataset that a model learned from, as far as it is known."""

    name: str
    rows: int | None = None
    about: About | None = None


@dataclass(frozen=True)
class Training:
    """A run, from its resolved recipe and its log."""

    recipe: str  # YAML
    method: str  # in words
    steps: int
    samples: int
    seconds: float
    data: list[Dataset] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What `echo4o evaluate` wrote about a model."""

    title: str  # of the benchmark
    values: dict[str, Any]  # result.json

    @property
    def judge(self) -> str:
        judge = self.values["judge"]
        return judge["judge"] if isinstance(judge, dict) else str(judge)
