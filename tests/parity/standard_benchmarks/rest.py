"""What lies beside the two golden files: the key map of the detector's weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from echo4o.evaluation.benchmarks.geneval import mmdet_names

from ..report import Check, Report
from .golden_set import GoldenSet

KEY_MAP = "mask2former_key_map.json"
FILES = {"README.md", KEY_MAP}
# As the golden file says it, for one channel after the other: output b * C + c takes input 4 * c + [0, 2, 1, 3][b].
_BLOCKS = (0, 2, 1, 3)


def check(golden: GoldenSet, report: Report) -> None:
    """Check the key map, where there is one."""
    path = golden.directory / KEY_MAP
    if path.exists():
        with report.at(path.stem).trying():
            check_key_map(path, report.at(path.stem))


def check_key_map(path: Path, check: Check) -> None:
    content = json.loads(path.read_text("utf-8"))
    for name in content.keys() - {"about", "config", "checked", "map"}:
        check.fail(name, "field of the json not checked")
    sources = sorted({source for source, _ in content["map"].values()})
    ours = {target: [source, change] for source in sources for target, change in mmdet_names.targets_of(source)}
    for target in sorted(ours.keys() | content["map"].keys()):
        check(target, ours.get(target), content["map"].get(target))
    channels = 3
    values = torch.arange(4 * channels)
    want = [4 * c + _BLOCKS[b] for b in range(4) for c in range(channels)]
    check("unfold_to_blocks", mmdet_names.changed(values, mmdet_names.UNFOLD), want)
    thirds = [mmdet_names.changed(values, change) for change in mmdet_names.THIRDS]
    check("thirds", torch.cat(thirds), values)
    check("config", content["config"], _published_config())


def _published_config() -> dict:
    from echo4o.evaluation.benchmarks.geneval.convert_detector import PUBLISHED_BACKBONE

    return {"backbone": PUBLISHED_BACKBONE, "num_labels": 80, "rest": "defaults of Mask2FormerConfig"}
