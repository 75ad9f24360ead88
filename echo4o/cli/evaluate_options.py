"""The options of ``echo4o evaluate``. Each dataclass is one panel of the help; the steps share them."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from echo4o.cli.models import Device, Dtype, DtypeOption, Think

if TYPE_CHECKING:
    from echo4o.evaluation.generate import GenerationSettings
    from echo4o.evaluation.judges import DetectorSettings
    from echo4o.evaluation.judging import JudgingOptions

Benchmark = Annotated[
    str, typer.Argument(help="genevalpp, imagine_bench, omnicontext, geneval or dpg.", show_default=False)
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="The folder of the evaluation. An interrupted run resumes there.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A pipeline folder, an original checkpoint folder, or a Hub repository."),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="Judge the images of this folder (1.jpg, 2.jpg, ...) instead of generating."),
]


@dataclass
class PromptOptions:
    """Prompts"""

    prompts: Annotated[
        Path | None,
        typer.Option(
            help="The prompt file; for geneval also the word original or rewritten.",
            show_default="download the official prompts",
        ),
    ] = None
    questions: Annotated[
        Path | None,
        typer.Option(help="The question table of DPG-Bench.", show_default="download the official table"),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Commit of the Hub dataset (omnicontext only).")] = None
    group: Annotated[list[str] | None, typer.Option(help="Use only this group or type; repeatable.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images per prompt.", show_default="4 for geneval and dpg, else 1")
    ] = None


@dataclass
class GenerationOptions:
    """Generation"""

    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 1
    steps: Annotated[int | None, typer.Option(min=1, help="Number of sampler updates.", show_default="49")] = None
    guidance: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="Strength of the prompt.", show_default="the task's preset"),
    ] = None
    image_guidance: Annotated[
        float | None,
        typer.Option(
            "--image-guidance-scale", help="Strength of the reference images.", show_default="the task's preset"
        ),
    ] = None
    height: Annotated[int | None, typer.Option(min=1, help="Image height in pixels.", show_default="the model's")] = (
        None
    )
    width: Annotated[int | None, typer.Option(min=1, help="Image width in pixels.", show_default="the model's")] = None
    think: Think = False
    adapter: Annotated[
        str | None, typer.Option(help="LoRA weights to load: a folder, a file or a Hub repository.")
    ] = None

    def settings(self, model: str, per_prompt: int, dtype: Dtype) -> "GenerationSettings":
        from echo4o.evaluation.generate import GenerationSettings

        return GenerationSettings(model, per_prompt=per_prompt, requested_dtype=dtype.value, **asdict(self))


@dataclass
class DeviceOptions:
    """Device"""

    device: Device = "auto"
    dtype: DtypeOption = Dtype.auto


@dataclass
class JudgeOptions:
    """Judge"""

    judge: Annotated[
        str,
        typer.Option(
            help="openai:MODEL (any compatible endpoint), hf:MODEL (local), self (the model's own chat), detector "
            "(geneval only) or pixels.",
            show_default="detector for geneval, else openai:gpt-4.1-2025-04-14",
        ),
    ] = ""
    judge_url: Annotated[
        str | None, typer.Option(help="URL of the endpoint.", show_default="OPENAI_BASE_URL, else OpenAI")
    ] = None
    judge_key_env: Annotated[str, typer.Option(help="The environment variable that contains the key.")] = (
        "OPENAI_API_KEY"
    )
    judge_prompt: Annotated[
        list[str] | None,
        typer.Option(help="Replace the prompt of the judge: FILE, ASPECT=FILE, or released (as the released script)."),
    ] = None
    temperature: Annotated[str, typer.Option(help="Temperature of the judge; 'default': that of the endpoint.")] = "0"
    max_tokens: Annotated[int | None, typer.Option(min=16, help="Maximum length of an answer in tokens.")] = None
    repeats: Annotated[
        int, typer.Option(min=1, help="Judgements per image, to measure the variance of the judge.")
    ] = 1
    concurrency: Annotated[int, typer.Option(min=1, help="Maximum number of parallel calls.")] = 16
    tries: Annotated[int, typer.Option(min=1, help="Maximum attempts per call.")] = 6
    timeout: Annotated[float, typer.Option(min=1, help="Timeout of a call in seconds.")] = 120.0
    audit: Annotated[
        str | None,
        typer.Option(help="A second judge for a random share of the prompts: estimates its score on everything."),
    ] = None
    audit_share: Annotated[float, typer.Option(help="Share of the prompts of each group that the audit judges.")] = 0.1
    audit_seed: Annotated[int, typer.Option(min=0, help="Seed of the audited prompts.")] = 0
    audit_url: Annotated[
        str | None, typer.Option(help="URL of the audit's endpoint.", show_default="that of --judge-url")
    ] = None
    audit_key_env: Annotated[
        str | None, typer.Option(help="The environment variable with its key.", show_default="that of --judge-key-env")
    ] = None
    audit_price: Annotated[str | None, typer.Option(help="Its price in USD per million tokens: IN,OUT.")] = None
    price: Annotated[str | None, typer.Option(help="Price in USD per million tokens: IN,OUT.")] = None
    budget: Annotated[float | None, typer.Option(min=0, help="Maximum cost of the folder in USD, over all runs.")] = (
        None
    )
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not use or fill the cache of paid answers.")] = False
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Do not check with a test image that the judge can see.")
    ] = False
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Repeat judgements whose answers could not be read.")
    ] = False
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Judge even if images are missing.")] = False

    def endpoint(self) -> dict:
        """The arguments of judges that call an endpoint."""
        return {
            "url": self.judge_url,
            "key_variable": self.judge_key_env,
            "temperature": _temperature(self.temperature),
            "timeout": self.timeout,
        }

    def auditor(self) -> "JudgeOptions":
        """The options of the judge that audits."""
        return replace(
            self,
            judge=self.audit or "",
            judge_url=self.audit_url or self.judge_url,
            judge_key_env=self.audit_key_env or self.judge_key_env,
            price=self.audit_price,
            repeats=1,
        )

    def options(self, judge_name: str, paid: bool) -> "JudgingOptions":
        from echo4o.endpoints.budget import KNOWN_PRICES
        from echo4o.endpoints.limits import CallPolicy
        from echo4o.evaluation.benchmarks.prompt_files import cache_folder
        from echo4o.evaluation.judging import JudgingOptions

        price = _price(self.price) or KNOWN_PRICES.get(judge_name.partition(":")[2])
        if self.budget is not None and paid and price is None:
            raise ValueError("--budget needs the price of the judge's tokens: --price IN,OUT in USD per million")
        return JudgingOptions(
            policy=CallPolicy(concurrency=self.concurrency, tries=self.tries),
            price=price,
            budget=self.budget,
            cache=None if self.no_cache else cache_folder() / "answers",
            probe=not self.no_probe and not judge_name.startswith(("pixels", "detector")),
            retry_errors=self.retry_errors,
        )


@dataclass
class DPGOptions:
    """DPG-Bench"""

    grid: Annotated[
        int | None,
        typer.Option(min=1, help="--images has 2 x 2 grids <item_id>.png of images with this side in pixels."),
    ] = None
    answers: Annotated[
        Path | None,
        typer.Option(help="Score the answers in this *_detail.txt of the original script instead of asking a judge."),
    ] = None


@dataclass
class DetectorOptions:
    """Detector (geneval)"""

    detector: Annotated[
        Path | None,
        typer.Option(help="The folder of the converted detector.", show_default="detector in echo4o's cache folder"),
    ] = None
    color_model: Annotated[str, typer.Option(help="The CLIP model that names colors: a folder or a repository.")] = (
        "openai/clip-vit-large-patch14"
    )
    threshold: Annotated[float, typer.Option(help="An object counts above this score.")] = 0.3
    counting_threshold: Annotated[float, typer.Option(help="The same for prompts with the tag counting.")] = 0.9
    max_objects: Annotated[int, typer.Option(help="Maximum number of objects of a class.")] = 16
    max_overlap: Annotated[float, typer.Option(help="Drop an object with this IoU with a better one; 1: none.")] = 1.0
    position_threshold: Annotated[
        float, typer.Option(min=0, help="Share of the sizes by which two objects must be apart.")
    ] = 0.1
    detector_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass.", show_default="8 on a GPU, else 1")
    ] = None

    def settings(self) -> "DetectorSettings":
        from echo4o.evaluation.benchmarks.geneval.scoring import Thresholds
        from echo4o.evaluation.judges import DetectorSettings

        thresholds = Thresholds(
            self.threshold, self.counting_threshold, self.max_objects, self.max_overlap, self.position_threshold
        )
        return DetectorSettings(self.detector, self.color_model, thresholds, self.detector_batch)


@dataclass
class ScoreOptions:
    """Scores"""

    min_coverage: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum share of scored samples for an overall score.")
    ] = 1.0
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the confidence intervals.")] = 0


def spread(command: Callable) -> Callable:
    """Replaces the dataclass parameters of a command by one option per field.

    The help shows the options of a dataclass in a panel with its docstring as the title.
    """
    flat: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        group = parameter.annotation
        if not isinstance(group, type) or not is_dataclass(group):
            flat.append(parameter)
            continue
        groups[parameter.name] = group
        for field in inspect.signature(group).parameters.values():
            kind, option = get_args(field.annotation)
            option = copy(option)  # shared with other commands
            option.rich_help_panel = group.__doc__
            flat.append(field.replace(annotation=Annotated[kind, option]))

    @wraps(command)
    def with_options(**values):
        grouped = {
            name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()
        }
        return command(**values, **grouped)

    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flat]
    setattr(with_options, "__signature__", inspect.Signature(options))  # noqa: B010  # typer reads it
    return with_options


def _temperature(text: str) -> float | None:
    if text == "default":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--temperature {text}: must be a number or 'default'") from None


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        into, out = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--price {text}: must be two numbers, for example 2,8 (USD per million tokens in, out)"
        ) from None
    return into, out
