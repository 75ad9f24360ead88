"""Validates a card before it is published: the types of its YAML and the sections of its text."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from echo4o.common.configuration import StrictModel
from echo4o.common.hub_names import require_repository_name
from echo4o.model_cards.facts import PipelineTag
from echo4o.model_cards.merge import BEGIN, END, split

RepoName = Annotated[str, AfterValidator(require_repository_name)]
License = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]
Language = Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]
OptionalLicense = License | list[License] | None
OptionalLanguage = list[Language] | Language | None
Text = Annotated[str, Field(min_length=1)]


class _Strict(StrictModel):
    model_config = ConfigDict(strict=True, populate_by_name=True)  # no conversion: a number is not a string


class _Common(_Strict):
    """Optional YAML keys of the Hub that every card may have; license, language and tags differ by kind."""

    license_name: Text | None = None
    license_link: Text | None = None
    thumbnail: Text | None = None
    viewer: bool | None = None
    extra_gated_prompt: Text | None = None
    extra_gated_heading: Text | None = None
    extra_gated_description: Text | None = None
    extra_gated_button_content: Text | None = None
    extra_gated_fields: dict[str, Any] | None = None
    extra_gated_eu_disallowed: bool | None = None


class _Url(_Strict):
    url: Annotated[str, Field(pattern=r"^(https://|[\w./-]+$)")]


class Widget(_Strict):
    text: Text
    output: _Url


class _Named(_Strict):
    name: Text | None = None
    type: Text


class _Metric(_Named):
    value: float
    args: dict[str, Any]


class _EvaluationResult(_Strict):
    task: _Named
    dataset: _Named
    metrics: list[_Metric] = Field(min_length=1)


class _Index(_Strict):
    name: Text
    results: list[_EvaluationResult] = Field(min_length=1)


class _Model(_Common):
    license: License
    language: list[Language]
    library_name: Literal["diffusers"]
    tags: list[Text]
    datasets: list[RepoName] | None = None
    widget: list[Widget] | None = None
    new_version: RepoName | None = None
    inference: bool | None = None
    model_index: list[_Index] | None = Field(None, alias="model-index")


class PipelineYaml(_Model):
    """YAML of a pipeline's card."""

    pipeline_tag: PipelineTag
    base_model: RepoName | None = None
    base_model_relation: Literal["finetune"] | None = None


class AdapterYaml(_Model):
    """YAML of a LoRA adapter's card; the base model is required."""

    pipeline_tag: PipelineTag
    base_model: RepoName
    base_model_relation: Literal["adapter"]
    instance_prompt: Text | None = None


class _Split(_Strict):
    split: Text
    path: Text | list[Text]


class _Config(_Strict):
    config_name: Text
    data_files: list[_Split] = Field(min_length=1)
    default: bool | None = None


class _SplitInfo(_Strict):
    name: Text
    num_bytes: int
    num_examples: int


class _Info(_Strict):
    config_name: Text
    features: list[dict[str, Any]] = Field(min_length=1)
    splits: list[_SplitInfo] = Field(min_length=1)
    download_size: int
    dataset_size: int


class _Rows(_Common):
    license: OptionalLicense = None
    pretty_name: Text
    tags: list[Text]
    size_categories: list[Text]
    configs: list[_Config] = Field(min_length=1)
    annotations_creators: list[Text] | None = None
    source_datasets: list[Text] | None = None


class DatasetYaml(_Rows):
    """YAML of a built dataset's card."""

    language: list[Language]
    task_categories: list[Text]
    dataset_info: list[_Info] = Field(min_length=1)


class ResultsYaml(_Rows):
    """YAML of the card of a benchmark result."""

    language: OptionalLanguage = None


class MetricYaml(_Common):
    """YAML of the card of a metric's Space."""

    license: OptionalLicense = None
    language: OptionalLanguage = None
    title: Text
    emoji: Text
    sdk: Literal["gradio"]
    app_file: Literal["app.py"]
    tags: list[Text]
    description: Text
    pinned: bool = False
    sdk_version: Text | None = None
    python_version: Text | None = None
    colorFrom: Text | None = None
    colorTo: Text | None = None
    short_description: Text | None = None


class AppYaml(MetricYaml):
    """YAML of the card of a Space with the app."""

    models: list[Text] = Field(min_length=1)


SCHEMAS = {
    "app": (AppYaml, ("Usage",)),
    "pipeline": (PipelineYaml, ("Usage", "Weights", "Intended use", "Limits", "Licenses")),
    "adapter": (AdapterYaml, ("Usage", "Intended use", "Limits", "Licenses")),
    "dataset": (DatasetYaml, ("Usage", "Columns", "Intended use", "Limits", "Licenses")),
    "metric": (MetricYaml, ("Usage", "Inputs", "Citation")),
    "results": (ResultsYaml, ("Usage", "Evaluation", "Limits")),
}


def validate(card: str, kind: str) -> None:
    """Validates a card.

    Args:
        card: YAML and text.
        kind: a key of `SCHEMAS`.

    Raises:
        ValueError: the card is invalid; the message lists every problem, one a line.
    """
    schema, sections = SCHEMAS[kind]
    data, text = split(card)
    problems = []
    try:
        schema.model_validate(data)
    except ValidationError as error:
        problems += [_line(item) for item in error.errors()]
    headings = [line[3:].strip() for line in _outside_code(text).splitlines() if line.startswith("## ")]
    problems += [f"the section '## {name}' is missing" for name in sections if name not in headings]
    if not usage_blocks(text):
        problems.append("'## Usage' shows no Python code")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        problems.append("the two markers around the generated part must each occur once")
    if problems:
        raise ValueError(f"README.md is not a valid card of this {kind}:\n  " + "\n  ".join(problems))


def usage_blocks(text: str) -> list[str]:
    """Returns the Python code blocks of the section "Usage"."""
    section = re.search(r"^## Usage$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S) if section else []


def _outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def _line(item: ErrorDetails) -> str:
    key = ".".join(str(part) for part in item["loc"])
    message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
    given = "" if item["type"] == "missing" else f" (given: {str(item['input'])[:80]!r})"
    return f"{key}: {message}{given}"
