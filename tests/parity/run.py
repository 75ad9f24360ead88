"""Runs every check that a golden directory calls for, and makes sure that nothing in it is passed over."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from echo4o.modeling.bagel.convert import JSON_FILES, TOKENIZER_FILES, read_original

from .golden import GoldenFile, GoldenSet
from .report import Report

# First letters of a golden file's name -> the module that checks it.
FILES = {
    "a": "a_vit",
    "b": "b_train_forward",
    "c": "c_inference",
    "d": "d_text_generation",
    "e": "e_vae",
    "f": "f_transforms",
    "g": "g_packing",
}
REST = "m"  # the manifest, the pictures, and whatever else lies in the directory
OTHERS = {"README.md", "manifest.json", "checkpoint", "inputs"}
CHECKPOINT = {*JSON_FILES, *TOKENIZER_FILES}


def run(directory: str | Path, only: str | None = None, quiet: bool = False) -> Report:
    """Check `directory`; `only` names the letters of the files to check (all of them, and the rest, without it).

    Raises FileNotFoundError when `directory` is no golden directory.
    """
    started = time.perf_counter()
    golden, report = GoldenSet(directory), Report(quiet=quiet)
    letters = sorted(only or [*FILES, REST])
    names = sorted(path.name for path in golden.directory.iterdir())
    for letter in letters:
        if letter == REST:
            continue
        stems = sorted({Path(n).stem for n in names if n.startswith(f"{letter}_")})
        if not stems:
            report.at(f"{letter}_*").fail("", "no such file in the directory: nothing of its kind was checked")
        for stem in stems:
            _check_file(golden, report, stem, FILES[letter])
    if REST in letters:
        _check_rest(golden, report, names)
    if not quiet:
        note = f" (only {', '.join(letters)})" if only else ""
        print(f"{report.summary()}; {time.perf_counter() - started:.0f} s{note}", flush=True)
    return report


def _check_file(golden: GoldenSet, report: Report, stem: str, module: str) -> None:
    check = report.at(stem)
    with check.trying():
        file = GoldenFile(golden.directory / f"{stem}.json")
        file.check_table(check)
        with check.trying():
            importlib.import_module(f".{module}", __package__).check(golden, file, check)
        file.check_coverage(check)


def _check_rest(golden: GoldenSet, report: Report, names: list[str]) -> None:
    check = report.at("manifest")
    with check.trying():
        importlib.import_module(".manifest", __package__).check(golden, golden.manifest, check)
        golden.manifest.check_coverage(check)
    for name in golden.unused_pictures():
        report.at("inputs").fail(name, "picture not checked")
    check = report.at("checkpoint")
    with check.trying():
        read = CHECKPOINT | _weight_files(golden.directory / "checkpoint")
        for path in sorted((golden.directory / "checkpoint").iterdir()):
            if path.name not in read:
                check.fail(path.name, "file not checked")
    for name in names:
        data = Path(name).suffix in (".json", ".safetensors") and name[:2] in {f"{letter}_" for letter in FILES}
        if not data and name not in OTHERS:
            report.at(name).fail("", "file not checked")


def _weight_files(checkpoint: Path) -> set[str]:
    """Names of the weight files that loading reads, and of the index that led to them."""
    names = {tensor.file.name for tensor in read_original(checkpoint).tensors.values()}
    whole = "ema.safetensors" in names
    return names | (set() if whole else {path.name for path in checkpoint.glob("*.safetensors.index.json")})
