"""``echo4o dataset synthesize``: generate rows for Echo-4o-Image with an image API."""

import errno
import math
import shlex
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say


def synthesize(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write. An interrupted run resumes there.")
    ] = Path("synthesis"),
    plan: Annotated[
        bool, typer.Option("--plan", help="Print counts, calls, cost and time, and call no endpoint.")
    ] = False,
    preview: Annotated[
        int | None,
        typer.Option(
            min=1, max=200, help="Generate only this many rows, from all parts in turn, and a contact sheet."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Maximum cost of the folder in USD, over all runs.", show_default="no limit")
    ] = None,
    probe: Annotated[bool, typer.Option(help="First check with a test image that the judge can see.")] = True,
) -> None:
    """Generate rows with an image API: instructions, images, checks. echo4o dataset build reads the result.

    Example: [bold]echo4o dataset synthesize first_hundred --plan[/bold]
    Then: [bold]echo4o dataset synthesize first_hundred --out made --budget 5 --preview 12[/bold]
    """
    from echo4o.dataset_scripts.synthesis.folder import DATASET, SynthesisFolder
    from echo4o.dataset_scripts.synthesis.plan import make_plan
    from echo4o.dataset_scripts.synthesis.preview import first_tasks, write_preview
    from echo4o.dataset_scripts.synthesis.recipe import load_recipe
    from echo4o.dataset_scripts.synthesis.tasks import load_chains, make_tasks

    chosen = load_recipe(recipe)
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"--budget {budget:g}: must be a positive number of USD, for example --budget 5")
    chains = load_chains(chosen)
    tasks = make_tasks(chosen, chains)
    command = ["echo4o", "dataset", "synthesize", recipe, "--out", str(out)]
    command += [] if budget is None else ["--budget", f"{budget:g}"]
    if plan:
        print("\n".join(make_plan(chosen, tasks).lines()))
        finish(None, shlex.join([*command, "--preview", "12"]))
        return
    wanted = first_tasks(tasks, preview) if preview else tasks
    prompts = _prompts(chosen)
    with _disk(out), SynthesisFolder(out) as folder:
        folder.begin(_run(chosen, chains), chosen.about())
        left = make_plan(chosen, [task for task in wanted if not folder.is_decided(task.id)])
        say("\n".join(left.lines()))
        outcome, spent, reason = _generate(chosen, chains, wanted, folder, prompts, budget, probe, left)
        sheet = write_preview(folder, wanted) if preview else None
    uncounted = (
        f", not counting the calls of models without a price ({', '.join(left.unpriced())})" if left.unpriced() else ""
    )
    say(f"{outcome}; {spent:.4f} USD spent in total{uncounted}")
    for row, cause in list(outcome.open.items())[:3]:
        say(f"{row} is not decided yet: {cause}")
    if reason is not None:
        say(f"paid results are kept in {out}; run the same command again to resume")
        raise reason
    is_open = outcome.decided < outcome.planned
    if sheet is not None or is_open:
        finish(sheet or out, shlex.join(command))
        raise typer.Exit(int(is_open))
    else:
        finish(out / DATASET, shlex.join(["echo4o", "dataset", "build", str(out / DATASET), "--out", f"{out}-built"]))


def _run(recipe, chains) -> dict:
    """The contents of run.json. A recipe contains no key."""
    drawn_from = {
        f"{part}.{name}": digest for part, chain in chains.items() for name, digest in chain.hashes().items()
    }
    return {
        "fingerprint": recipe.fingerprint(),
        "decides": recipe.decides(),
        "drawn_from": drawn_from,
        "recipe": recipe.model_dump(mode="json"),
    }


def _prompts(recipe):
    """The index of benchmark prompts that no row may be close to, or None if the recipe disables this gate."""
    from echo4o.dataset_scripts.contamination import PromptIndex, read_prompts
    from echo4o.evaluation.benchmarks import get_benchmark
    from echo4o.evaluation.benchmarks.prompt_files import load_prompts

    gate = recipe.gates.contamination
    if gate is None:
        return None
    listed = [pair for file in gate.prompts for pair in read_prompts(file)]
    for name in gate.benchmarks:
        try:
            listed += [(name, prompt.text) for prompt in load_prompts(get_benchmark(name)).prompts]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"gates.contamination: the prompts of {name} cannot be loaded ({error}). Add their file to "
                f"gates.contamination.prompts and remove {name} from gates.contamination.benchmarks, or disable the gate "
                "with gates.contamination: null"
            ) from None
    return PromptIndex(listed, gate.overlap)


def _generate(recipe, chains, tasks, folder, prompts, budget, probe, plan):
    """Runs the engine. Returns the outcome, the USD spent in all runs, and the error that ended the run early."""
    from tqdm.auto import tqdm

    from echo4o.dataset_scripts.synthesis.engine import Synthesis, SynthesisOutcome
    from echo4o.dataset_scripts.synthesis.folder import SPENDING
    from echo4o.endpoints.budget import Ledger
    from echo4o.endpoints.calls import run_async
    from echo4o.endpoints.synthesis_calls import SynthesisCalls
    from echo4o.evaluation.image_checks import JudgeImageChecker

    roles = [calls.role for calls in plan.calls]
    if not roles:  # every row is decided
        return SynthesisOutcome.of(tasks, folder), Ledger(folder.path / SPENDING).spent or 0.0, None
    calls = SynthesisCalls(recipe, folder.path, roles, JudgeImageChecker, budget, probe)
    bar = tqdm(total=len(tasks), desc="synthesizing", unit=" rows", disable=None, leave=False)

    def progress(outcome) -> None:
        bar.n = outcome.decided
        bar.set_postfix_str(f"{outcome.rejected.total()} rejected, {calls.ledger.spent or 0.0:.2f} USD", refresh=False)
        bar.update(0)

    engine = Synthesis(recipe, chains, tasks, calls, folder, prompts, progress)

    async def run() -> None:
        async with calls:
            await engine.run()

    with bar:
        run_async(run)
    return engine.outcome, calls.ledger.spent or 0.0, calls.reason


@contextmanager
def _disk(out: Path):
    """Add the folder to the error of a full disk; the system does not name it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        hint = "paid results are kept; free some space and run the same command again"
        raise OSError(f"{out}: {error.strerror}; {hint}") from None
