"""Steps with a spike of the gradient norm are skipped, by the real command line."""

import json

import pytest

from echo4o.training.backbones.bagel import BagelBackbone
from echo4o.training.spikes import FIRST, IN_A_ROW, GradientSpikes, SpikeFilter

from .running import assert_same, log_of, train_here, weights_of

SETTINGS = {"lr": 1e-4, "skip_above": 20.0}


@pytest.fixture
def spoil(monkeypatch):
    """Makes the target of some rows so large that their gradients are, too: `spoil(ids)`."""

    def spoil(ids):
        prepare = BagelBackbone.prepare

        def spoiled(self, rows):
            prepared = prepare(self, rows)
            for row in prepared:
                if row.id in ids and row.moments is not None:
                    row.moments.mul_(1000)
            return prepared

        monkeypatch.setattr(BagelBackbone, "prepare", spoiled)

    return spoil


@pytest.mark.long
def test_steps_with_a_spike_are_skipped_and_named(recipe_file, tmp_path, spoil):
    spoil({"row-5"})
    changes = {"optimizer": SETTINGS, "batch_size": 1, "steps": 40, "checkpoints": {"every": 20, "keep": 9}}
    file = recipe_file("whole", **changes)
    assert train_here(file) == 0
    log = log_of(tmp_path / "whole")
    skipped = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    assert skipped and all(entry["ids"] == ["row-5"] for entry in skipped)
    assert [entry["step"] for entry in log if entry["skipped"]] == [entry["step"] for entry in skipped]
    large = [entry["step"] for entry in log if entry["grad_norm"] > 100 * sorted(e["grad_norm"] for e in log)[20]]
    assert set(large) - set(range(FIRST + 1)) <= {entry["step"] for entry in skipped}

    file = recipe_file("half", **changes)
    assert train_here(file, "--set", "steps=20", "--set", "optimizer.schedule=constant") == 0
    assert train_here(file, "--resume") == 0
    assert_same(weights_of(tmp_path / "half" / "pipeline"), weights_of(tmp_path / "whole" / "pipeline"))


@pytest.mark.long
def test_too_many_in_a_row_end_the_run_with_a_checkpoint(recipe_file, tmp_path, capsys, monkeypatch):
    factors = iter([1.0] * 15 + [1e6] * 100)
    losses = BagelBackbone.losses

    def growing(self, model, batch):
        factor = next(factors)
        terms = losses(self, model, batch)
        return {name: term._replace(values=term.values * factor) for name, term in terms.items()}

    monkeypatch.setattr(BagelBackbone, "losses", growing)
    assert train_here(recipe_file(optimizer=SETTINGS, steps=60, checkpoints={"every": 100})) == 1
    told = capsys.readouterr().err
    assert f"{IN_A_ROW} steps in a row, up to step {15 + IN_A_ROW - 1}" in told and "skip_above" in told
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{15 + IN_A_ROW - 1:08d}"


def test_the_filter():
    spikes = SpikeFilter(3.0)
    assert not any(spikes.skips(norm) for norm in [100.0, *[1.0] * (FIRST - 1)]), "no median yet"
    assert not spikes.skips(2.9) and spikes.skips(3.1) and spikes.skips(float("nan"))
    again = SpikeFilter(3.0)
    again.load_state(json.loads(json.dumps(spikes.state())))
    assert again.median == 1 and again.in_a_row == 2
    for _ in range(IN_A_ROW - 2):
        again.check(0, ["a"])
        assert again.skips(50.0)
    with pytest.raises(GradientSpikes, match="Samples of the last one: a"):
        again.check(9, ["a"])
