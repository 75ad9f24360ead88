"""``echo4o push``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say


def push(
    folder: Annotated[
        str,
        typer.Argument(
            help="A pipeline, adapter, dataset or result folder, a finished run, or the name of a metric.",
            show_default=False,
        ),
    ],
    repo: Annotated[str, typer.Argument(help="The Hub repository, owner/name.", show_default=False)],
    base_model: Annotated[
        str | None, typer.Option(help="The Hub repository that it was trained from; adapters are loaded on it.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="A Hub dataset that it was trained on; repeatable.", show_default=False)
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder of echo4o evaluate whose scores go into the card; repeatable.", show_default=False
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent, with sizes.")] = False,
    branch: Annotated[
        str | None, typer.Option(help="Push to this branch; made if it is missing.", show_default="main")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--commit-message", "-m", help="Of the commit.", show_default="says what was sent")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a repository that holds something else.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Load the result back from the Hub and check it.")] = True,
) -> None:
    """Send a pipeline, adapter, dataset, benchmark result or metric to the Hub, with its card. Broken off, it goes on.

    Example: [bold]echo4o push runs/lora owner/my-lora --base-model owner/echo-4o --dry-run[/bold]
    A metric: [bold]echo4o push genevalpp owner/genevalpp --public[/bold]
    """
    from echo4o.common.hub_names import require_repository_name
    from echo4o.hub.kinds.base import Said

    for name in [*([base_model] if base_model else []), *(dataset or [])]:
        require_repository_name(name)
    said = Said(base_model, tuple(dataset or ()), tuple(results or ()))
    send(folder, repo, said, public, dry_run, branch=branch, message=message, overwrite=overwrite, verify=verify)


def send(folder: str | Path, repo: str, said, public: bool, dry_run: bool, **options) -> None:
    """Push, and print what was done."""
    from echo4o.hub.push import push

    done = push(
        folder,
        repo,
        said=said,
        private=not public,
        dry_run=dry_run,
        tell=say,
        progress=lambda sent, total: say(f"{sent} of {total} files are on the Hub"),
        **options,
    )
    if dry_run:
        print(done)
        for path, size in done.upload.items():
            print(f"  upload {path} ({size:,} bytes)")
        for path in done.delete:
            print(f"  remove {path}")
        finish(None, shlex.join(["echo4o", "push", str(folder), repo]) + " (and the same options, without --dry-run)")
        return
    say(done.told if done.commit else f"nothing to send: {repo} holds all of it already")
    if public and done.private is None:
        say(f"{repo} was there before and keeps its visibility: change it on {done.address}/settings")
    print(done.commit or done.address)
    finish(None, done.next_command)
