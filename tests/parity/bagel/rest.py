"""What lies in a golden directory of BAGEL beside its numbered files: manifest, checkpoint, pictures."""

from __future__ import annotations

from pathlib import Path

from echo4o.modeling.bagel.convert import JSON_FILES, TOKENIZER_FILES, read_original

from ..report import Report
from . import manifest
from .golden_set import GoldenSet

CHECKPOINT = {*JSON_FILES, *TOKENIZER_FILES}
FILES = {"README.md", "manifest.json", "checkpoint", "inputs"}


def check(golden: GoldenSet, report: Report) -> None:
    """Check the manifest, and report pictures and files of the checkpoint that no check reads."""
    check = report.at("manifest")
    with check.trying():
        manifest.check(golden, golden.manifest, check)
        golden.manifest.check_coverage(check)
    for name in golden.unused_pictures():
        report.at("inputs").fail(name, "picture not checked")
    check = report.at("checkpoint")
    with check.trying():
        read = CHECKPOINT | _weight_files(golden.directory / "checkpoint")
        for path in sorted((golden.directory / "checkpoint").iterdir()):
            if path.name not in read:
                check.fail(path.name, "file not checked")


def _weight_files(checkpoint: Path) -> set[str]:
    """Names of the weight files that loading reads, and of the index that led to them."""
    names = {tensor.file.name for tensor in read_original(checkpoint).tensors.values()}
    whole = "ema.safetensors" in names
    return names | (set() if whole else {path.name for path in checkpoint.glob("*.safetensors.index.json")})
