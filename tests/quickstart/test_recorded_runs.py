"""The commands that recorded what the quickstart ships: the base model, and the runs that it is compared with."""

import json
import shutil

import pytest

from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts
from echo4o.quickstart import base_model, control, few_steps
from echo4o.quickstart.run import BASE
from echo4o.quickstart.tiny_base import load_tokenizer, load_vae


@pytest.fixture(autouse=True)
def two_prompts(monkeypatch):
    for module in (base_model, control):
        monkeypatch.setattr(module, "held_out_prompts", lambda: held_out_prompts()[::80])


@pytest.mark.long
def test_the_base_model_trains_from_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "single_object_prompts", lambda number: held_out_prompts()[:1])
    facts = base_model.train_base(load_tokenizer(BASE), load_vae(BASE), tmp_path / "base", steps=2, rows=80)
    assert facts["steps"] == 2 and facts["samples"] == 64 and facts["held_out"]["of"] == 2
    assert json.loads((tmp_path / "base" / "base.json").read_text()) == facts
    assert (tmp_path / "base" / "model_index.json").is_file() and not list((tmp_path / "base").rglob("*.py"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["base", "base + loose", "random + clean", "base + clean without multi_reference"])
def test_an_experiment_is_measured_and_recorded(tmp_path, name, monkeypatch):
    monkeypatch.setattr(control, "FULL", control.FULL.__class__({"surreal_fantasy": 40}, 1, 2, {}))
    if "without" in name:
        parts = {"surreal_fantasy": 40, "multi_reference": 40}
        monkeypatch.setattr(control, "FULL", control.FULL.__class__(parts, 1, 2, {}))
    base = shutil.copytree(BASE, tmp_path / "base")
    measured = control.measure(
        name, 3, tmp_path / "out", base, {"steps": 1, "optimizer.warmup_steps": 0, "validation": None}
    )
    assert measured["steps"] == (0 if name == "base" else 1) and measured["scores"]["overall"]["of"] == 2
    control.record(name, 3, measured, base)
    assert json.loads((base / control.RECORD).read_text())[name]["3"] == measured


@pytest.mark.long
def test_the_teacher_of_free_objects_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps, "FREE_STEPS", 16)
    folder = few_steps.train_free_objects_model(tmp_path)
    assert (folder / "model_index.json").is_file()
    monkeypatch.setattr(few_steps, "Trainer", None)
    assert few_steps.train_free_objects_model(tmp_path) == folder
