"""Publishes a built dataset. Other configurations in the repository are kept: their manifest and rejected rows are merged."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
from datasets import load_dataset

from echo4o.common.files import to_json
from echo4o.dataset_scripts.card import make_card
from echo4o.dataset_scripts.features import features
from echo4o.dataset_scripts.manifest import MANIFEST, check_shards, listed_shards, read_manifest
from echo4o.dataset_scripts.names import SPLIT
from echo4o.hub.kinds.base import Kind, Read
from echo4o.hub.remote import Source

SIDE_FILES = ("rejected.jsonl", "remarks.jsonl")


class DatasetKind(Kind):
    name = "dataset"
    repo_type = "dataset"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest, reduced to the configurations to upload."""
        manifest = read_manifest(self.folder)
        chosen = self.details.configurations or tuple(manifest["configurations"])
        if unknown := [name for name in chosen if name not in manifest["configurations"]]:
            raise ValueError(
                f"the folder has no configuration {unknown[0]!r}; it has {', '.join(manifest['configurations'])}"
            )
        kept = {name: facts for name, facts in manifest["configurations"].items() if name in chosen}
        rejected = {name: reasons for name, reasons in manifest["rejected"].items() if name in chosen}
        return _count(manifest | {"configurations": kept, "rejected": rejected})

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        files: dict[str, Source] = {s["file"]: self.folder / s["file"] for _, s in listed_shards(self.manifest)}
        manifest = self.manifest
        if MANIFEST in published:
            before = json.loads(published[MANIFEST]())
            merged = {key: before[key] | manifest[key] for key in ("configurations", "rejected")}
            manifest = _count(manifest | merged)
        files[MANIFEST] = to_json(manifest).encode()
        for name in SIDE_FILES:
            files[name] = self._merged_lines(name, published[name]() if name in published else b"")
        return files

    def _merged_lines(self, name: str, old: bytes) -> bytes:
        """Returns the published lines about other configurations, then the lines of this folder."""
        file = self.folder / name
        new = file.read_bytes() if file.exists() else b""

        def is_uploaded(line: bytes) -> bool:
            return json.loads(line).get("configuration") in self.manifest["configurations"]

        kept = [line for line in old.splitlines(keepends=True) if not is_uploaded(line)]
        return b"".join(kept + [line for line in new.splitlines(keepends=True) if is_uploaded(line)])

    def check(self) -> str:
        """Checks the hashes of the shards and their columns."""
        wrong = [line for line in check_shards(self.folder, self.manifest) if not line.endswith("does not list it")]
        if wrong:
            raise ValueError(f"{self.folder} was changed after it was built: {'; '.join(wrong[:3])}. Build it again.")
        for _, shard in listed_shards(self.manifest):
            if not pq.read_schema(self.folder / shard["file"]).equals(features().arrow_schema):
                raise ValueError(f"{self.folder / shard['file']} has other columns than Echo-4o-Image")
        return "all shards are unchanged since they were built"

    def hashes(self) -> dict[str, str]:
        return {shard["file"]: shard["sha256"] for _, shard in listed_shards(self.manifest)}

    def at(self, folder: Path) -> Self:
        details = replace(
            self.details, configurations=tuple(self.manifest["configurations"])
        )  # the download may hold others
        return type(self)(folder, details, self.run, self.hub)

    def check_published(self) -> str:
        """Checks that `datasets` loads every configuration, and decodes the image of its first row."""
        checked = self.check()
        for name, facts in self.manifest["configurations"].items():
            rows = load_dataset(str(self.folder), name, split=SPLIT, streaming=True)
            if facts["rows"]:
                next(iter(rows))["image"].load()
        return f"{checked}, and {', '.join(self.manifest['configurations']) or 'nothing'} can be read"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        return make_card(json.loads(_contents(files[MANIFEST])), repo)

    def replaces(self, path: str) -> bool:
        return path.startswith(tuple(f"data/{name}/" for name in self.manifest["configurations"]))

    def title(self) -> str:
        rows = self.manifest["rows"]["accepted"]
        return f"Upload {', '.join(self.manifest['configurations'])} ({rows:,} rows) with echo4o"

    def next_command(self, repo: str) -> str:
        return f"python -c 'from datasets import load_dataset; print(load_dataset(\"{repo}\", streaming=True))'"


def _contents(source: Source) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _count(manifest: dict) -> dict:
    """Returns the manifest with the row counts of its configurations."""
    accepted = sum(facts["rows"] for facts in manifest["configurations"].values())
    rejected = sum(sum(reasons.values()) for reasons in manifest["rejected"].values())
    return manifest | {"rows": {"given": accepted + rejected, "accepted": accepted, "rejected": rejected}}
