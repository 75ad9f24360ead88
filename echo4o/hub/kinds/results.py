"""Publishes an evaluation as a dataset: one row per image with prompt, scores and reason, and the result."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from datasets import load_dataset

from echo4o.common import strict_json
from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.folder import IMAGES, PROMPTS, RECORDS, RESULT
from echo4o.hub.facts import is_repository, result_values
from echo4o.hub.kinds.base import Kind, Read
from echo4o.hub.remote import Source
from echo4o.model_cards.cards import results_card
from echo4o.model_cards.facts import Result

ROWS = "metadata.jsonl"


class ResultsKind(Kind):
    name = "results"
    repo_type = "dataset"

    @cached_property
    def result(self) -> Result:
        """The result, without local paths."""
        values = result_values(self.folder)
        for key in ("model", "adapter"):  # only the name of a local folder, not its path
            name = values.get(key)
            values[key] = name if not name or is_repository(name) else Path(name).name
        return Result(get_benchmark(values["benchmark"]).title, values)

    @cached_property
    def rows(self) -> list[dict]:
        """One row per image, with the last judgement of each aspect."""
        prompts = {row["id"]: row for row in list(JsonLines(self.folder / PROMPTS))[1:]}
        by_image: dict[str, dict[str, dict]] = defaultdict(dict)
        for record in JsonLines(self.folder / RECORDS):
            if record.get("image") and (self.folder / IMAGES / record["image"]).is_file():
                by_image[record["image"]][f"{record['repeat']} {record['aspect']}"] = record
        rows = []
        for image, records in by_image.items():
            last = list(records.values())
            row = {"file_name": f"{IMAGES}/{image}", "id": last[0]["id"], "prompt": prompts[last[0]["id"]]["text"]}
            row |= {"group": last[0]["group"], "status": " ".join(dict.fromkeys(r["status"] for r in last))}
            row |= {"scores": strict_json.dumps([r["scores"] for r in last])}
            rows.append(row | {"reason": "\n".join(r.get("reason") or "" for r in last)})
        return rows

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        text = "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        files: dict[str, Source] = {row["file_name"]: self.folder / row["file_name"] for row in self.rows}
        result = strict_json.dumps(self.result.values, indent=2, ensure_ascii=False) + "\n"
        return files | {ROWS: text.encode(), RESULT: result.encode()}

    def check(self) -> str:
        """Checks that images were judged."""
        if not self.rows:
            raise ValueError(f"{self.folder}: no image was judged yet")
        return f"{len(self.rows)} images with their judgements"

    def check_published(self) -> str:
        """Loads the first row with its image."""
        rows = load_dataset(str(self.folder), split="test", streaming=True)
        next(iter(rows))["image"].load()
        return "its rows can be read"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        values = self.result.values
        model = " + ".join(name for name in (values["model"], values["adapter"]) if name) or None
        return results_card(repo, self.result, model, len(self.rows))

    def replaces(self, path: str) -> bool:
        return path.startswith(f"{IMAGES}/")

    def next_command(self, repo: str) -> str:
        return f'python -c \'from datasets import load_dataset; print(load_dataset("{repo}")["test"][0])\''
