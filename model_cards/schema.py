"""What a card must hold before it is published: YAML that the Hub reads as it was meant, and the sections people need."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from echo4o.common.configuration import StrictModel
from echo4o.common.hub_names import require_repository_name
from echo4o.model_cards.facts import PipelineTag
from echo4o.model_cards.merge import BEGIN, END, split

RepoName = Annotated[str, AfterValidator(require_repository_name)]
License = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Language = Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]
Text = Annotated[str, Field(min_length=1)]


class _Strict(StrictModel):
    model_config = ConfigDict(strict=True, populate_by_name=True)  # YAML's own types, not what converts to them


class _Common(_Strict):
    """Keys of the Hub's that a person may add to any card of ours."""

    license: License | list[License] | None = None
    license_name: Text | None = None
    license_link: Text | None = None
    language: list[Language] | Language | None = None
    tags: list[Text] | None = None
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
    """Of a pipeline."""

    pipeline_tag: PipelineTag
    base_model: RepoName | None = None
    base_model_relation: Literal["finetune"] | None = None


class AdapterYaml(_Model):
    """Of a LoRA adapter: it is nothing without its base."""

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
    pretty_name: Text
    tags: list[Text]
    size_categories: list[Text]
    configs: list[_Config] = Field(min_length=1)
    annotations_creators: list[Text] | None = None
    source_datasets: list[Text] | None = None


class DatasetYaml(_Rows):
    """Of a built dataset."""

    language: list[Language]
    task_categories: list[Text]
    dataset_info: list[_Info] = Field(min_length=1)


class ResultsYaml(_Rows):
    """Of a benchmark's result."""


class MetricYaml(_Common):
    """Of a metric's Space."""

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


SCHEMAS = {
    "pipeline": (PipelineYaml, ("Usage", "Weights", "Intended use", "Limits", "Licences")),
    "adapter": (AdapterYaml, ("Usage", "Intended use", "Limits", "Licences")),
    "dataset": (DatasetYaml, ("Usage", "Columns", "Intended use", "Limits", "Licences")),
    "metric": (MetricYaml, ("Usage", "Inputs", "Citation")),
    "results": (ResultsYaml, ("Usage", "Evaluation", "Limits")),
}


def validate(card: str, kind: str) -> None:
    """Hold a card of that kind against its schema.

    Raises:
        ValueError: all that is wrong with it, one line each.
    """
    schema, sections = SCHEMAS[kind]
    data, text = split(card)
    problems = []
    try:
        schema.model_validate(data)
    except ValidationError as error:
        problems += [_line(item) for item in error.errors()]
    found = usage_blocks(text)
    headings = [line[3:].strip() for line in _outside_code(text).splitlines() if line.startswith("## ")]
    problems += [f"the section '## {name}' is missing" for name in sections if name not in headings]
    if not found:
        problems.append("'## Usage' shows no Python code")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        problems.append("the marks around the written part must be there once")
    if problems:
        raise ValueError(f"README.md is no valid card of this {kind}:\n  " + "\n  ".join(problems))


def usage_blocks(text: str) -> list[str]:
    """The Python code of the section "Usage"."""
    section = re.search(r"^## Usage$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S) if section else []


def _outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def _line(item: dict) -> str:
    key = ".".join(str(part) for part in item["loc"])
    message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
    given = "" if item["type"] == "missing" else f" (given: {str(item['input'])[:80]!r})"
    return f"{key}: {message}{given}"
