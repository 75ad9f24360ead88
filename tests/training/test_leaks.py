"""Long sharded runs hold no more tensors and objects after 60 steps than after 20."""

import json

import pytest

from .running import torchrun


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_sixty_sharded_steps_keep_nothing(recipe_file, tmp_path):
    """With the default kernel of AdamW. The list-wise one is measured beside it: see the comment at the default."""
    runs = []
    for kernel in ("fused", "foreach"):
        changes = {"sharding": "fsdp2", "processes": 2, "steps": 60, "tune": {"method": "full", "parts": ["gen"]}}
        file = recipe_file(kernel, optimizer={"lr": 1e-4, "kernel": kernel}, **changes)
        runs += ["--", file]
    torchrun(2, "tests.training.leak_probe", *runs[1:])
    found = {kernel: json.loads((tmp_path / kernel / "leaks.json").read_text()) for kernel in ("fused", "foreach")}
    print(json.dumps(found))
    by_step = {step: (tensors, objects, resident) for step, tensors, objects, resident in found["fused"]}
    assert by_step[60][0] <= by_step[20][0] + 5, found
    assert by_step[60][1] <= by_step[20][1] * 1.01, found
    assert by_step[60][2] <= by_step[20][2] + 30e6, found
