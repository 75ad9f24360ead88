"""``echo4o evaluate``: draw, judge, score and compare; each step can be called alone and goes on where it stopped."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from echo4o.cli.evaluate_options import (
    Benchmark,
    Chosen,
    Drawing,
    Images,
    Judging,
    Machine,
    Model,
    Out,
    Scoring,
    spread,
)
from echo4o.cli.evaluate_output import judging_progress, print_comparison, print_result, progress
from echo4o.cli.frame import finish, say
from echo4o.cli.pictures import check_model, choose_device, load_pipeline

if TYPE_CHECKING:
    from echo4o.evaluation.generate import GenerationSettings


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


@app.command("run")
@spread
def run(
    benchmark: Benchmark,
    out: Out,
    chosen: Chosen,
    drawing: Drawing,
    machine: Machine,
    judging: Judging,
    scoring: Scoring,
    model: Model = None,
    images: Images = None,
) -> None:
    """All steps: draw (or take --images), judge, score, report. Run it again to go on where it stopped.

    Example: [bold]echo4o evaluate genevalpp --model echo-4o --out runs/echo-4o[/bold]
    """
    if (model is None) == (images is None):
        raise ValueError("give --model to draw pictures, or --images to judge those of a folder")
    if model is not None:
        check_model(model)
    steps = _Steps(benchmark, out, chosen)
    # Everything that can be refused is refused before the first picture is drawn.
    ask = steps.judging(judging, machine, model, images)
    if images is None and not steps.draw(drawing.settings(model, chosen.pictures, machine.dtype), machine):
        return
    ask()
    steps.score(scoring)


@app.command("generate")
@spread
def generate(
    benchmark: Benchmark,
    model: Annotated[str, typer.Option("--model", "-m", help="What draws.")],
    out: Out,
    chosen: Chosen,
    drawing: Drawing,
    machine: Machine,
) -> None:
    """Step 1: draw the pictures. Start it with accelerate launch to share them among GPUs and nodes.

    Example: [bold]echo4o evaluate generate genevalpp --model echo-4o --out runs/echo-4o[/bold]
    Several GPUs: [bold]accelerate launch -m echo4o evaluate generate genevalpp --model echo-4o --out runs/x[/bold]
    """
    check_model(model)
    steps = _Steps(benchmark, out, chosen)
    if steps.draw(drawing.settings(model, chosen.pictures, machine.dtype), machine):
        say("the pictures:")
        finish(out / "images", shlex.join(["echo4o", "evaluate", "judge", "--out", str(out)]))


@app.command("judge")
@spread
def judge(
    out: Out,
    chosen: Chosen,
    judging: Judging,
    machine: Machine,
    benchmark: Annotated[str | None, typer.Option(help="Of pictures that were not drawn into --out.")] = None,
    images: Images = None,
    model: Model = None,
) -> None:
    """Step 2: ask the judge about every picture that it has not judged yet.

    Example: [bold]echo4o evaluate judge --out runs/echo-4o --judge openai:gpt-4.1-2025-04-14 --budget 5[/bold]
    """
    _Steps(benchmark, out, chosen).judging(judging, machine, model, images)()
    say("the judgements:")
    finish(out / "records.jsonl", shlex.join(["echo4o", "evaluate", "score", "--out", str(out)]))


@app.command("score")
@spread
def score(out: Out, scoring: Scoring) -> None:
    """Step 3: turn judgements into scores with intervals, and write the report.

    Example: [bold]echo4o evaluate score --out runs/echo-4o[/bold]
    """
    _Steps(None, out, Chosen()).score(scoring)


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="A judged folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one of the same prompts and judge.", show_default=False)],
    any_judge: Annotated[bool, typer.Option("--any-judge", help="In spite of different judges.")] = False,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 0,
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
    from echo4o.evaluation.fresh_prompts import make_genevalpp, write_prompts
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

    def __init__(self, benchmark: str | None, out: Path, chosen: Chosen):
        from echo4o.evaluation.benchmarks import get_benchmark
        from echo4o.evaluation.folder import PROMPTS
        from echo4o.evaluation.prompt_files import load_prompts
        from echo4o.evaluation.run import keep_prompts, kept_prompts

        self.out, self.per_prompt = out, chosen.pictures
        which = (chosen.prompts, chosen.revision, chosen.group, chosen.limit)
        kept = (out / PROMPTS).is_file()
        if kept and all(value is None for value in which):
            self.benchmark, self.prompts = kept_prompts(out)
            if benchmark is not None and get_benchmark(benchmark) is not self.benchmark:
                raise ValueError(f"{out} holds an evaluation with {self.benchmark.name}: use another --out")
            return
        if benchmark is None:
            if not kept:
                raise ValueError(f"{out} holds no evaluation yet: say which --benchmark the pictures belong to")
            benchmark = kept_prompts(out)[0].name
        self.benchmark = get_benchmark(benchmark)
        self.prompts = load_prompts(self.benchmark, chosen.prompts, chosen.revision, chosen.group or (), chosen.limit)
        if os.environ.get("RANK", "0") == "0":
            keep_prompts(self.benchmark, self.prompts, out)

    def draw(self, settings: "GenerationSettings", machine: Machine) -> bool:
        """Draw what is missing; returns whether this process goes on to the next step."""
        from echo4o.evaluation.generate import generate_images, world

        state = world(cpu=machine.device == "cpu")
        where = state.device if machine.device == "auto" else choose_device(machine.device)

        def load():
            pipe = load_pipeline(settings.model, where, machine.dtype)
            pipe.set_progress_bar_config(disable=True)
            if settings.adapter and not hasattr(pipe, "load_lora_weights"):
                raise ValueError(f"--adapter {settings.adapter}: {type(pipe).__name__} cannot load adapters")
            if settings.adapter:
                pipe.load_lora_weights(settings.adapter)
            return pipe

        with progress("pictures", state.is_main_process) as advance:
            generate_images(self.prompts.prompts, settings, self.out, load, state, advance)
        return state.is_main_process

    def judging(self, judging: Judging, machine: Machine, model: str | None, images: Path | None):
        """Check everything about the judge now; returns what asks it."""
        from echo4o.evaluation.judge_prompts import load_judge_prompts
        from echo4o.evaluation.judges import DEFAULT_JUDGE, make_judge

        name = judging.judge or DEFAULT_JUDGE
        judge = make_judge(
            name,
            model,
            load_pipeline=lambda model: load_pipeline(model, choose_device(machine.device), machine.dtype),
            device=machine.device,
            max_tokens=judging.max_tokens,
            **(judging.endpoint() if name.startswith("openai") else {}),
        )
        options = judging.options(name, judge.paid)
        questions = load_judge_prompts(self.benchmark, judging.judge_prompt)

        def ask() -> None:
            from echo4o.evaluation.run import judge_folder

            with judging_progress(options) as shown:
                judge_folder(
                    self.benchmark,
                    self.prompts.prompts,
                    judge,
                    self.out,
                    options=shown,
                    images=images,
                    per_prompt=self.per_prompt,
                    repeats=judging.repeats,
                    judge_prompts=questions,
                    allow_missing=judging.allow_missing,
                )

        return ask

    def score(self, scoring: Scoring) -> None:
        from echo4o.evaluation.score import score_folder
        from echo4o.evaluation.score_report import write_report

        result = score_folder(self.out, scoring.min_coverage, scoring.bootstrap_seed)
        report = write_report(self.out)
        print_result(result)
        finish(
            [self.out / "result.json", report], shlex.join(["echo4o", "evaluate", "compare", "OTHER", str(self.out)])
        )
