"""Builds model, dataset and metric cards: YAML with the card classes of huggingface_hub, text from the templates in this folder."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData, SpaceCardData
from huggingface_hub.repocard_data import CardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from echo4o.model_cards.facts import About, ModelFamily, Result, Training
from echo4o.model_cards.merge import BEGIN, END

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def pipeline_card(
    repo: str,
    family: ModelFamily,
    weights: dict[str, dict],
    released_sizes: bool,
    *,
    base_model: str | None = None,
    datasets: tuple[str, ...] = (),
    training: Training | None = None,
    results: tuple[Result, ...] = (),
    widget: tuple[dict, ...] = (),
) -> str:
    """Returns the card of a pipeline.

    Args:
        repo: name of the repository, `owner/name`.
        family: facts of the model family.
        weights: component -> `{"parameters": number, "dtype": name}`.
        released_sizes: whether the model has the sizes of the family's released checkpoint.
        base_model: Hub repository of the model that was fine-tuned.
        datasets: Hub repositories of the training data.
        training: the training run, if it is known.
        results: scores of `echo4o evaluate`.
        widget: sample images, each `{"text": prompt, "output": {"url": path in the repository}}`.
    """
    tags = [*family.tags, "text-to-image"]
    data = _model_data(repo, family, family.pipeline_tag, base_model, "finetune", datasets, results, widget, tags)
    return _card(
        "pipeline", data, repo=repo, family=family, weights=weights, released_sizes=released_sizes, base_model=base_model, datasets=datasets, training=training,
        results=results, widget=widget, from_openai=_from_openai(training),
    )  # fmt: skip


def adapter_card(
    repo: str,
    family: ModelFamily,
    settings: dict[str, Any],
    released_sizes: bool,
    *,
    base_model: str,
    datasets: tuple[str, ...] = (),
    training: Training | None = None,
    results: tuple[Result, ...] = (),
    widget: tuple[dict, ...] = (),
) -> str:
    """Returns the card of a LoRA adapter.

    Args:
        settings: the settings of its `LoraConfig`.
        base_model: Hub repository of the model that the adapter belongs to.

    The other arguments are those of `pipeline_card`.
    """
    tags = [*family.tags, "lora", "template:sd-lora"]
    data = _model_data(
        repo, family, family.adapter_pipeline_tag, base_model, "adapter", datasets, results, widget, tags
    )
    return _card(
        "adapter", data, repo=repo, family=family, settings=settings, released_sizes=released_sizes, base_model=base_model, datasets=datasets, training=training,
        results=results, widget=widget, from_openai=_from_openai(training),
    )  # fmt: skip


def dataset_card(repo: str, manifest: dict, about: About, configs: list[dict], infos: Any) -> str:
    """Returns the card of a built dataset.

    Args:
        manifest: contents of `manifest.json`.
        about: title, origin and license of the dataset.
        configs, infos: the YAML fields `configs` and `dataset_info`, as `datasets` writes them.
    """
    data = DatasetCardData(
        pretty_name=about.title,
        license=about.license,
        language=["en"],
        task_categories=["text-to-image", "image-to-image"],
        tags=["echo-4o", "synthetic", "multi-reference", "instruction-following"],
        size_categories=[_size_category(manifest["rows"]["accepted"])],
        configs=configs,
        dataset_info=infos,
    )
    return _card("dataset", data, repo=repo, manifest=manifest, about=about)


def metric_card(repo: str, title: str, description: str, citation: str, inputs: list[str], example: str) -> str:
    """Returns the card of the Space of a metric.

    Args:
        inputs: names of the arguments of `compute`.
        example: an expression that computes the metric; the loaded metric is called `metric` in it.
    """
    data = SpaceCardData(
        title=title,
        emoji="🖼️",
        sdk="gradio",
        app_file="app.py",
        pinned=False,
        tags=["evaluate", "metric"],
        description=description.splitlines()[0],
    )
    return _card("metric", data, repo=repo, title=title, description=description, citation=citation, inputs=inputs, example=example)  # fmt: skip


def app_card(repo: str, models: list[str], gradio_version: str) -> str:
    """Returns the card of a Space with the app.

    Args:
        models: the Hub repositories of the model and of its adapters.
        gradio_version: the version of gradio that the Space runs with.
    """
    data = SpaceCardData(
        title=repo.split("/")[-1],
        emoji="🖼️",
        sdk="gradio",
        sdk_version=gradio_version,
        python_version="3.11",
        app_file="app.py",
        pinned=False,
        models=models,
        tags=["echo-4o", "text-to-image"],
        description=f"Images with {models[0]}",
    )
    return _card("app", data, repo=repo, models=models)


def results_card(repo: str, result: Result, model: str | None, images: int) -> str:
    """Returns the card of a benchmark result: a dataset of `images` rows, one generated image with its judgement each."""
    data = DatasetCardData(
        pretty_name=f"{result.title}: {model}" if model else result.title,
        tags=["echo-4o", "evaluation", result.values["benchmark"]],
        size_categories=[_size_category(images)],
        configs=[
            {"config_name": "default", "data_files": [{"split": "test", "path": ["metadata.jsonl", "images/*"]}]}
        ],
    )
    return _card("results", data, repo=repo, results=(result,), result=result, model=model, images=images)


def _model_data(repo, family, task, base_model, relation, datasets, results, widget, tags) -> ModelCardData:
    evaluated = [r for r in results if r.values["score"] is not None]
    return ModelCardData(
        license=family.license,
        language=family.language,
        library_name=family.library_name,
        pipeline_tag=task,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=list(datasets) or None,
        tags=tags,
        widget=list(widget) or None,
        model_name=repo.split("/")[-1] if evaluated else None,
        eval_results=[_eval_result(r) for r in evaluated] or None,
    )


def _eval_result(result: Result) -> EvalResult:
    values = result.values
    return EvalResult(
        task_type="text-to-image",
        dataset_type=values["benchmark"],
        dataset_name=result.title,
        metric_type="score",
        metric_name=f"{result.title} score",
        metric_value=values["score"],
        metric_args={
            "coverage": values["coverage"],
            "interval_95": values["intervals"]["score"],
            "judge": result.judge,
            "official_prompts": values["prompts"]["official"],
        }
        | ({"measure": values["measure"]["name"]} if "measure" in values else {}),
    )


def _from_openai(training: Training | None) -> bool | None:
    """Whether the training data holds images of an OpenAI model; None if that is not known."""
    known = [data.about.from_openai if data.about else None for data in training.data] if training else []
    if not known:
        return None
    return True if True in known else None if None in known else False


def _card(template: str, data: CardData, **facts: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    text = environment.get_template(f"{template}.md.j2").render(**facts).strip()
    text = re.sub(r"\n{3,}", "\n\n", text)  # an omitted section leaves blank lines
    return f"---\n{data}\n---\n\n{BEGIN}\n{text}\n{END}\n"


def _size_category(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "1M<n<10M")
