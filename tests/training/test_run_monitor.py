"""What a run says about itself: trackers, the trace of a step's time, `run.html`; and what it reads ahead."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from echo4o.training.prefetch import Prefetch
from echo4o.training.recipe import RecipeError
from echo4o.training.recipe_files import load_recipe
from echo4o.training.run_log import PHASES, phase_shares
from echo4o.training.train import Trainer

from .conftest import make_rows
from .running import log_of, train_here

IMAGES = {"every": 2, "steps": 2, "prompts": ["a red square", "a blue square"]}


def test_a_tracker_that_is_missing_is_named(recipe_file, monkeypatch, tmp_path):
    import importlib.metadata

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("echo4o.training.engine.importlib.metadata.version", version)
    (tmp_path / "tensorboard").mkdir()  # what it wrote in an earlier life is no module
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="tensorboard is not installed: pip install tensorboard"):
        Trainer(load_recipe(recipe_file(trackers=["tensorboard"])))


@pytest.mark.long
def test_tensorboard_shows_curves_images_and_settings(recipe_file, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train_here(recipe_file(trackers=["tensorboard"], images=IMAGES)) == 0
    (folder,) = {file.parent for file in (tmp_path / "run" / "echo4o").glob("events.out.tfevents.*")}
    board = events.EventAccumulator(str(folder))
    board.Reload()
    loss, log = board.Scalars("loss"), log_of(tmp_path / "run")
    assert [(event.step, event.value) for event in loss] == [
        (entry["step"] + 1, pytest.approx(entry["loss"], rel=1e-6)) for entry in log
    ]
    assert {"lr", "tokens_per_second", "data_seconds"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["images/0", "images/1"]
    last = board.Images("images/1")[-1]
    assert last.step == 4
    drawn = np.asarray(Image.open(tmp_path / "run" / "images" / "step-00000004" / "1.png"))
    (tmp_path / "shown.png").write_bytes(last.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png"))[..., :3], drawn)
    (settings,) = (tmp_path / "run" / "echo4o").rglob("hparams.yml")
    assert "optimizer.lr: 0.001" in settings.read_text()


def test_wandb_writes_beside_the_run_without_a_network(recipe_file, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train_here(recipe_file(trackers=["wandb"], images=IMAGES)) == 0
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 1000


def test_a_run_that_ends_early_ends_its_trackers(recipe_file, monkeypatch):
    pytest.importorskip("tensorboard")
    trainer = Trainer(load_recipe(recipe_file(trackers=["tensorboard"])), dataset=make_rows())
    ended = []
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: ended.append(True))
    monkeypatch.setattr(trainer.batches, "next_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert ended == [True]


# --- where the time goes --------------------------------------------------------------------------------------------


def test_the_log_and_the_report_say_where_a_steps_time_goes(recipe_file, tmp_path):
    assert train_here(recipe_file(images=IMAGES)) == 0
    log, before = log_of(tmp_path / "run"), 0.0
    for entry in log:
        parts = [entry[f"{phase}_seconds"] for phase in PHASES]
        assert all(part >= 0 for part in parts) and sum(parts) <= entry["seconds"] - before + 1e-3
        before = entry["seconds"]
    assert sum(phase_shares(log).values()) == pytest.approx(1)
    page = (tmp_path / "run" / "run.html").read_text()
    assert "Of the steps' time, " in page and "% data, " in page and "% compute, " in page
    assert page.count("data:image/png") == 1 + 2 * 2


# --- reading ahead --------------------------------------------------------------------------------------------------


class Steps:
    """Numbers as batches."""

    def __init__(self, fail_at: int | None = None):
        self.step, self.fail_at, self.threads = 0, fail_at, set()

    def next_step(self):
        self.threads.add(threading.current_thread().name)
        if self.step == self.fail_at:
            raise ValueError(f"no step {self.step}")
        self.step += 1
        return [self.step - 1]

    def state(self):
        return {"step": self.step}

    def load_state(self, state):
        self.step = state["step"]

    def facts(self):
        return {"step": float(self.step)}


def test_one_step_is_read_ahead_and_the_position_is_the_one_handed_out():
    steps = Steps()
    ahead = Prefetch(steps)
    ahead.load_state({"step": 5})
    assert ahead.state() == {"step": 5}
    for number in (5, 6, 7):
        assert ahead.next_step() == [number]
        assert ahead.state() == {"step": number + 1} and ahead.facts() == {"step": number + 1.0}
        ahead._next.result()
        assert steps.step == number + 2, "one more is made, and no other"
    ahead.close()
    assert all(name.startswith("next-step") for name in steps.threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next-step")]


def test_an_error_is_raised_where_its_step_is_asked_for():
    ahead = Prefetch(Steps(fail_at=1))
    assert ahead.next_step() == [0]
    with pytest.raises(ValueError, match="no step 1"):
        ahead.next_step()
    assert ahead.state() == {"step": 1}
    ahead.close()


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_cannot_be_read_is_named_after_saving(recipe_file, tmp_path, capsys, streaming):
    """Eight rows, of which one has a picture that is cut off; the run ends where it would be used, and can go on."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    from echo4o.training.row_images import undecoded

    whole = make_rows()
    raw = [dict(row) for row in undecoded(whole)]
    raw[5]["image"] = {"bytes": raw[5]["image"]["bytes"][:60], "path": None}
    features = undecoded(whole).features
    spoiled = Dataset.from_list(raw, features=features).cast(whole.features)
    assert isinstance(spoiled.features["image"], ImageFeature)
    spoiled.save_to_disk(tmp_path / "spoiled")
    whole.save_to_disk(tmp_path / "whole")
    changes = {"data": {"path": str(tmp_path / "spoiled"), "streaming": streaming}, "steps": 5}
    changes |= {"batch_size": None, "packing": {"tokens": 60, "packs_per_step": 1, "buffer": 1}} if streaming else {}
    file = recipe_file(checkpoints={"every": 100}, **changes)
    assert train_here(file, "--set", "steps=20") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "row-5" in line or streaming and "after row row-4" in line, line
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(log_of(tmp_path / "run")) == json.loads((saved / "state.json").read_text())["step"]
    assert train_here(file, "--set", "steps=20", "--set", f"data.path={tmp_path / 'whole'}", "--resume") == 0
