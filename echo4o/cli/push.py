"""``echo4o push``."""

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echo4o.cli.frame import finish, say

if TYPE_CHECKING:
    from echo4o.hub.kinds.base import PushDetails


def push(
    folder: Annotated[
        str,
        typer.Argument(
            help="A pipeline, adapter, dataset or evaluation folder, a finished run, the name of a metric, or app.",
            show_default=False,
        ),
    ],
    repo: Annotated[str, typer.Argument(help="The Hub repository, owner/name.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="The Hub repository of the base model.")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="A Hub dataset that the model was trained on; repeatable.", show_default=False),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of echo4o evaluate; the card shows its scores. Repeatable.", show_default=False),
    ] = None,
    benchmark_dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BENCHMARK=DATASET[#TASK]",
            help="The Hub dataset of a benchmark: its score is also written to .eval_results/. Repeatable.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For app: the Hub repository of the model that it serves.", show_default=False)
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]REPO[:SCALE]",
            help="For app: the Hub repository of an adapter; repeatable.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded with sizes, and upload nothing.")
    ] = False,
    branch: Annotated[
        str | None, typer.Option(help="The branch to push to. It is created if it is missing.", show_default="main")
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--commit-message", "-m", help="Message of the commit.", show_default="a summary of the upload"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a repository that contains something else.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Load the upload back from the Hub and verify it.")] = True,
) -> None:
    """Upload a pipeline, adapter, dataset, evaluation, metric or app to the Hub with a card. Run it again to resume.

    Example: [bold]echo4o push runs/lora owner/my-lora --base-model owner/echo-4o --dry-run[/bold]
    A metric: [bold]echo4o push genevalpp owner/genevalpp --public[/bold]
    The app of echo4o serve as a Space: [bold]echo4o push app owner/my-app --model owner/echo-4o[/bold]
    """
    from echo4o.common.hub_names import require_repository_name
    from echo4o.hub.kinds.base import PushDetails

    for name in [*([base_model] if base_model else []), *(dataset or [])]:
        require_repository_name(name)
    details = PushDetails(base_model, tuple(dataset or ()), tuple(results or ()), tuple(benchmark_dataset or ()))
    options = {"branch": branch, "message": message, "overwrite": overwrite, "verify": verify}
    if folder == "app" and model is not None:
        _push_app(repo, model, lora or [], details, public, dry_run, options)
        return
    if model is not None or lora:
        raise ValueError(f"--model and --lora belong to an app: echo4o push app {repo} --model owner/name")
    send(folder, repo, details, public, dry_run, **options)


def _push_app(
    repo: str, model: str, lora: list[str], details: "PushDetails", public: bool, dry_run: bool, options: dict
) -> None:
    from echo4o.cli.serve import read_adapter
    from echo4o.common.hub_names import require_repository_name
    from echo4o.hub.kinds.app import write_app

    adapters = [read_adapter(text) for text in lora]
    for name in (model, *(place for _, place, _ in adapters)):
        require_repository_name(name)
    with tempfile.TemporaryDirectory() as folder:
        app = write_app(Path(folder, "app"), model, adapters)
        send(app, repo, details, public, dry_run, **options)


def send(folder: str | Path, repo: str, details: "PushDetails", public: bool, dry_run: bool, **options) -> None:
    """Pushes a folder and prints the result."""
    from echo4o.hub.push import push

    result = push(
        folder,
        repo,
        details=details,
        private=not public,
        dry_run=dry_run,
        log=say,
        progress=lambda sent, total: say(f"{sent} of {total} files uploaded"),
        **options,
    )
    if dry_run:
        print(result)
        for path, size in result.upload.items():
            print(f"  upload {path} ({size:,} bytes)")
        for path in result.delete:
            print(f"  remove {path}")
        finish(None, shlex.join(["echo4o", "push", str(folder), repo]) + " (and the same options, without --dry-run)")
        return
    say(result.summary if result.commit else f"nothing to upload: {repo} is up to date")
    if public and result.private is None:
        say(f"{repo} existed before and keeps its visibility: change it on {result.address}/settings")
    print(result.commit or result.address)
    finish(None, result.next_command)
