"""``echo4o dataset``: inspect Echo-4o-Image as published, build, validate, count and publish it."""

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from echo4o.cli import push, synthesize
from echo4o.cli.frame import finish, say
from echo4o.common import strict_json
from echo4o.common.hub_names import is_repository_name

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def dataset() -> None:
    """Work with Echo-4o-Image: inspect, build, validate, count, publish and extend it.

    Example: [bold]echo4o dataset build Echo-4o-Image --out echo-4o-image[/bold]
    """


class Configuration(StrEnum):
    """The configurations of the dataset; ``all`` selects all three."""

    all = "all"
    surreal_fantasy = "surreal_fantasy"
    multi_reference = "multi_reference"
    instruction_following = "instruction_following"


class Verify(StrEnum):
    """How images are checked: decoded completely, or by their header and end mark."""

    full = "full"
    header = "header"


class _Listing(TyperCommand):
    """Lets ``--map`` and ``--assign`` take several values: ``--map image=a instruction=b``."""

    def parse_args(self, ctx, args):
        expanded, option = [], None
        for arg in args:
            if arg in ("--map", "--assign"):
                option = arg
            elif option and re.fullmatch(r"[^-=][^=]*=.+", arg):
                expanded += [option, arg]
            else:
                if option and expanded[-2:-1] != [option]:
                    expanded += [option]  # a value that is not a pair, or no value
                option = None
                expanded.append(arg)
        return super().parse_args(ctx, expanded + ([option] if option and expanded[-2:-1] != [option] else []))


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A folder in the published layout, or hf://datasets/owner/name.", show_default=False
    ),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="Map fields to columns, for rows in an unknown format: image=output_image "
        "reference_images=input_images ...; or a YAML file from inspect --write.",
        show_default=False,
    ),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(help="Set the configuration of a folder: Folder=multi_reference.", show_default=False),
]
ConfigurationOption = Annotated[
    Configuration, typer.Option("--configuration", "-c", help="The configuration to read.")
]
VerifyOption = Annotated[
    Verify, typer.Option("--verify", help="full: decode every image; header: check only its header and end.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Images to check in parallel.", show_default="one per core")]


@app.command(cls=_Listing)
def inspect(
    src: Source,
    write: Annotated[
        Path | None, typer.Option(help="Write a mapping file for you to complete.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to read per file; 0: all.")] = 2000,
) -> None:
    """Show what a source contains and how its rows would be mapped. No image is decoded.

    Example: [bold]echo4o dataset inspect hf://datasets/Yejy53/Echo-4o-Image --write map.yaml[/bold]
    Columns of any dataset, for training: [bold]echo4o dataset inspect owner/name[/bold]
    """
    from echo4o.dataset_scripts.inspection import describe, inspect_source, mapping_yaml

    if _has_columns(src):
        from echo4o.training.column_proposal import inspect_columns

        if write:
            raise ValueError("--write is for the published layout; copy the columns into a recipe.")
        print(inspect_columns(src))
        finish(None, shlex.join(["echo4o", "train", "lora_single_gpu", "--set", f"data.path={src}"]))
        return
    source, views = inspect_source(src, rows or None)
    if not views:
        raise ValueError(f"{src} contains no folder with rows (.jsonl or .json)")
    print(describe(source, views))
    command = ["echo4o", "dataset", "build", src, "--out", "echo-4o-image"]
    if write:
        write.write_text(mapping_yaml(views), "utf-8")
        say("the mapping file:")
        command += ["--map", str(write)]
    finish(write, shlex.join(command))


def _has_columns(src: str) -> bool:
    """Whether this is a dataset that `datasets` opens, and not a source in the published layout."""
    folder = Path(src)
    if not folder.exists():
        return is_repository_name(src)
    files = ("*.parquet", "*.arrow", "*.tar", "data/*.parquet", "*/*.arrow", "metadata.csv")
    published = any(folder.rglob("*.jsonl")) or any(folder.rglob("*.tar.gz"))
    return folder.is_dir() and not published and any(next(folder.glob(pattern), None) for pattern in files)


@app.command(cls=_Listing)
def build(
    src: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write. An interrupted build resumes there.")],
    configuration: ConfigurationOption = Configuration.all,
    map_: Map = None,
    assign: Assign = None,
    verify: VerifyOption = Verify.full,
    reencode: Annotated[
        bool,
        typer.Option("--reencode", help="Store BMP, GIF, TIFF and similar formats as PNG instead of rejecting them."),
    ] = False,
    max_rejected: Annotated[
        int | None, typer.Option(min=0, help="Fail if more rows are rejected.", show_default="no limit")
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MB.")] = 500,
    workers: Workers = None,
) -> None:
    """Build Parquet shards, a card and a manifest, for load_dataset and for publishing.

    Example: [bold]echo4o dataset build Echo-4o-Image --out echo-4o-image[/bold]
    """
    from echo4o.dataset_scripts.build import BuildOptions, build

    options = BuildOptions(configuration=configuration.value, shard_bytes=shard_mb << 20)
    read_options = _read_options(map_, assign, verify, reencode, workers)
    with _Progress("building") as progress:
        try:
            manifest = build(
                src,
                out,
                options,
                read_options,
                max_rejected=max_rejected,
                progress=lambda rows, report: progress(rows, f"{report.rejected_total} rejected"),
            )
        except (KeyboardInterrupt, OSError):
            say(f"run the same command again to resume; finished work is kept in {out}")
            raise
    rows = manifest["rows"]
    say(f"{rows['given']:,} rows read, {rows['accepted']:,} accepted, {rows['rejected']:,} rejected (rejected.jsonl)")
    if not rows["accepted"]:
        raise ValueError(f"{src}: there are no rows in it, so the dataset is empty")
    finish(out, shlex.join(["echo4o", "dataset", "stats", str(out)]))


@app.command(cls=_Listing)
def validate(
    target: Annotated[
        str, typer.Argument(help="A source in the published layout, or a built folder.", show_default=False)
    ],
    configuration: ConfigurationOption = Configuration.all,
    map_: Map = None,
    assign: Assign = None,
    verify: VerifyOption = Verify.full,
    manifest: Annotated[
        bool, typer.Option("--manifest", help="Compare only the shards of a built folder with its manifest.")
    ] = False,
    findings: Annotated[
        Path | None, typer.Option(help="Write all findings to this file as JSON lines.", show_default=False)
    ] = None,
    workers: Workers = None,
) -> None:
    """Report every invalid row with its file, archive, member and line. The exit code is 1 if there is one.

    Example: [bold]echo4o dataset validate Echo-4o-Image --findings findings.jsonl[/bold]
    After a copy: [bold]echo4o dataset validate echo-4o-image --manifest[/bold]
    """
    from echo4o.dataset_scripts import validate as checks
    from echo4o.dataset_scripts.manifest import check_shards, read_manifest

    wrong = 0
    if manifest or checks.is_built(target):
        for line in check_shards(Path(target), read_manifest(Path(target))):
            print(f"manifest: {line}")
            wrong += 1
    if not manifest:
        wrong += _validate_rows(target, configuration, _read_options(map_, assign, verify, False, workers), findings)
    elif not wrong:
        say("every shard matches the manifest")
    if wrong:
        raise typer.Exit(1)
    finish(None, shlex.join(["echo4o", "dataset", "stats" if checks.is_built(target) else "build", target]))


def _validate_rows(target: str, configuration: Configuration, reading, findings: Path | None, shown: int = 50) -> int:
    from echo4o.dataset_scripts.validate import validate

    """Prints or writes all findings; returns the number of rejected rows."""
    progress = _Progress("checking")
    report, all_findings = validate(target, configuration.value, reading, progress)
    stream = open(findings, "w", encoding="utf-8") if findings else None
    try:
        with progress:
            for number, finding in enumerate(all_findings):
                if stream:
                    stream.write(strict_json.dumps(finding.to_dict()) + "\n")
                elif number < shown:
                    print(finding)
    finally:
        if stream:
            stream.close()
    total = report.rejected_total + report.remarks.total()
    if total > shown and not findings:
        say(f"and {total - shown} more; write all with --findings FILE")
    say(str(report))
    if findings:
        print(findings)
    return report.rejected_total


@app.command()
def stats(
    target: Annotated[str, typer.Argument(help="A built folder, or a Hub repository.", show_default=False)],
    configuration: ConfigurationOption = Configuration.all,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="A file of prompts to look for among the rows, JSON lines or plain lines; repeatable."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="A benchmark whose prompts to look for; repeatable.", show_default="genevalpp, imagine_bench"
        ),
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0.05, max=1, help="Share of common 3-word sequences that counts as a match.")
    ] = 0.5,
    html: Annotated[Path, typer.Option(help="The page to write, with plots and a gallery.")] = Path(
        "dataset-stats.html"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
) -> None:
    """Count rows, lengths, sizes, categories and references, and check for contamination with benchmark prompts.

    Example: [bold]echo4o dataset stats echo-4o-image --html stats.html[/bold]
    With your own prompts: [bold]echo4o dataset stats echo-4o-image --prompts prompts.jsonl[/bold]
    """
    from echo4o.dataset_scripts.contamination import PromptIndex, read_prompts
    from echo4o.dataset_scripts.stats import collect
    from echo4o.dataset_scripts.stats_page import write_page

    if not Path(target).is_dir() and not is_repository_name(target):
        raise FileNotFoundError(f"{target}: there is no such folder, and it is not a Hub repository (owner/name)")
    listed = [pair for file in prompts or [] for pair in read_prompts(file)]
    listed += _benchmark_prompts(benchmark, quiet=bool(prompts))
    with _Progress("counting") as progress:
        counted = collect(target, configuration.value, PromptIndex(listed, overlap) if listed else None, progress)
    write_page(html, counted, f"Echo-4o-Image: {target}")
    summary = counted.summary()
    if as_json:
        print(strict_json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        _print_stats(summary)
    say("the page:")
    finish(None if as_json else html, shlex.join(["echo4o", "dataset", "publish", target, "owner/echo-4o-image"]))


def _benchmark_prompts(names: list[str] | None, quiet: bool) -> list[tuple[str, str]]:
    """Prompts of the named benchmarks. Without names: of the two default ones, if they can be loaded."""
    from echo4o.evaluation.benchmarks import get_benchmark
    from echo4o.evaluation.benchmarks.prompt_files import load_prompts

    listed = []
    for name in names if names is not None else () if quiet else ("genevalpp", "imagine_bench"):
        try:
            listed += [(name, prompt.text) for prompt in load_prompts(get_benchmark(name)).prompts]
        except (OSError, ValueError) as error:
            if names is not None:
                raise
            say(f"not compared with {name}: {error}")
    return listed


def _print_stats(summary: dict) -> None:
    for name, numbers in summary["configurations"].items():
        words = numbers["instruction_words"]
        print(f"{name}: {numbers['rows']:,} rows, {words.get('50%', 0)} words (median)")
        for key in ("tasks", "categories", "image_sizes", "formats", "reference_images"):
            counts = list(numbers[key].items())
            more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
            print(f"  {key:<17} {', '.join(f'{k} {v:,}' for k, v in counts[:8])}{more}")
    if contamination := summary["contamination"]:
        against = ", ".join(f"{name} ({n})" for name, n in contamination["prompts"].items())
        print(
            f"contamination: {contamination['rows']} rows match a prompt of {against}; {contamination['equal']} equal"
        )
        for match in contamination["matches"][:10]:
            print(
                f"  {match['overlap']:.2f} {match['benchmark']}: {match['prompt'][:80]!r} ~ {match['instruction'][:80]!r}"
            )


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A built folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="The Hub repository, owner/name.", show_default=False)],
    configuration: Annotated[
        list[Configuration] | None,
        typer.Option("--configuration", "-c", help="Publish only this configuration; repeatable.", show_default="all"),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")
    ] = False,
) -> None:
    """Upload a built dataset to the Hub. Run the command again to resume an interrupted upload.

    Example: [bold]echo4o dataset publish echo-4o-image owner/echo-4o-image --dry-run[/bold]
    """
    from echo4o.dataset_scripts.manifest import read_manifest
    from echo4o.hub.kinds.base import PushDetails

    read_manifest(folder)
    names = tuple(c.value for c in configuration or [] if c is not Configuration.all)
    push.send(folder, repo, PushDetails(configurations=names), public, dry_run)


app.command()(synthesize.synthesize)


def _read_options(
    map_: list[str] | None, assign: list[str] | None, verify: Verify, reencode: bool, workers: int | None
):
    """Builds `ReadOptions` from the options of the command line."""
    import os
    from dataclasses import replace

    from echo4o.dataset_scripts.names import PARTS
    from echo4o.dataset_scripts.schema import FolderMapping, parse_map, read_plan
    from echo4o.dataset_scripts.upstream import ReadOptions

    values = map_ or []
    plan_files = [value for value in values if "=" not in value]
    pairs = [pair for value in values if "=" in value for pair in value.split()]
    plan = {folder: entry for file in plan_files for folder, entry in read_plan(file).items()}
    for pair in assign or []:
        folder, _, name = pair.rpartition("=")
        if name not in PARTS or not folder:
            raise ValueError(f"--assign {pair}: write Folder=configuration, one of {', '.join(PARTS)}")
        plan[folder] = replace(plan.get(folder, FolderMapping()), configuration=name)
    return ReadOptions(
        verify=verify.value,
        workers=workers or os.cpu_count() or 1,
        reencode=reencode,
        row_map=parse_map(pairs) if pairs else None,
        plan=plan,
    )


class _Progress:
    """A progress bar that counts rows, on a terminal only."""

    def __init__(self, what: str):
        from tqdm.auto import tqdm

        self.bar = tqdm(desc=what, unit=" rows", disable=None, leave=False, smoothing=0.05)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def __call__(self, rows: int, note: str = "") -> None:
        """Adds rows to the bar; `note` is shown behind it."""
        if not self.bar.disable:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(rows)
