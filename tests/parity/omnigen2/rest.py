"""What lies in a golden directory of OmniGen2 beside its lettered files: manifest, checkpoint, pictures."""

from __future__ import annotations

from echo4o.modeling.omnigen2.convert import CONFIG_FILES, IMAGE_PROCESSOR_FILES, TOKENIZER_FILES, WEIGHTED

from ..report import Report
from . import manifest
from .golden_set import GoldenSet

FILES = {"README.md", "FACTS.md", "manifest.json", "checkpoint", "inputs", "j_lora"}


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
        folder = golden.directory / "checkpoint"
        read = {"model_index.json", "scheduler/scheduler_config.json"}
        read |= {f"processor/{name}" for name in (*TOKENIZER_FILES, *IMAGE_PROCESSOR_FILES)}
        for component in WEIGHTED:
            read |= {f"{component}/{name}" for name in CONFIG_FILES}
            read |= {f"{component}/{name}" for name in _weight_files(folder / component)}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in read:
                check.fail(name, "file not checked")


def _weight_files(folder) -> set[str]:
    from echo4o.modeling.common.weights import component_tensors

    names = {tensor.file.name for tensor in component_tensors(folder).values()}
    return names | {path.name for path in folder.glob("*.safetensors.index.json")}
