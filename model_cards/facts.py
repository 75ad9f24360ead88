"""Facts that cards state: the origin of a dataset's images, the license of weights, a training run, a score."""

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
ABOUT = "about.yaml"  # in the root of a release; without it, the release is Echo-4o-Image


class About(StrictModel):
    """Title, origin and license of a dataset (`about.yaml`). The defaults describe the published Echo-4o-Image."""

    title: str = Field("Echo-4o-Image", min_length=1)
    # The key is `pictures` and not `images`: about.yaml files of version 0.1 have it.
    pictures: str = Field(
        "Images distilled from GPT-4o for text-to-image generation and for generation from reference images "
        "([Echo-4o, arXiv 2508.09987](https://arxiv.org/abs/2508.09987)).",
        min_length=1,
    )
    from_openai: bool = True  # whether a model of OpenAI generated the images
    license: str | None = None  # identifier of the images' license on the Hub


def read_about(text: str, place: str = ABOUT) -> About:
    """Parses the text of an `about.yaml`.

    Raises:
        ValueError: it is not valid YAML, or a key or value is not allowed.
    """
    try:
        return About.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{place} cannot be used: {error}") from error


class WeightSource(StrictModel):
    """A part of a released checkpoint, with its license."""

    part: str = Field(min_length=1)
    license: str = Field(min_length=1)
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")  # on the Hub; its card states the license


class ModelFamily(StrictModel):
    """Facts of a model family, from its file in families/."""

    name: str = Field(min_length=1)
    architecture: str = Field(min_length=1)  # follows "A diffusers pipeline with"
    library_name: str
    license: str  # identifier of the weights' license on the Hub
    language: list[str]
    pipeline_tag: PipelineTag
    adapter_pipeline_tag: PipelineTag
    tags: list[str]
    example: str = Field(min_length=1)  # code that uses `pipe`
    limits: list[str]
    sources: list[WeightSource] = Field(min_length=1)


def read_family(name: str) -> ModelFamily:
    """Reads the facts of a model family from families/NAME.yaml."""
    file = Path(__file__).parent / "families" / f"{name}.yaml"
    return ModelFamily.model_validate(yaml.safe_load(file.read_text("utf-8")))


@dataclass(frozen=True)
class Dataset:
    """A dataset that a model was trained on; None where a value is not known."""

    name: str
    rows: int | None = None
    about: About | None = None


@dataclass(frozen=True)
class Validation:
    """Losses of rows that did not train."""

    rows: int
    step: int  # of the last validation
    values: dict[str, tuple[float | None, float]]  # by name: before training, and at `step`


@dataclass(frozen=True)
class Training:
    """A training run, from its resolved recipe and its log."""

    recipe: str  # YAML
    method: str  # a sentence, for example "LoRA of rank 8."
    steps: int
    samples: int
    seconds: float
    data: list[Dataset] = field(default_factory=list)
    validation: Validation | None = None


@dataclass(frozen=True)
class Result:
    """The result of a benchmark, as `echo4o evaluate` wrote it."""

    title: str  # of the benchmark
    values: dict[str, Any]  # contents of result.json

    @property
    def judge(self) -> str:
        """Name of the judge."""
        judge = self.values["judge"]
        return judge["judge"] if isinstance(judge, dict) else str(judge)
