"""What a child process runs to be killed."""

from pathlib import Path

from echo4o.endpoints.limits import CallPolicy
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.prompt_files import load_prompts
from echo4o.evaluation.judges.hosted import OpenAIJudge
from echo4o.evaluation.judging import JudgingOptions
from echo4o.evaluation.run import judge_folder, keep_prompts


def judge(url: str, prompts: Path, pictures: Path, out: Path, cache: Path | None, concurrency: int = 4) -> None:
    benchmark = get_benchmark("genevalpp")
    of_file = load_prompts(benchmark, prompts)
    keep_prompts(benchmark, of_file, out)
    options = JudgingOptions(policy=CallPolicy(concurrency=concurrency, first_wait=0.01), cache=cache)
    judge_folder(benchmark, of_file.prompts, OpenAIJudge("judge", url=url), out, pictures, options=options)


def interrupted(*arguments) -> None:
    try:
        judge(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
