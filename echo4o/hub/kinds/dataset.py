"""A built dataset: its shards, and the small files joined with what the repository holds of other configurations."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

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


class Dataset(Kind):
    name = "dataset"
    repo_type = "dataset"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Of the configurations that are sent."""
        manifest = read_manifest(self.folder)
        chosen = self.said.configurations or tuple(manifest["configurations"])
        if unknown := [name for name in chosen if name not in manifest["configurations"]]:
            raise ValueError(
                f"the folder has no configuration {unknown[0]!r}; it has {', '.join(manifest['configurations'])}"
            )
        kept = {name: facts for name, facts in manifest["configurations"].items() if name in chosen}
        rejected = {name: reasons for name, reasons in manifest["rejected"].items() if name in chosen}
        return _count(manifest | {"configurations": kept, "rejected": rejected})

    def files(self, there: Mapping[str, Read]) -> dict[str, Source]:
        files: dict[str, Source] = {s["file"]: self.folder / s["file"] for _, s in listed_shards(self.manifest)}
        whole = self.manifest
        if MANIFEST in there:
            before = json.loads(there[MANIFEST]())
            joined = {key: before[key] | whole[key] for key in ("configurations", "rejected")}
            whole = _count(whole | joined)
        files[MANIFEST] = to_json(whole).encode()
        for name in SIDE_FILES:
            files[name] = self._lines(name, there[name]() if name in there else b"")
        return files

    def _lines(self, name: str, old: bytes) -> bytes:
        """Lines about the configurations that are sent, behind those about the others."""
        file = self.folder / name
        new = file.read_bytes() if file.exists() else b""

        def about(text: bytes, sent: bool) -> list[bytes]:
            lines = text.splitlines(keepends=True)
            return [
                x for x in lines if (json.loads(x).get("configuration") in self.manifest["configurations"]) == sent
            ]

        return b"".join(about(old, False) + about(new, True))

    def check(self) -> str:
        """The shards are as they were built, and have the columns of Echo-4o-Image."""
        wrong = [line for line in check_shards(self.folder, self.manifest) if not line.endswith("does not list it")]
        if wrong:
            raise ValueError(f"{self.folder} is not as it was built: {'; '.join(wrong[:3])}. Build it again.")
        for _, shard in listed_shards(self.manifest):
            if not pq.read_schema(self.folder / shard["file"]).equals(features().arrow_schema):
                raise ValueError(f"{self.folder / shard['file']} has other columns than Echo-4o-Image")
        return "all shards are as they were built"

    def hashes(self) -> dict[str, str]:
        return {shard["file"]: shard["sha256"] for _, shard in listed_shards(self.manifest)}

    def at(self, folder: Path) -> "Dataset":
        said = replace(self.said, configurations=tuple(self.manifest["configurations"]))  # others may be there as well
        return Dataset(folder, said, self.run, self.hub)

    def check_published(self) -> str:
        """Every configuration loads without code of ours: its card, its columns, and a row with its picture."""
        done = self.check()
        for name, facts in self.manifest["configurations"].items():
            rows = load_dataset(str(self.folder), name, split=SPLIT, streaming=True)
            if facts["rows"]:
                next(iter(rows))["image"].load()
        return f"{done}, and {', '.join(self.manifest['configurations']) or 'nothing'} can be read"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        return make_card(json.loads(files[MANIFEST]), repo)

    def replaces(self, path: str) -> bool:
        return path.startswith(tuple(f"data/{name}/" for name in self.manifest["configurations"]))

    def title(self) -> str:
        rows = self.manifest["rows"]["accepted"]
        return f"Upload {', '.join(self.manifest['configurations'])} ({rows:,} rows) with echo4o"

    def next_command(self, repo: str) -> str:
        return f"python -c 'from datasets import load_dataset; print(load_dataset(\"{repo}\", streaming=True))'"


def _count(manifest: dict) -> dict:
    accepted = sum(facts["rows"] for facts in manifest["configurations"].values())
    rejected = sum(sum(reasons.values()) for reasons in manifest["rejected"].values())
    return manifest | {"rows": {"given": accepted + rejected, "accepted": accepted, "rejected": rejected}}
