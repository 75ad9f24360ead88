"""``echo4o evaluate``: draw, judge, score and compare; each step can be called alone and goes on where it stopped."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from echo4o.cli.evaluate_output import print_comparison, print_result, progress
from echo4o.cli.frame import finish, say
from echo4o.cli.pictures import Device, Dtype, DtypeOption, Think, check_model, choose_device, load_pipeline


class _RunByDefault(TyperGroup):
    """``echo4o evaluate genevalpp ...`` means ``echo4o evaluate run genevalpp ...``."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_RunByDefault, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def evaluate() -> None:
    """Score a model with GenEval++, Imagine-Bench or OmniContext: draw, judge, score, report.

    Example: [bold]echo4o evaluate genevalpp --model echo-4o --judge openai:gpt-4.1-2025-04-14 --out runs/echo-4o[/bold]
    (the word run is understood; its options: [bold]echo4o evaluate run --help[/bold])
    Pictures of any other model: [bold]echo4o evaluate genevalpp --images DIR --judge J --out DIR[/bold]
    """


Benchmark = Annotated[str, typer.Argument(help="genevalpp, imagine_bench, omnicontext.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder of the evaluation.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A pipeline folder, a checkpoint folder, or a Hub repository.")
]
JudgeOption = Annotated[
    str,
    typer.Option(
        "--judge",
        help="openai:MODEL (any compatible endpoint), hf:MODEL (local), self (the model's own chat), pixels.",
        show_default="openai:gpt-4.1-2025-04-14",
    ),
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="The prompt file; without it the official one is downloaded.")
]
Revision = Annotated[str | None, typer.Option(help="The commit of the Hub dataset (omnicontext only).")]
GroupOption = Annotated[list[str] | None, typer.Option("--group", help="Only this group or type; repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")]
ImagesDir = Annotated[
    Path | None, typer.Option("--images", help="Judge these pictures (1.jpg, 2.jpg, ...) instead of drawing.")
]
PerPrompt = Annotated[int, typer.Option("--pictures", min=1, help="Pictures per prompt.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the pictures.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts that are drawn together.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Updates of the sampler.", show_default="49")]
Guidance = Annotated[float | None, typer.Option(help="Text guidance.", show_default="the task's preset")]
ImageGuidance = Annotated[float | None, typer.Option(help="Image guidance.", show_default="the task's preset")]
Side = Annotated[int | None, typer.Option(min=1, help="In pixels.", show_default="the model's")]
Adapter = Annotated[str | None, typer.Option(help="LoRA weights to load on top.")]
JudgeUrl = Annotated[str | None, typer.Option(help="The endpoint.", show_default="OPENAI_BASE_URL, else OpenAI")]
KeyVariable = Annotated[str, typer.Option("--judge-key-env", help="The environment variable that holds the key.")]
JudgePrompt = Annotated[
    list[str] | None, typer.Option("--judge-prompt", help="Replace the judge's prompt: FILE, or ASPECT=FILE.")
]
Temperature = Annotated[str, typer.Option("--temperature", help="Of the judge; 'default' leaves it to the endpoint.")]
MaxTokens = Annotated[int | None, typer.Option(min=16, help="Longest answer of the judge.")]
Repeats = Annotated[int, typer.Option(min=1, help="Judgements per picture, to measure the judge's own variance.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Most calls that are open at once.")]
Tries = Annotated[int, typer.Option(min=1, help="How often a failing call is sent.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds to wait for an answer.")]
Price = Annotated[str | None, typer.Option(help="USD per million tokens: IN,OUT.")]
Budget = Annotated[float | None, typer.Option(min=0, help="Most USD that may be spent into this folder.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep paid answers beyond the folder.")]
NoProbe = Annotated[bool, typer.Option("--no-probe", help="Do not test first whether the judge can see.")]
RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Ask again where answers could not be read.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="Judge although pictures are missing.")]
MinCoverage = Annotated[float, typer.Option(min=0, max=1, help="No overall score below this scored part.")]
BootstrapSeed = Annotated[int, typer.Option(min=0, help="Seed of the intervals.")]


@app.command("run")
def run(
    benchmark: Benchmark,
    out: Out,
    model: ModelOption = None,
    judge: JudgeOption = "",
    images: ImagesDir = None,
    prompts: Prompts = None,
    revision: Revision = None,
    group: GroupOption = None,
    limit: Limit = None,
    pictures: PerPrompt = 1,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    image_guidance: ImageGuidance = None,
    height: Side = None,
    width: Side = None,
    think: Think = False,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    judge_url: JudgeUrl = None,
    judge_key_env: KeyVariable = "OPENAI_API_KEY",
    judge_prompt: JudgePrompt = None,
    temperature: Temperature = "0",
    max_tokens: MaxTokens = None,
    repeats: Repeats = 1,
    concurrency: Concurrency = 16,
    tries: Tries = 6,
    timeout: Timeout = 120.0,
    price: Price = None,
    budget: Budget = None,
    no_cache: NoCache = False,
    no_probe: NoProbe = False,
    retry_errors: RetryErrors = False,
    allow_missing: AllowMissing = False,
    min_coverage: MinCoverage = 1.0,
    bootstrap_seed: BootstrapSeed = 0,
) -> None:
    """All steps: draw (or take --images), judge, score, report. Run it again to go on where it stopped.

    Example: [bold]echo4o evaluate genevalpp --model echo-4o --out runs/echo-4o[/bold]
    """
    steps_of = _Steps(benchmark, out, prompts, revision, group, limit)
    # Everything that can be refused is refused before the first picture is drawn.
    ask = _judging(locals())
    if (model is None) == (images is None):
        raise ValueError("give --model to draw pictures, or --images to judge those of a folder")
    if images is None:
        if not steps_of.draw(_drawing(locals()), device, dtype):
            return
    ask()
    steps_of.score(min_coverage, bootstrap_seed)


@app.command("generate")
def generate(
    benchmark: Benchmark,
    model: Annotated[str, typer.Option("--model", "-m", help="What draws.")],
    out: Out,
    prompts: Prompts = None,
    revision: Revision = None,
    group: GroupOption = None,
    limit: Limit = None,
    pictures: PerPrompt = 1,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    image_guidance: ImageGuidance = None,
    height: Side = None,
    width: Side = None,
    think: Think = False,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Step 1: draw the pictures. Start it with accelerate launch to share them among GPUs and nodes.

    Example: [bold]accelerate launch -m echo4o evaluate generate genevalpp --model echo-4o --out runs/echo-4o[/bold]
    """
    steps_of = _Steps(benchmark, out, prompts, revision, group, limit)
    if steps_of.draw(_drawing(locals()), device, dtype):
        say("the pictures:")
        finish(out / "images", shlex.join(["echo4o", "evaluate", "judge", "--out", str(out)]))


@app.command("judge")
def judge(
    out: Out,
    judge: JudgeOption = "",
    benchmark: Annotated[str | None, typer.Option(help="Of pictures that were not drawn into --out.")] = None,
    images: ImagesDir = None,
    prompts: Prompts = None,
    revision: Revision = None,
    group: GroupOption = None,
    limit: Limit = None,
    pictures: PerPrompt = 1,
    model: ModelOption = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    judge_url: JudgeUrl = None,
    judge_key_env: KeyVariable = "OPENAI_API_KEY",
    judge_prompt: JudgePrompt = None,
    temperature: Temperature = "0",
    max_tokens: MaxTokens = None,
    repeats: Repeats = 1,
    concurrency: Concurrency = 16,
    tries: Tries = 6,
    timeout: Timeout = 120.0,
    price: Price = None,
    budget: Budget = None,
    no_cache: NoCache = False,
    no_probe: NoProbe = False,
    retry_errors: RetryErrors = False,
    allow_missing: AllowMissing = False,
) -> None:
    """Step 2: ask the judge about every picture that it has not judged yet.

    Example: [bold]echo4o evaluate judge --out runs/echo-4o --judge openai:gpt-4.1-2025-04-14 --budget 5[/bold]
    """
    steps_of = _Steps(benchmark, out, prompts, revision, group, limit)
    _judging(locals())()
    say("the judgements:")
    finish(out / "records.jsonl", shlex.join(["echo4o", "evaluate", "score", "--out", str(out)]))


@app.command("score")
def score(
    out: Out,
    min_coverage: MinCoverage = 1.0,
    bootstrap_seed: BootstrapSeed = 0,
) -> None:
    """Step 3: turn judgements into scores with intervals, and write the report.

    Example: [bold]echo4o evaluate score --out runs/echo-4o[/bold]
    """
    _Steps(None, out).score(min_coverage, bootstrap_seed)


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="A judged folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one of the same prompts and judge.", show_default=False)],
    any_judge: Annotated[bool, typer.Option("--any-judge", help="In spite of different judges.")] = False,
    bootstrap_seed: BootstrapSeed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Is B better than A? Differences paired by prompt, with intervals and a significance test.

    Example: [bold]echo4o evaluate compare runs/bagel runs/echo-4o[/bold]
    """
    from echo4o.evaluation.compare import compare as compare_folders

    found = compare_folders(a, b, bootstrap_seed, any_judge)
    if as_json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print_comparison(found)
    finish(None, shlex.join(["echo4o", "evaluate", "compare", str(a), str(b), "--json"]))


@app.command("make-prompts")
def make_prompts(
    benchmark: Benchmark,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("genevalpp-fresh.jsonl"),
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another set.")] = 0,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Prompt files whose contents must not come back; repeatable.")
    ] = None,
) -> None:
    """Make a fresh set of prompts with the tags and the statistics of GenEval++, which nobody trained on.

    Example: [bold]echo4o evaluate make-prompts genevalpp --seed 7 --exclude Geneval++.jsonl --out fresh.jsonl[/bold]
    """
    from echo4o.evaluation.benchmarks import get_benchmark
    from echo4o.evaluation.make_prompts import make_genevalpp, write_prompts
    from echo4o.evaluation.prompt_files import read_prompts

    chosen = get_benchmark(benchmark)
    if chosen.name != "genevalpp":
        raise ValueError(f"fresh prompts can be made for genevalpp only, not for {chosen.name}")
    known = [prompt.facts for file in exclude or [] for prompt in read_prompts(chosen, file)]
    rows = make_genevalpp(seed, known)
    write_prompts(rows, out)
    if not exclude:
        say("no file was excluded: a content of the official set can have come back by chance (--exclude FILE)")
    say(f"{len(rows)} prompts:")
    finish(
        out, shlex.join(["echo4o", "evaluate", "genevalpp", "--prompts", str(out), "--model", "MODEL", "--out", "DIR"])
    )


class _Steps:
    """The steps of one folder."""

    def __init__(self, benchmark, out, prompts=None, revision=None, groups=None, limit=None):
        from echo4o.evaluation.benchmarks import get_benchmark
        from echo4o.evaluation.folder import PROMPTS
        from echo4o.evaluation.prompt_files import load_prompts
        from echo4o.evaluation.run import keep_prompts, kept_prompts

        self.out = out
        asked = any(value is not None for value in (prompts, revision, groups, limit))
        kept = (out / PROMPTS).is_file()
        if kept and not asked:
            self.benchmark, self.prompts = kept_prompts(out)
            if benchmark is not None and get_benchmark(benchmark) is not self.benchmark:
                raise ValueError(f"{out} holds an evaluation with {self.benchmark.name}: use another --out")
            return
        if benchmark is None:
            if not kept:
                raise ValueError(f"{out} holds no evaluation yet: say which --benchmark the pictures belong to")
            benchmark = kept_prompts(out)[0].name
        self.benchmark = get_benchmark(benchmark)
        self.prompts = load_prompts(self.benchmark, prompts, revision, groups or (), limit)
        if _is_main_process():
            keep_prompts(self.benchmark, self.prompts, out)

    def draw(self, settings, device: str, dtype: Dtype) -> bool:
        """Draw what is missing; returns whether this process goes on to the next step."""
        check_model(settings.model)
        from echo4o.evaluation.generate import generate_pictures, world

        state = world(cpu=device == "cpu")
        where = state.device if device == "auto" else choose_device(device)

        def load():
            pipe = load_pipeline(settings.model, where, dtype)
            pipe.set_progress_bar_config(disable=True)
            if settings.adapter and not hasattr(pipe, "load_lora_weights"):
                raise ValueError(f"--adapter {settings.adapter}: {type(pipe).__name__} cannot load adapters")
            if settings.adapter:
                pipe.load_lora_weights(settings.adapter)
            return pipe

        with progress("pictures", state.is_main_process) as advance:
            generate_pictures(self.prompts.prompts, settings, self.out, load, state, advance)
        return state.is_main_process

    def judge(self, judge, options, **rest) -> None:
        from dataclasses import replace

        from echo4o.evaluation.run import judge_folder

        with progress("judgements") as advance:

            def on_progress(done, total, ledger):
                spent = "" if ledger.spent is None else f", {ledger.spent:.3f} USD"
                advance(done, total, f"{ledger.calls} calls, {ledger.input_tokens:,} tokens in{spent}")

            def on_estimate(calls, tokens, usd):
                cost = "price unknown (--price IN,OUT)" if usd is None else f"about {usd:.2f} USD"
                say(f"{calls} judgements to pay for, about {tokens:,} input tokens, {cost}")

            options = replace(options, on_progress=on_progress, on_estimate=on_estimate)
            judge_folder(self.benchmark, self.prompts.prompts, judge, self.out, options=options, **rest)

    def score(self, min_coverage: float, seed: int) -> None:
        from echo4o.evaluation.report import write_report
        from echo4o.evaluation.score import score_folder

        result = score_folder(self.out, min_coverage, seed)
        report = write_report(self.out)
        print_result(result)
        finish(
            [self.out / "result.json", report], shlex.join(["echo4o", "evaluate", "compare", "OTHER", str(self.out)])
        )


def _drawing(given: dict):
    from echo4o.evaluation.generate import Settings

    names = (
        "model",
        "seed",
        "batch_size",
        "steps",
        "guidance",
        "image_guidance",
        "height",
        "width",
        "think",
        "adapter",
    )
    same = {name: given[name] for name in names}
    return Settings(per_prompt=given["pictures"], requested_dtype=given["dtype"].value, **same)


def _judging(given: dict):
    """Check everything about the judge now; returns what asks it."""
    from echo4o.evaluation.calls import KNOWN_PRICES, Policy
    from echo4o.evaluation.judge import Options
    from echo4o.evaluation.judges import DEFAULT_JUDGE, make_judge
    from echo4o.evaluation.prompt_files import cache_folder
    from echo4o.evaluation.questions import load_judge_prompts

    name = given["judge"] or DEFAULT_JUDGE
    steps_of = given["steps_of"]
    where, dtype = given["device"], given["dtype"]
    of_kind = {}
    if name.startswith("openai"):
        of_kind = {
            "url": given["judge_url"],
            "key_variable": given["judge_key_env"],
            "temperature": _temperature(given["temperature"]),
            "timeout": given["timeout"],
        }
    judge = make_judge(
        name,
        given["model"],
        load_pipeline=lambda model: load_pipeline(model, choose_device(where), dtype),
        device=where,
        max_tokens=given["max_tokens"],
        **of_kind,
    )
    price = _price(given["price"]) or KNOWN_PRICES.get(name.partition(":")[2])
    if given["budget"] is not None and judge.paid and price is None:
        raise ValueError("--budget needs the price of the judge's tokens: --price IN,OUT in USD per million")
    options = Options(
        policy=Policy(concurrency=given["concurrency"], tries=given["tries"]),
        price=price,
        budget=given["budget"],
        cache=None if given["no_cache"] else cache_folder() / "answers",
        probe=not given["no_probe"] and not name.startswith("pixels"),
        retry_errors=given["retry_errors"],
    )
    rest = {
        "images": given["images"],
        "per_prompt": given["pictures"],
        "repeats": given["repeats"],
        "judge_prompts": load_judge_prompts(steps_of.benchmark, given["judge_prompt"]),
        "allow_missing": given["allow_missing"],
    }
    return lambda: steps_of.judge(judge, options, **rest)


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


def _is_main_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
