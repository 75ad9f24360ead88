"""manifest.json: the files of a built dataset and their sources."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from echo4o.common.files import sha256_of
from echo4o.dataset_scripts.findings import ReadingReport
from echo4o.dataset_scripts.names import PARTS

MANIFEST = "manifest.json"
FORMAT = 1


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the bytes of a shard."""
    return {name: version(name) for name in ("echo4o", "datasets", "pillow", "pyarrow")}


def make_manifest(shards: Iterable[dict], report: ReadingReport, terms: dict) -> dict:
    """The manifest of a build: sums over its shards by configuration and category."""
    configurations: dict[str, dict] = {}
    for shard in sorted(shards, key=lambda s: (PARTS.index(s["configuration"]), s["file"])):
        facts = configurations.setdefault(
            shard["configuration"], {"rows": 0, "bytes": 0, "content_bytes": 0, "categories": {}, "shards": []}
        )
        for key in ("rows", "bytes", "content_bytes"):
            facts[key] += shard[key]
        for name, counts in shard["categories"].items():
            facts["categories"][name] = dict(Counter(facts["categories"].get(name, {})) + Counter(counts))
        listed = {key: shard[key] for key in ("file", "rows", "bytes", "sha256", "row_groups")}
        facts["shards"].append(listed)
    for facts in configurations.values():
        facts["categories"] = dict(sorted(facts["categories"].items()))
    return {
        "format": FORMAT,
        "rows": {
            "given": report.given,
            "accepted": report.accepted.total(),
            "rejected": report.rejected_total,
        },
        "configurations": configurations,
        "rejected": {name: dict(sorted(reasons.items())) for name, reasons in sorted(report.rejected.items())},
        "remarks": dict(sorted(report.remarks.items())),
        **terms,
    }


def read_manifest(folder: Path) -> dict:
    """The manifest of a built dataset; FileNotFoundError or ValueError when there is none that can be read."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: the folder is not a dataset that `echo4o dataset build` finished"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        manifest["configurations"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {manifest.get('format')}; this version of echo4o reads {FORMAT}")
    return manifest


def listed_shards(manifest: dict) -> Iterator[tuple[str, dict]]:
    """(configuration, shard) in order."""
    for name, facts in manifest["configurations"].items():
        for shard in facts["shards"]:
            yield name, shard


def check_shards(folder: Path, manifest: dict) -> Iterator[str]:
    """What differs from the manifest: shards that are gone, altered, or not listed."""
    folder = Path(folder)
    listed = set()
    for _, shard in listed_shards(manifest):
        path = folder / shard["file"]
        listed.add(path)
        if not path.is_file():
            yield f"{shard['file']}: it is gone"
        elif path.stat().st_size != shard["bytes"]:
            yield f"{shard['file']}: it has {path.stat().st_size:,} bytes instead of {shard['bytes']:,}"
        elif sha256_of(path) != shard["sha256"]:
            yield f"{shard['file']}: its bytes were altered (another sha256)"
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file() and path not in listed:
            yield f"{path.relative_to(folder).as_posix()}: the manifest does not list it"
