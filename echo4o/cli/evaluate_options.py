"""The options of ``echo4o evaluate``, each declared once: a dataclass is a panel of the help, shared by the steps."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from echo4o.cli.pictures import Device, Dtype, DtypeOption, Think

if TYPE_CHECKING:
    from echo4o.evaluation.generate import GenerationSettings
    from echo4o.evaluation.judging import JudgingOptions

Benchmark = Annotated[str, typer.Argument(help="genevalpp, imagine_bench, omnicontext.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder of the evaluation.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A pipeline folder, a checkpoint folder, or a Hub repository.")
]
Images = Annotated[
    Path | None, typer.Option("--images", help="Judge these pictures (1.jpg, 2.jpg, ...) instead of drawing.")
]


@dataclass
class Chosen:
    """Which prompts"""

    prompts: Annotated[
        Path | None, typer.Option(help="The prompt file; without it the official one is downloaded.")
    ] = None
    revision: Annotated[str | None, typer.Option(help="The commit of the Hub dataset (omnicontext only).")] = None
    group: Annotated[list[str] | None, typer.Option(help="Only this group or type; repeatable.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None
    pictures: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1


@dataclass
class Drawing:
    """How it draws"""

    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are drawn together.")] = 1
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the sampler.", show_default="49")] = None
    guidance: Annotated[float | None, typer.Option(help="Text guidance.", show_default="the task's preset")] = None
    image_guidance: Annotated[float | None, typer.Option(help="Image guidance.", show_default="the task's preset")] = (
        None
    )
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the model's")] = None
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the model's")] = None
    think: Think = False
    adapter: Annotated[str | None, typer.Option(help="LoRA weights to load on top.")] = None

    def settings(self, model: str, per_prompt: int, dtype: Dtype) -> "GenerationSettings":
        from echo4o.evaluation.generate import GenerationSettings

        return GenerationSettings(model, per_prompt=per_prompt, requested_dtype=dtype.value, **asdict(self))


@dataclass
class Machine:
    """Where the model runs"""

    device: Device = "auto"
    dtype: DtypeOption = Dtype.auto


@dataclass
class Judging:
    """The judge"""

    judge: Annotated[
        str,
        typer.Option(
            help="openai:MODEL (any compatible endpoint), hf:MODEL (local), self (the model's own chat), pixels.",
            show_default="openai:gpt-4.1-2025-04-14",
        ),
    ] = ""
    judge_url: Annotated[
        str | None, typer.Option(help="The endpoint.", show_default="OPENAI_BASE_URL, else OpenAI")
    ] = None
    judge_key_env: Annotated[str, typer.Option(help="The environment variable that holds the key.")] = "OPENAI_API_KEY"
    judge_prompt: Annotated[
        list[str] | None, typer.Option(help="Replace the judge's prompt: FILE, or ASPECT=FILE.")
    ] = None
    temperature: Annotated[str, typer.Option(help="Of the judge; 'default' leaves it to the endpoint.")] = "0"
    max_tokens: Annotated[int | None, typer.Option(min=16, help="Longest answer of the judge.")] = None
    repeats: Annotated[
        int, typer.Option(min=1, help="Judgements per picture, to measure the judge's own variance.")
    ] = 1
    concurrency: Annotated[int, typer.Option(min=1, help="Most calls that are open at once.")] = 16
    tries: Annotated[int, typer.Option(min=1, help="How often a failing call is sent.")] = 6
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for an answer.")] = 120.0
    price: Annotated[str | None, typer.Option(help="USD per million tokens: IN,OUT.")] = None
    budget: Annotated[float | None, typer.Option(min=0, help="Most USD that may be spent into this folder.")] = None
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep paid answers beyond the folder.")
    ] = False
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not test first whether the judge can see.")] = False
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again where answers could not be read.")
    ] = False
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Judge although pictures are missing.")] = (
        False
    )

    def endpoint(self) -> dict:
        """What only a judge behind an endpoint takes."""
        return {
            "url": self.judge_url,
            "key_variable": self.judge_key_env,
            "temperature": _temperature(self.temperature),
            "timeout": self.timeout,
        }

    def options(self, judge_name: str, paid: bool) -> "JudgingOptions":
        from echo4o.endpoints.budget import KNOWN_PRICES
        from echo4o.endpoints.limits import CallPolicy
        from echo4o.evaluation.judging import JudgingOptions
        from echo4o.evaluation.prompt_files import cache_folder

        price = _price(self.price) or KNOWN_PRICES.get(judge_name.partition(":")[2])
        if self.budget is not None and paid and price is None:
            raise ValueError("--budget needs the price of the judge's tokens: --price IN,OUT in USD per million")
        return JudgingOptions(
            policy=CallPolicy(concurrency=self.concurrency, tries=self.tries),
            price=price,
            budget=self.budget,
            cache=None if self.no_cache else cache_folder() / "answers",
            probe=not self.no_probe and not judge_name.startswith("pixels"),
            retry_errors=self.retry_errors,
        )


@dataclass
class Scoring:
    """The scores"""

    min_coverage: Annotated[float, typer.Option(min=0, max=1, help="No overall score below this scored part.")] = 1.0
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 0


def spread(command: Callable) -> Callable:
    """Let a command take dataclasses: Typer sees each of their fields as an option, in a panel named by the docstring."""
    flat, kinds = [], {}
    for parameter in inspect.signature(command).parameters.values():
        if not is_dataclass(parameter.annotation):
            flat.append(parameter)
            continue
        kinds[parameter.name] = parameter.annotation
        for field in inspect.signature(parameter.annotation).parameters.values():
            kind, option = get_args(field.annotation)
            option = copy(option)  # other commands use it, too
            option.rich_help_panel = parameter.annotation.__doc__
            flat.append(field.replace(annotation=Annotated[kind, option]))

    @wraps(command)
    def with_options(**given):
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in kinds.items()}
        return command(**given, **made)

    in_order = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flat]
    with_options.__signature__ = inspect.Signature(in_order)
    return with_options


def _temperature(text: str) -> float | None:
    if text == "default":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--temperature {text}: a number or 'default' is needed") from None


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        into, out = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--price {text}: two numbers are needed, as in 2,8 (USD per million tokens in, out)"
        ) from None
    return into, out
