"""Three hundred rows over the three parts, with faults and wrong pictures on the way: made, built, checked, trained on."""

import itertools
import json

import pytest
import yaml

from echo4o.testing.openai_server import EndpointFault
from tests.dataset_scripts.synthesis.running import accepted, ends, planned, run

ROWS = {"surreal_fantasy": 100, "multi_reference": 80, "instruction_following": 120}


@pytest.mark.long
def test_three_hundred_rows(server, recipe, tmp_path):
    out, built = tmp_path / "made", tmp_path / "built"
    count = itertools.count()
    paint = server.image
    server.image = lambda call: b"no picture" if next(count) % 40 == 39 else paint(call)
    server.inject(
        EndpointFault("moderation", times=5, call_kind="generate"),
        EndpointFault("http_500", times=10),
        EndpointFault("nothing", times=3),
    )
    file = recipe(**{f"{part}__rows": rows for part, rows in ROWS.items()})
    run("synthesize", file, "--out", out, "--budget", 1.5, code=2)
    some = len(ends(out))
    run("synthesize", file, "--out", out, "--budget", 50)
    assert 50 < some < 300 and ends(out) == planned(ROWS)
    assert len(accepted(out)) >= 280 and max(server.paid.values()) == 1
    run("build", out / "dataset", "--out", built, "--workers", 2)
    run("validate", built, "--workers", 2)
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["rows"]["rejected"] == 0 and manifest["rows"]["accepted"] == len(accepted(out))
    train(built, tmp_path)


def train(data, tmp_path) -> None:
    """A few steps of the quickstart's model on the rows."""
    from echo4o.training.train import main

    settings = {
        "model": "echo4o/quickstart/base", "output_dir": str(tmp_path / "run"), "data": {"path": str(data)},
        "optimizer": {"lr": 1e-3}, "device": "cpu", "batch_size": 8, "steps": 4,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert not main([str(tmp_path / "train.yaml")])
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 4 and all(0 < entry["loss"] < 10 for entry in log)
