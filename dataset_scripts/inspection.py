"""Inspects a source without reading its images: its files, and the mapping of its rows."""

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath

from echo4o.common.sizes import format_bytes
from echo4o.dataset_scripts.archives import read_members
from echo4o.dataset_scripts.json_rows import read_rows
from echo4o.dataset_scripts.names import PARTS
from echo4o.dataset_scripts.schema import RowMap, recognise
from echo4o.dataset_scripts.source import PublishedSource, SourcePart

_MEMBERS = 5
_SAMPLES = 2


@dataclass
class PartInspection:
    """One folder of a source as `echo4o dataset inspect` shows it."""

    part: SourcePart
    rows: int = 0
    unreadable: int = 0
    shapes: Counter = field(default_factory=Counter)  # tuple of keys -> rows
    types: dict[str, Counter] = field(default_factory=dict)  # key -> kinds of values
    paths: Counter = field(default_factory=Counter)  # key and style of its paths
    samples: list[dict] = field(default_factory=list)
    members: dict[str, list[str]] = field(default_factory=dict)  # archive -> its first members

    @property
    def row_map(self) -> RowMap | None:
        """The mapping of the most frequent shape, if it is known."""
        common = self.shapes.most_common(1)
        return recognise(common[0][0]) if common else None

    def plan(self) -> dict:
        """The entry of a mapping file for this folder; null values must be completed by the user."""
        row_map = self.row_map
        mapped = row_map.to_dict() if row_map else dict.fromkeys(("instruction", "image", "reference_images"))
        return {"configuration": self.part.configuration, "map": mapped}


def inspect_source(location: str, rows: int | None = 2000) -> tuple[PublishedSource, list[PartInspection]]:
    """Inspect the first `rows` rows of each file (None: all) and the first members of each archive."""
    source = PublishedSource(location)
    return source, [_view(source, part, rows) for part in source.parts]


def _view(source: PublishedSource, part: SourcePart, limit: int | None) -> PartInspection:
    view = PartInspection(part)
    for file in part.rows:
        with source.open(file.path) as stream:
            for given in islice(read_rows(stream), limit):
                view.rows += 1
                if given.row is None:
                    view.unreadable += 1
                    continue
                _note_row(view, given.row)
    for archive in [*part.archives[:2], *part.archives[2:][-1:]]:
        with source.open(archive.path) as stream:
            members = read_members(stream, archive.path, lambda name: False)
            view.members[archive.path] = [
                m.name if m.problem is None else f"{m.name} ({m.problem}: {m.detail})"
                for m in islice(members, _MEMBERS)
            ]
    return view


def _note_row(view: PartInspection, row: dict) -> None:
    if len(view.shapes) < 1000:
        view.shapes[tuple(sorted(row))] += 1
    if len(view.samples) < _SAMPLES:
        view.samples.append(row)
    for key, value in row.items():
        if len(view.types) < 100 or key in view.types:
            view.types.setdefault(key, Counter())[_kind(value)] += 1
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and _looks_like_path(first):
            view.paths[(key, _style(first))] += 1


def _kind(value) -> str:
    if isinstance(value, list):
        kinds = sorted({_kind(v) for v in value[:10]}) or ["nothing"]
        return f"list of {' or '.join(kinds)}"
    return {str: "text", dict: "object", bool: "true or false", int: "number", float: "number", type(None): "null"}[
        type(value)
    ]


def _looks_like_path(text: str) -> bool:
    return (
        len(text) < 500
        and "\n" not in text
        and PurePosixPath(text).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    )


def _style(path: str) -> str:
    where = "absolute" if path.startswith(("/", "\\")) else "relative" if "/" in path or "\\" in path else "plain name"
    return f"{where}, {PurePosixPath(path).suffix}"


def describe(source: PublishedSource, views: list[PartInspection]) -> str:
    """The inspection as text."""
    lines = [f"{source.location}: {len(source.files)} files" + (f" at {source.revision}" if source.revision else "")]
    for view in views:
        lines += ["", *_describe_part(view)]
    shown = {f.path for v in views for f in (*v.part.rows, *v.part.archives, *v.part.images)}
    others = [f.path for f in source.files if f.path not in shown]
    if others:
        lines += ["", f"not used: {', '.join(others[:10])}" + (f" and {len(others) - 10} more" if others[10:] else "")]
    return "\n".join(lines)


def _describe_part(view: PartInspection) -> list[str]:
    part = view.part
    size = format_bytes(sum(a.size for a in part.archives))
    lines = [
        f"{part.folder}  ->  {part.configuration or 'unknown: assign one of ' + ', '.join(PARTS)}",
        f"  rows      {', '.join(f.path for f in part.rows)}: {view.rows:,} looked at, {view.unreadable} unreadable",
        f"  archives  {len(part.archives)} ({size}), {len(part.images)} loose images",
    ]
    for archive, members in view.members.items():
        lines.append(f"            {archive}: {', '.join(members)}, ...")
    for keys, count in view.shapes.most_common(5):
        shape = recognise(keys)
        known = ", ".join(f"{k}={v}" for k, v in shape.to_dict().items()) if shape else "unknown shape: needs --map"
        lines.append(f"  {count:,} rows with {', '.join(keys)}")
        lines.append(f"            -> {known}")
    for key, kinds in view.types.items():
        styles = ", ".join(f"{style} ({n:,})" for (k, style), n in view.paths.items() if k == key)
        lines.append(f"  {key:<20} {', '.join(kinds)}" + (f"; paths: {styles}" if styles else ""))
    for row in view.samples:
        text = json.dumps(row, ensure_ascii=True)
        lines.append(f"  sample    {text[:300]}{'...' if len(text) > 300 else ''}")
    return lines


def mapping_yaml(views: list[PartInspection]) -> str:
    """A mapping file to complete."""
    import yaml

    head = (
        "# How each folder of the source is mapped; replace what is null.\n"
        f"# configuration: {', '.join(PARTS)}\n"
        "# map: column: field, a field is key, key[0], key[-1], key[:-1] or key.inner\n"
    )
    return head + yaml.safe_dump({"folders": {v.part.folder: v.plan() for v in views}}, sort_keys=False)
