"""Output of ``echo4o evaluate``: progress bars, scores, differences."""

from contextlib import contextmanager
from dataclasses import replace

from echo4o.cli.frame import say


@contextmanager
def progress(what: str, shown: bool = True):
    """Show a progress bar on stderr. Yields a function (done, total, text) that updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text="": bar.update(task, completed=done, total=total, description=text)


@contextmanager
def judging_progress(options, what: str = "judgements"):
    """Show a progress bar with the cost of the judgements. Yields the options with its callbacks."""
    with progress(what) as advance:

        def on_progress(done, total, ledger):
            spent = "" if ledger.spent is None else f", {ledger.spent:.3f} USD"
            advance(done, total, f"{ledger.calls} calls, {ledger.input_tokens:,} tokens in{spent}")

        def on_estimate(calls, tokens, usd):
            cost = "price unknown (--price IN,OUT)" if usd is None else f"about {usd:.2f} USD"
            say(f"{calls} paid judgements, about {tokens:,} input tokens, {cost}")

        yield replace(options, on_progress=on_progress, on_estimate=on_estimate)


def print_result(result: dict) -> None:
    """Print the scores of a folder on stderr. stdout contains the paths of the results."""
    from rich.console import Console
    from rich.table import Table

    table = Table("group", "score", "95% interval", "scored", box=None)
    for name, group in result["groups"].items():
        limits = result["intervals"]["groups"].get(name)
        value = "-" if group["score"] is None else f"{group['score']:.3f}"
        interval = "" if limits is None else f"{limits[0]:.3f} to {limits[1]:.3f}"
        table.add_row(name, value, interval, f"{group['scored']}/{group['total']}")
    console = Console(stderr=True)
    console.print(table)
    measure = result.get("measure")
    if measure and measure["why_not"]:
        say(f"not comparable with published numbers: {measure['why_not']}")
    coverage = f"coverage {result['coverage']:.1%}"
    if result["score"] is None:
        say(f"no overall score: {result['withheld']} ({coverage})")
        return
    low, high = result["intervals"]["score"]
    say(f"score {result['score']:.3f} ({low:.3f} to {high:.3f}), {coverage}")
    for name, value in result["also"].items():
        say(f"{name.replace('_', ' ')} {value:.3f}")


def print_comparison(comparison: dict) -> None:
    """Print the differences of two folders on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "A", "B", "B - A", "95% interval", "p", box=None)
    rows = {"score": comparison["score"], **comparison["also"], **comparison["groups"]}
    for name, row in rows.items():
        low, high = row["interval"]
        p = row.get("p_holm", row["p"])
        table.add_row(
            name,
            f"{row['a']:.3f}",
            f"{row['b']:.3f}",
            f"{row['difference']:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{p:.4f}",
        )
    Console(stderr=False).print(table)
    say(f"{comparison['prompts']} of {comparison['of']} prompts are scored in both; {comparison['test']}")


def print_agreement(found: dict) -> None:
    """Print the agreement of two judges on stderr. stdout contains the path of the page."""
    from rich.console import Console
    from rich.table import Table

    table = Table("verdicts", "values", "equal", "kappa", "95% interval", "mean B - A", box=None)
    for name, of in found["fields"].items():
        limits = of["kappa_interval"]
        table.add_row(
            name,
            str(of["values"]),
            f"{of['equal']:.1%}",
            "-" if of["kappa"] is None else f"{of['kappa']:.3f}",
            "" if limits is None else f"{limits[0]:.3f} to {limits[1]:.3f}",
            f"{of['mean_difference']:+.3f}",
        )
    Console(stderr=True).print(table)
    score, (low, high) = found["score"], found["score"]["interval"]
    say(
        f"score {score['a']:.3f} by A, {score['b']:.3f} by B, difference {score['difference']:+.3f} "
        f"({low:+.3f} to {high:+.3f})"
    )
    say(f"{found['images']} of {found['of']} judged images are scored in both, {len(found['differ'])} of them differ")


def print_audit(audit: dict | None, costs: dict | None) -> None:
    """Print what the second judge would give on everything, and what the audit saved, on stderr."""
    if audit is None:
        return
    name = audit["judge"]["judge"]
    for field, of in audit["agreement"].items():
        say(f"{name} agrees on {of['equal']:.1%} of {of['values']} audited judgements ({field.replace('_', ' ')})")
    score = audit["score"]
    if score is None or score["estimate"] is None:
        say(f"no estimate of its score: {audit['withheld'] or 'a group has no audited prompt'}")
        return
    limits = score["interval"]
    interval = "" if limits is None else f" ({limits[0]:.3f} to {limits[1]:.3f})"
    say(
        f"score that {name} would give: {score['estimate']:.3f}{interval}, from {audit['prompts']} of {audit['of']} prompts"
    )
    if costs is not None:
        usd = "" if costs["usd_saved"] is None else f", about {costs['usd_saved']:.2f} USD"
        say(f"the audit saved about {costs['calls_saved']} calls of {name}{usd}")
