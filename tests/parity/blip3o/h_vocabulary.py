"""The tokens that BLIP3-o adds to Qwen's tables."""

from __future__ import annotations

from echo4o.modeling.blip3o.vocabulary import ADDED_TOKENS, extended_table, shrunk_table

from ..golden import GoldenFile
from ..report import Check
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    arguments, tensors = file.json["arguments"], file.tensors
    rows = len(golden.pipeline.tokenizer)
    check("rows_after", rows, arguments["rows_after"])
    before = tensors["embed_before"]
    check("base_rows", len(before), arguments["base_rows"])
    added = len(ADDED_TOKENS)
    check("embed_after", extended_table(before, rows, added), tensors["embed_after"])
    check("head_after", shrunk_table(tensors["head_before"], rows), tensors["head_after"])
    arguments.note("note")
