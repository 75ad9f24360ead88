"""The examples of docs/adapters.md and docs/memory.md run, each on a fresh tiny pipeline."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from echo4o import Echo4oPipeline
from tests.modeling.conftest import GOLDEN

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = re.compile(r"^<!-- test -->\n```python\n(.*?)^```$", re.M | re.S)
EXAMPLES = [(guide, code) for guide in ("adapters", "memory") for code in EXAMPLE.findall((DOCS / f"{guide}.md").read_text())]  # fmt: skip


def fresh():
    pipe = Echo4oPipeline.from_original(GOLDEN / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("guide, code", EXAMPLES, ids=[f"{guide}-{i}" for i, (guide, _) in enumerate(EXAMPLES)])
def test_examples_run(guide, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, expert in (("style", "gen"), ("other", "gen"), ("reader", "und")):
        made = fresh()
        made.transformer.add_adapter(LoraConfig(r=2, target_modules=made.lora_targets[expert]))
        made.save_lora_adapter(name)
    exec(code, {"pipe": fresh(), "torch": torch})
