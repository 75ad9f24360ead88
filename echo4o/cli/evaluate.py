"""``echo4o evaluate``: generate, judge, score and compare. Each step can run alone and resumes where it stopped."""

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from echo4o.cli.evaluate_options import (
    Benchmark,
    DetectorOptions,
    DeviceOptions,
    DPGOptions,
    GenerationOptions,
    Images,
    JudgeOptions,
    Model,
    Out,
    PromptOptions,
    ScoreOptions,
    spread,
)
from echo4o.cli.evaluate_output import (
    judging_progress,
    print_agreement,
    print_audit,
    print_comparison,
    print_result,
    progress,
)
from echo4o.cli.frame import Command, finish, say
from echo4o.cli.models import check_model, choose_device, load_pipeline
from echo4o.common import strict_json

if TYPE_CHECKING:
    from echo4o.evaluation.generate import GenerationSettings
    from echo4o.evaluation.judge_prompts import JudgePrompt
    from echo4o.evaluation.judges import Judge
    from echo4o.evaluation.judging import JudgingOptions


class _RunByDefault(TyperGroup):
    """``echo4o evaluate genevalpp ...`` means ``echo4o evaluate run genevalpp ...``."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_RunByDefault, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def evaluate() -> None:
    """Score a model with GenEval++, Imagine-Bench, OmniContext, GenEval or DPG-Bench.

    Example: [bold]echo4o evaluate genevalpp --model echo-4o --judge openai:gpt-4.1-2025-04-14 --out runs/echo-4o[/bold]
    This is short for echo4o evaluate run; for its options, see [bold]echo4o evaluate run --help[/bold]
    Images of any other model: [bold]echo4o evaluate genevalpp --images DIR --judge J --out DIR[/bold]
    """


@app.command("run", cls=Command)
@spread
def run(
    benchmark: Benchmark,
    out: Out,
    prompt_options: PromptOptions,
    generation: GenerationOptions,
    device_options: DeviceOptions,
    judging: JudgeOptions,
    detector: DetectorOptions,
    dpg: DPGOptions,
    scoring: ScoreOptions,
    model: Model = None,
    images: Images = None,
) -> None:
    """Run all steps: generate (or read --images), judge, score, report. Run it again to resume.

    Example: [bold]echo4o evaluate genevalpp --model echo-4o --out runs/echo-4o[/bold]
    """
    if dpg.answers is not None:
        steps = _Steps(benchmark, out, prompt_options)
        steps.import_answers(dpg.answers)
        steps.score(scoring)
        return
    if (model is None) == (images is None):
        raise ValueError("pass --model to generate images, or --images to judge the images of a folder")
    if model is not None:
        check_model(model)
    steps = _Steps(benchmark, out, prompt_options)
    images = steps.cut_grids(images, dpg.grid)
    # Check all options before the first image is generated.
    judge_images = steps.judging(judging, detector, device_options, model, images)
    if model is not None:
        settings = generation.settings(model, steps.per_prompt, device_options.dtype)
        if not steps.generate(settings, device_options):
            return
    judge_images()
    steps.score(scoring)


@app.command("generate", cls=Command)
@spread
def generate(
    benchmark: Benchmark,
    model: Annotated[str, typer.Option("--model", "-m", help="The model that generates the images.")],
    out: Out,
    prompt_options: PromptOptions,
    generation: GenerationOptions,
    device_options: DeviceOptions,
) -> None:
    """Step 1: generate the images. Start it with accelerate launch to use several GPUs and nodes.

    Example: [bold]echo4o evaluate generate genevalpp --model echo-4o --out runs/echo-4o[/bold]
    Several GPUs: [bold]accelerate launch -m echo4o evaluate generate genevalpp --model echo-4o --out runs/x[/bold]
    """
    check_model(model)
    steps = _Steps(benchmark, out, prompt_options)
    if steps.generate(generation.settings(model, steps.per_prompt, device_options.dtype), device_options):
        say("the images:")
        finish(out / "images", shlex.join(["echo4o", "evaluate", "judge", "--out", str(out)]))


@app.command("judge", cls=Command)
@spread
def judge(
    out: Out,
    prompt_options: PromptOptions,
    judging: JudgeOptions,
    detector: DetectorOptions,
    dpg: DPGOptions,
    device_options: DeviceOptions,
    benchmark: Annotated[
        str | None, typer.Option(help="The benchmark of images that were not generated into --out.")
    ] = None,
    images: Images = None,
    model: Model = None,
) -> None:
    """Step 2: ask the judge about every image without a judgement.

    Example: [bold]echo4o evaluate judge --out runs/echo-4o --judge openai:gpt-4.1-2025-04-14 --budget 5[/bold]
    """
    steps = _Steps(benchmark, out, prompt_options)
    if dpg.answers is not None:
        steps.import_answers(dpg.answers)
    else:
        steps.judging(judging, detector, device_options, model, steps.cut_grids(images, dpg.grid))()
    say("the judgements:")
    finish(out / "records.jsonl", shlex.join(["echo4o", "evaluate", "score", "--out", str(out)]))


@app.command("score")
@spread
def score(out: Out, scoring: ScoreOptions) -> None:
    """Step 3: compute scores with intervals from the judgements, and write the report.

    Example: [bold]echo4o evaluate score --out runs/echo-4o[/bold]
    """
    _Steps(None, out, PromptOptions()).score(scoring)


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="A judged folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="A judged folder with the same prompts and judge.", show_default=False)],
    any_judge: Annotated[
        bool, typer.Option("--any-judge", help="Compare even if judges or questions differ.")
    ] = False,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the confidence intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two runs: differences paired by prompt, with intervals and a significance test.

    Example: [bold]echo4o evaluate compare runs/bagel runs/echo-4o[/bold]
    """
    from echo4o.evaluation.compare import compare as compare_folders

    comparison = compare_folders(a, b, bootstrap_seed, any_judge)
    if as_json:
        print(strict_json.dumps(comparison, indent=2))
    else:
        print_comparison(comparison)
    finish(None, shlex.join(["echo4o", "evaluate", "compare", str(a), str(b), "--json"]))


@app.command("agree")
def agree(
    a: Annotated[Path, typer.Argument(help="A judged folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="A folder with other judgements of the same images.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML page to write.", show_default="agreement.html in B")
    ] = None,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the confidence intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two judges, or two dates of one judge, on the same images: agreement, kappa, differences.

    Example: [bold]echo4o evaluate agree runs/january runs/june[/bold]
    """
    from echo4o.evaluation.agreement import PAGE, write_agreement

    page = out or b / PAGE
    found = write_agreement(a, b, page, bootstrap_seed)
    if as_json:
        print(strict_json.dumps(found, indent=2))
        say(f"the images on which they differ: {page}")
        return
    print_agreement(found)
    finish(page, shlex.join(["echo4o", "evaluate", "agree", str(a), str(b), "--json"]))


@app.command("make-prompts")
def make_prompts(
    benchmark: Annotated[str, typer.Argument(help="genevalpp or geneval.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="BENCHMARK-fresh.jsonl")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts.")] = 0,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="A prompt file whose contents must not appear again; repeatable.")
    ] = None,
) -> None:
    """Make new prompts with the tags and statistics of GenEval++ or GenEval, on which no model was trained.

    Example: [bold]echo4o evaluate make-prompts genevalpp --seed 7 --exclude Geneval++.jsonl --out fresh.jsonl[/bold]
    """
    from echo4o.evaluation.benchmarks import get_benchmark
    from echo4o.evaluation.benchmarks.geneval.fresh_prompts import make_geneval
    from echo4o.evaluation.benchmarks.prompt_files import read_prompts
    from echo4o.evaluation.fresh_prompts import make_genevalpp, write_prompts

    chosen = get_benchmark(benchmark)
    makers = {"genevalpp": make_genevalpp, "geneval": make_geneval}
    if chosen.name not in makers:
        raise ValueError(f"fresh prompts can be made for {' and '.join(makers)} only, not for {chosen.name}")
    known = [prompt.facts for file in exclude or [] for prompt in read_prompts(chosen, file)]
    rows = makers[chosen.name](seed, known)
    out = out or Path(f"{chosen.name}-fresh.jsonl")
    write_prompts(rows, out)
    if not exclude:
        say("no file is excluded: contents of the official set can appear by chance (use --exclude FILE)")
    say(f"{len(rows)} prompts:")
    finish(
        out, shlex.join(["echo4o", "evaluate", chosen.name, "--prompts", str(out), "--model", "MODEL", "--out", "DIR"])
    )


@app.command("convert-detector")
def convert_detector(
    checkpoint: Annotated[Path, typer.Argument(help="The .pth file of mmdet.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
) -> None:
    """Convert the checkpoint of GenEval's detector to safetensors. The file is read as tensors, never executed.

    Example: [bold]echo4o evaluate convert-detector mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth detector[/bold]
    """
    from echo4o.evaluation.benchmarks.geneval.convert_detector import PUBLISHED_SHA256
    from echo4o.evaluation.benchmarks.geneval.convert_detector import convert_detector as convert

    about = convert(checkpoint, out)
    say(f"SHA-256 of {checkpoint.name}: {about['sha256']}")
    if not about["published"]:
        say(f"this is not the published file, whose SHA-256 begins with {PUBLISHED_SHA256}")
    finish(
        out, shlex.join(["echo4o", "evaluate", "geneval", "--detector", str(out), "--model", "MODEL", "--out", "DIR"])
    )


class _Steps:
    """The steps of an evaluation in one folder."""

    def __init__(self, benchmark: str | None, out: Path, prompt_options: PromptOptions):
        from echo4o.evaluation.benchmarks import get_benchmark
        from echo4o.evaluation.benchmarks.prompt_files import load_prompts
        from echo4o.evaluation.folder import PROMPTS
        from echo4o.evaluation.run import keep_prompts, kept_prompts

        self.out = out
        selection = (
            prompt_options.prompts,
            prompt_options.questions,
            prompt_options.revision,
            prompt_options.group,
            prompt_options.limit,
        )
        kept = (out / PROMPTS).is_file()
        if kept and all(value is None for value in selection):
            self.benchmark, self.prompts = kept_prompts(out)
            if benchmark is not None and get_benchmark(benchmark) is not self.benchmark:
                raise ValueError(f"{out} contains an evaluation with {self.benchmark.name}: use another --out")
            self.per_prompt = prompt_options.num_images or self.benchmark.images_per_prompt
            return
        if benchmark is None:
            if not kept:
                raise ValueError(f"{out} contains no evaluation yet: pass the --benchmark of the images")
            benchmark = kept_prompts(out)[0].name
        self.benchmark = get_benchmark(benchmark)
        self.per_prompt = prompt_options.num_images or self.benchmark.images_per_prompt
        self.prompts = load_prompts(
            self.benchmark,
            prompt_options.prompts,
            prompt_options.revision,
            prompt_options.group or (),
            prompt_options.limit,
            prompt_options.questions,
        )
        if os.environ.get("RANK", "0") == "0":
            keep_prompts(self.benchmark, self.prompts, out)

    def generate(self, settings: "GenerationSettings", device_options: DeviceOptions) -> bool:
        """Generates the missing images. Returns whether this process runs the next step."""
        from echo4o.evaluation.generate import generate_images, world

        state = world(cpu=device_options.device == "cpu")
        device = device_options.device
        where = state.device if device == "auto" and state.device is not None else choose_device(device)

        def load():
            pipe = load_pipeline(settings.model, where, device_options.dtype)
            pipe.set_progress_bar_config(disable=True)
            if settings.adapter and not hasattr(pipe, "load_lora_weights"):
                raise ValueError(f"--adapter {settings.adapter}: {type(pipe).__name__} cannot load adapters")
            if settings.adapter:
                pipe.load_lora_weights(settings.adapter)
            return pipe

        with progress("images", state.is_main_process) as advance:
            generate_images(self.prompts.prompts, settings, self.out, load, state, advance)
        return state.is_main_process

    def cut_grids(self, images: Path | None, side: int | None) -> Path | None:
        """The folder of the images: `--images`, or where its grids were cut to."""
        if side is None:
            return images
        from echo4o.evaluation.benchmarks.dpg.grid import write_grid_images
        from echo4o.evaluation.benchmarks.prompt_files import DPG_NAMES
        from echo4o.evaluation.folder import IMAGES

        if images is None or self.benchmark.name not in DPG_NAMES:
            raise ValueError("--grid needs --images, and a benchmark whose images come in grids (dpg)")
        ids = [prompt.id for prompt in self.prompts.prompts]
        write_grid_images(images, ids, side, self.per_prompt, self.out / IMAGES)
        return self.out / IMAGES

    def import_answers(self, file: Path) -> None:
        """Take over the answers of the original DPG-Bench."""
        from echo4o.evaluation.benchmarks.dpg.benchmark import DPGBench
        from echo4o.evaluation.benchmarks.dpg.original_answers import import_answers

        if not isinstance(self.benchmark, DPGBench):
            raise ValueError(f"--answers is for dpg only, not for {self.benchmark.name}")
        import_answers(self.benchmark, self.prompts.prompts, file, self.out, self.per_prompt)

    def judging(
        self,
        judging: JudgeOptions,
        detector: DetectorOptions,
        device_options: DeviceOptions,
        model: str | None,
        images: Path | None,
    ) -> Callable[[], None]:
        """Checks the options of the judge. Returns a function that judges the images."""

        judge, options = self._judge(judging, detector, device_options, model)
        questions = self._questions(judging, judge)
        audit = self._auditing(judging, detector, device_options, model, images) if judging.audit else None

        def judge_images() -> None:
            from echo4o.evaluation.run import judge_folder

            with judging_progress(options) as shown:
                outcome = judge_folder(
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
            if audit is not None:
                audit(outcome.ledger.spent or 0.0)

        return judge_images

    def _questions(self, judging: JudgeOptions, judge: "Judge") -> "dict[str, JudgePrompt]":
        """Returns the judge prompts by aspect."""
        from echo4o.evaluation.judge_prompts import load_judge_prompts
        from echo4o.evaluation.released_prompts import RELEASED, ReleasedPrompt

        questions = load_judge_prompts(self.benchmark, judging.judge_prompt)
        if any(isinstance(question, ReleasedPrompt) for question in questions.values()) and not judge.name.startswith(
            "openai:"
        ):
            raise ValueError(
                f"--judge-prompt {RELEASED} sends what the released script sends: it needs an openai: judge"
            )
        return questions

    def _judge(
        self, judging: JudgeOptions, detector: DetectorOptions, device_options: DeviceOptions, model: str | None
    ) -> "tuple[Judge, JudgingOptions]":
        """Returns the judge and its options. Raises ValueError if it cannot judge this benchmark."""
        from echo4o.evaluation.judges import DEFAULT_JUDGE, make_judge
        from echo4o.evaluation.run import require_fitting

        name = judging.judge or self.benchmark.default_judge or DEFAULT_JUDGE
        judge = make_judge(
            name,
            model,
            load_pipeline=lambda model: load_pipeline(
                model, choose_device(device_options.device), device_options.dtype
            ),
            device=device_options.device,
            max_tokens=judging.max_tokens,
            detector=detector.settings(),
            **(judging.endpoint() if name.startswith("openai") else {}),
        )
        require_fitting(self.benchmark, judge)
        return judge, judging.options(name, judge.paid)

    def _auditing(
        self,
        judging: JudgeOptions,
        detector: DetectorOptions,
        device_options: DeviceOptions,
        model: str | None,
        images: Path | None,
    ) -> Callable[[float], None]:
        """Checks the options of the audit. Returns a function that judges a share of the prompts again.

        It takes the USD that the first judge has cost: the budget is for both.
        """
        from echo4o.evaluation.audit_run import audit_folder, sampled_prompts

        judge, options = self._judge(judging.auditor(), detector, device_options, model)
        questions = self._questions(judging, judge)
        sampled_prompts(self.prompts.prompts, judging.audit_share, judging.audit_seed)

        def audit_images(spent: float) -> None:
            left = None if options.budget is None else max(0.0, options.budget - spent)
            with judging_progress(replace(options, budget=left), "audit") as shown:
                audit_folder(
                    self.benchmark,
                    self.prompts,
                    judge,
                    self.out,
                    judging.audit_share,
                    judging.audit_seed,
                    self.per_prompt,
                    images,
                    questions,
                    judging.allow_missing,
                    shown,
                )

        return audit_images

    def score(self, scoring: ScoreOptions) -> None:
        """Computes the scores, writes the report and prints both."""
        from echo4o.common.files import read_json
        from echo4o.evaluation.folder import AUDIT, COSTS
        from echo4o.evaluation.score import score_folder
        from echo4o.evaluation.score_report import write_report

        result = score_folder(self.out, scoring.min_coverage, scoring.bootstrap_seed)
        report = write_report(self.out)
        print_result(result)
        print_audit(result.get("audit"), read_json(self.out / AUDIT / COSTS))
        finish(
            [self.out / "result.json", report], shlex.join(["echo4o", "evaluate", "compare", "OTHER", str(self.out)])
        )
