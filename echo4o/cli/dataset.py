"""``echo4o dataset``: look at Echo-4o-Image as it was published, build it, check it, count it, publish it."""

import json
import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from echo4o.cli import push, synthesize
from echo4o.cli.frame import finish, say
from echo4o.common.hub_names import is_repository_name

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def dataset() -> None:
    """Echo-4o-Image: inspect, build, validate, count, publish and extend it.

    Example: [bold]echo4o dataset build Echo-4o-Image --out echo-4o-image[/bold]
    """


class Configuration(StrEnum):
    """The configurations; ``all`` is the three of them."""

    all = "all"
    surreal_fantasy = "surreal_fantasy"
    multi_reference = "multi_reference"
    instruction_following = "instruction_following"


class Verify(StrEnum):
    """How pictures are checked: decoded fully, or by header and end mark."""

    full = "full"
    header = "header"


class _Listing(TyperCommand):
    """Lets ``--map`` and ``--assign`` take several values: ``--map image=a instruction=b``."""

    def parse_args(self, ctx, args):
        spread, option = [], None
        for arg in args:
            if arg in ("--map", "--assign"):
                option = arg
            elif option and re.fullmatch(r"[^-=][^=]*=.+", arg):
                spread += [option, arg]
            else:
                if option and spread[-2:-1] != [option]:
                    spread += [option]  # one value that is no pair, or none at all
                option = None
                spread.append(arg)
        return super().parse_args(ctx, spread + ([option] if option and spread[-2:-1] != [option] else []))


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
        help="Which field is which column, for rows of no known shape: image=output_image "
        "reference_images=input_images ...; or a YAML file from inspect --write.",
        show_default=False,
    ),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(help="Which configuration a folder is: Folder=multi_reference.", show_default=False),
]
ConfigurationOption = Annotated[Configuration, typer.Option("--configuration", "-c", help="What to read.")]
VerifyOption = Annotated[Verify, typer.Option("--verify", help="Decode every picture, or look at both ends only.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Pictures checked at a time.", show_default="one per core")]


@app.command(cls=_Listing)
def inspect(
    src: Source,
    write: Annotated[Path | None, typer.Option(help="Write a mapping file to complete.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each file to look at; 0: all.")] = 2000,
) -> None:
    """Show what a source holds and how it would be mapped; nothing is decoded.

    Example: [bold]echo4o dataset inspect hf://datasets/Yejy53/Echo-4o-Image --write map.yaml[/bold]
    """
    from echo4o.dataset_scripts.inspection import describe, inspect_source, mapping_yaml

    source, views = inspect_source(src, rows or None)
    if not views:
        raise ValueError(f"{src} holds no folder with rows (.jsonl or .json)")
    print(describe(source, views))
    command = ["echo4o", "dataset", "build", src, "--out", "echo-4o-image"]
    if write:
        write.write_text(mapping_yaml(views), "utf-8")
        say("the mapping file:")
        command += ["--map", str(write)]
    finish(write, shlex.join(command))


@app.command(cls=_Listing)
def build(
    src: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a broken off build goes on there.")],
    configuration: ConfigurationOption = Configuration.all,
    map_: Map = None,
    assign: Assign = None,
    verify: VerifyOption = Verify.full,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Store BMP, GIF, TIFF and the like as PNG instead of rejecting them.")
    ] = False,
    max_rejected: Annotated[
        int | None, typer.Option(min=0, help="Fail when more rows are rejected.", show_default="any number")
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MB.")] = 500,
    workers: Workers = None,
) -> None:
    """Write Parquet shards, a card and a manifest that load_dataset reads and that can be published.

    Example: [bold]echo4o dataset build Echo-4o-Image --out echo-4o-image[/bold]
    """
    from echo4o.dataset_scripts.build import BuildOptions, build

    options = BuildOptions(configuration=configuration.value, shard_bytes=shard_mb << 20)
    reading = _reading(map_, assign, verify, reencode, workers)
    with _Progress("building") as progress:
        try:
            manifest = build(
                src,
                out,
                options,
                reading,
                max_rejected=max_rejected,
                progress=lambda rows, report: progress(rows, f"{report.rejected_total} rejected"),
            )
        except (KeyboardInterrupt, OSError):
            say(f"run the same command again to go on; what is finished stays in {out}")
            raise
    rows = manifest["rows"]
    say(f"{rows['given']:,} rows given, {rows['accepted']:,} accepted, {rows['rejected']:,} rejected (rejected.jsonl)")
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
        bool, typer.Option("--manifest", help="Only compare the shards of a built folder with its manifest.")
    ] = False,
    findings: Annotated[
        Path | None, typer.Option(help="Write all findings as JSON lines.", show_default=False)
    ] = None,
    workers: Workers = None,
) -> None:
    """Find what is wrong, row by row, with file, archive, member and line. Exit code 1 when something is.

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
        wrong += _validate_rows(target, configuration, _reading(map_, assign, verify, False, workers), findings)
    elif not wrong:
        say("every shard is as the manifest says")
    if wrong:
        raise typer.Exit(1)
    finish(None, shlex.join(["echo4o", "dataset", "stats" if checks.is_built(target) else "build", target]))


def _validate_rows(target: str, configuration: Configuration, reading, findings: Path | None, shown: int = 50) -> int:
    from echo4o.dataset_scripts.validate import validate

    report, found = validate(target, configuration.value, reading, progress := _Progress("checking"))
    stream = open(findings, "w", encoding="utf-8") if findings else None
    try:
        with progress:
            for number, finding in enumerate(found):
                if stream:
                    stream.write(json.dumps(finding.to_dict()) + "\n")
                elif number < shown:
                    print(finding)
    finally:
        if stream:
            stream.close()
    total = report.rejected_total + report.remarks.total()
    if total > shown and not findings:
        say(f"and {total - shown} more; all of them: --findings FILE")
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
        typer.Option(help="Prompts that must not be among the rows; repeatable. JSON lines or plain lines."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="A benchmark whose prompts are loaded; repeatable.", show_default="genevalpp, imagine_bench"
        ),
    ] = None,
    overlap: Annotated[float, typer.Option(min=0.05, max=1, help="Share of 3-word sequences that is a match.")] = 0.5,
    html: Annotated[Path, typer.Option(help="The page with plots and a gallery.")] = Path("dataset-stats.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
) -> None:
    """Count rows, lengths, sizes, categories and references, and look for prompts of benchmarks among them.

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
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        _print_stats(summary)
    say("the page:")
    finish(None if as_json else html, shlex.join(["echo4o", "dataset", "publish", target, "owner/echo-4o-image"]))


def _benchmark_prompts(names: list[str] | None, quiet: bool) -> list[tuple[str, str]]:
    """Prompts of the named benchmarks; of the two that matter when none is named and they can be had."""
    from echo4o.evaluation.benchmarks import get_benchmark
    from echo4o.evaluation.prompt_files import load_prompts

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
        print(f"{name}: {numbers['rows']:,} rows, {words.get('50%', 0)} words in the median")
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
        typer.Option("--configuration", "-c", help="Only this one; repeatable.", show_default="all of the folder"),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Send a built dataset to the Hub: shards first, then one commit that makes it loadable. Broken off, it goes on.

    Example: [bold]echo4o dataset publish echo-4o-image owner/echo-4o-image --dry-run[/bold]
    """
    from echo4o.dataset_scripts.manifest import read_manifest
    from echo4o.hub.kinds.base import Said

    read_manifest(folder)
    names = tuple(c.value for c in configuration or [] if c is not Configuration.all)
    push.send(folder, repo, Said(configurations=names), public, dry_run)


app.command()(synthesize.synthesize)


def _reading(map_: list[str] | None, assign: list[str] | None, verify: Verify, reencode: bool, workers: int | None):
    """ReadOptions from the command line."""
    import os
    from dataclasses import replace

    from echo4o.dataset_scripts.names import PARTS
    from echo4o.dataset_scripts.schema import FolderPlan, parse_map, read_plan
    from echo4o.dataset_scripts.upstream import ReadOptions

    given = map_ or []
    plan_files = [value for value in given if "=" not in value]
    pairs = [pair for value in given if "=" in value for pair in value.split()]
    plan = {folder: entry for file in plan_files for folder, entry in read_plan(file).items()}
    for pair in assign or []:
        folder, _, name = pair.rpartition("=")
        if name not in PARTS or not folder:
            raise ValueError(f"--assign {pair}: write Folder=configuration, one of {', '.join(PARTS)}")
        plan[folder] = replace(plan.get(folder, FolderPlan()), configuration=name)
    return ReadOptions(
        verify=verify.value,
        workers=workers or os.cpu_count() or 1,
        reencode=reencode,
        row_map=parse_map(pairs) if pairs else None,
        plan=plan,
    )


class _Progress:
    """A line that counts rows, on a terminal only."""

    def __init__(self, what: str):
        self.what = what
        self.bar = None

    def __enter__(self) -> "_Progress":
        from tqdm.auto import tqdm

        self.bar = tqdm(desc=self.what, unit=" rows", disable=None, leave=False, smoothing=0.05)
        return self

    def __exit__(self, *exc) -> None:
        self.bar.close()

    def __call__(self, rows: int, note: str = "") -> None:
        if self.bar is not None and not self.bar.disable:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(rows)
