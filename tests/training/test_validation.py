"""Validation by the real command line: held-out rows, equal numbers everywhere, the best step, early stops."""

import json
import os
import signal
import time

import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from echo4o.hub.facts import read_training
from echo4o.training.backbones import bagel_objective, omnigen2_objective
from echo4o.training.backbones.bagel import BagelBackbone
from echo4o.training.held_out import FILE, held_out_rows, id_hash
from echo4o.training.recipe import RecipeError
from echo4o.training.validation_log import ValidationLog
from echo4o.training.validation_result import ValidationResult, read_validations

from .conftest import make_rows, picture
from .running import assert_same, losses_of, run, start, torchrun, train_here, weights_of


@pytest.fixture(scope="session")
def two_splits(tmp_path_factory):
    """Rows to train on, and a validation split with text to image, references and questions."""
    rows = make_rows(questions=2)
    other = rows.select([0, 1, 3, 8, 9]).map(lambda row: {"id": f"held-{row['id']}"})
    folder = tmp_path_factory.mktemp("splits") / "rows"
    DatasetDict({"train": rows, "validation": other}).save_to_disk(folder)
    return folder


def validations(folder):
    return read_validations(folder)


def numbers(folder) -> list[float]:
    return [value for result in validations(folder) for value in (result.step, *result.flat().values())]


SPLIT = {"split": "validation", "every": 2, "times": 3}


def with_split(two_splits, **changes):
    return {"data": {"path": str(two_splits)}, "validation": SPLIT} | changes


@pytest.mark.long
def test_losses_by_task_and_noise_before_while_and_after_training(recipe_file, two_splits, tmp_path, capsys):
    file = recipe_file(**with_split(two_splits, ema={"decay": 0.9}, steps=5))
    assert train_here(file) == 0
    results = validations(tmp_path / "run")
    assert [result.step for result in results] == [0, 2, 4, 5]
    first = results[0]
    assert first.rows == 5 and set(first.tasks) == {"text_to_image", "references", "answers"}
    assert set(first.tasks["answers"]) == {"ce"} and set(first.tasks["references"]) == {"mse"}
    assert list(first.times) == ["0.166667", "0.5", "0.833333"]
    assert first.loss == pytest.approx(first.losses["mse"] + first.losses["ce"]) and 0 <= first.exact_match <= 1
    assert results[-1].losses["mse"] != first.losses["mse"]
    told = capsys.readouterr()
    assert "validation before training: loss" in told.out + told.err
    page = (tmp_path / "run" / "run.html").read_text()
    training = read_training(tmp_path / "run")
    assert training.validation.values["answers/ce"] == (
        first.tasks["answers"]["ce"],
        results[-1].tasks["answers"]["ce"],
    )
    assert "<h2>Validation</h2>" in page and "answers/ce" in page and "before training" in page


@pytest.mark.long
def test_a_run_without_and_with_validation_trains_the_same(recipe_file, two_splits, tmp_path):
    lora = {"tune": {"method": "lora", "rank": 4, "dropout": 0.3}}
    for name, changes in (("plain", {"validation": None}), ("validated", {})):
        assert train_here(recipe_file(name, **with_split(two_splits, **lora) | changes)) == 0
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "validated")
    assert_same(weights_of(tmp_path / "plain" / "adapter"), weights_of(tmp_path / "validated" / "adapter"))


@pytest.mark.long
def test_the_same_numbers_for_any_number_of_processes(recipe_file, two_splits, tmp_path):
    """One process, accumulation, two processes, two with sharded weights; full tuning and LoRA."""
    runs, expected = [], {}
    for name, tune in (("full", {"method": "full"}), ("lora", {"method": "lora", "rank": 4})):
        changes = with_split(two_splits, batch_size=4, tune=tune, ema={"decay": 0.9}, steps=3)
        file = recipe_file(name, **changes)
        assert train_here(file) == 0
        expected[name] = numbers(tmp_path / name)
        accumulated = tmp_path / f"{name}-accumulated"
        assert train_here(file, "--set", "micro_batch_size=1", "--set", f"output_dir={accumulated}") == 0
        assert numbers(accumulated) == pytest.approx(expected[name], abs=1e-5)
        for kind in ("none", "fsdp2"):
            runs += ["--", file, "--set", f"sharding={kind}", "--set", f"output_dir={tmp_path / f'{name}-{kind}'}"]
    torchrun(2, "tests.training.force_fsdp2", *runs[1:])
    for name, values in expected.items():
        for kind in ("none", "fsdp2"):
            folder = tmp_path / f"{name}-{kind}"
            assert numbers(folder) == pytest.approx(values, abs=1e-5), folder.name
            assert (json.loads((folder / "sharded-0.json").read_text())["sharded"] > 0) == (kind == "fsdp2")


@pytest.mark.long
def test_two_validations_of_the_same_weights_are_equal(recipe_file, two_splits, tmp_path):
    """Whatever the recipe's seed, batches and learning rate."""
    assert train_here(recipe_file("a", **with_split(two_splits))) == 0
    assert train_here(recipe_file("b", **with_split(two_splits, seed=7, batch_size=4))) == 0
    first, second = (validations(tmp_path / name)[0] for name in "ab")
    assert list(first.flat().values()) == pytest.approx(list(second.flat().values()), abs=1e-6)
    assert validations(tmp_path / "a")[-1] != validations(tmp_path / "b")[-1]


@pytest.mark.long
def test_killed_in_the_middle_of_a_validation_and_resumed(recipe_file, two_splits, tmp_path):
    changes = with_split(two_splits, steps=4, checkpoints={"every": 2, "keep_best": True})
    assert train_here(recipe_file("whole", **changes)) == 0
    file = recipe_file("killed", **changes)
    process = start(2, file, module="tests.training.kill_while_validating")
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    assert [result.step for result in validations(tmp_path / "killed")] == [0]
    assert train_here(file, "--resume") == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert_same(weights_of(tmp_path / "killed" / "pipeline"), weights_of(tmp_path / "whole" / "pipeline"))


@pytest.mark.long
def test_a_signal_ends_a_validation_and_a_resumed_run_repeats_it(recipe_file, two_splits, tmp_path):
    changes = with_split(two_splits, steps=40, batch_size=1, checkpoints={"every": 100})
    changes["validation"] = SPLIT | {"every": 1, "times": 100}
    process = start("train", recipe_file(**changes))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "validation_log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Stopped by SIGTERM" in told, told[-2000:]


# --- the best step ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_best_step_is_kept_and_exported(recipe_file, two_splits, tmp_path, capsys):
    """A learning rate that destroys the model after a good start: the first validated step is the best one."""
    optimizer = {"lr": 1e-2, "warmup_steps": 7, "schedule": "constant"}
    changes = with_split(
        two_splits, optimizer=optimizer, steps=8, checkpoints={"every": 2, "keep": 1, "keep_best": True}
    )
    assert train_here(recipe_file(**changes)) == 0
    best = min((r for r in validations(tmp_path / "run") if r.step), key=lambda r: r.loss)
    steps = sorted(int(f.name[-8:]) for f in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == sorted({best.step, 8})
    run("export", tmp_path / "run", "--best", "--out", tmp_path / "best")
    run("export", tmp_path / "run", "--step", best.step, "--out", tmp_path / "step")
    assert_same(weights_of(tmp_path / "best"), weights_of(tmp_path / "step"))
    told = run("export", tmp_path / "run", "--best", "--step", 2, "--out", tmp_path / "no", code=2)
    assert "give either --best or --step" in told


@pytest.mark.long
def test_a_run_without_a_best_step_says_so(recipe_file, tmp_path):
    assert train_here(recipe_file(checkpoints={"every": 2})) == 0
    assert "has no best checkpoint" in run("export", tmp_path / "run", "--best", "--out", tmp_path / "x", code=2)


def test_a_run_that_does_not_improve_ends_early(recipe_file, two_splits, tmp_path, capsys):
    optimizer = {"lr": 1.0, "schedule": "constant"}
    validation = SPLIT | {"every": 1, "stop_after": 2}
    file = recipe_file(**with_split(two_splits, validation=validation, optimizer=optimizer, steps=50))
    assert train_here(file) == 0
    told = capsys.readouterr().out
    assert "was not improved in 2 validations (validation.stop_after)" in told
    assert len(losses_of(tmp_path / "run")) < 20 and (tmp_path / "run" / "pipeline").is_dir()


def test_when_to_stop():
    log = ValidationLog.__new__(ValidationLog)
    log.stop_after, log.results = 2, []
    reasons = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.0, 1.0, 4.0]):
        log.results.append(ValidationResult(step, loss, {}, {}, {}, 1))
        reasons.append(log.why_stop())
    assert reasons[:5] == [None] * 5 and "step 3 (1.0000)" in reasons[5]
    assert log.best.step == 3


# --- a share of the rows ---------------------------------------------------------------------------------------------


def many_rows(count: int = 40) -> Dataset:
    """Rows of which some share an instruction, an image, or the images that they ask about."""
    features = make_rows(questions=1).features
    rows = []
    for i in range(count):
        colour = ("red", "green", "blue")[i % 3]
        image = picture(colour, (64 + 8 * (i // 2), 64)) if i < 30 else picture("yellow", (32, 32 + 8 * (i % 3)))
        question = i >= 36
        rows.append(
            {
                "id": f"many-{i}",
                "instruction": "what is it?" if question else f"number {i // 4}" if i < 12 else f"alone {i}",
                "task": "text_to_image",
                "category": "test",
                "reference_images": [picture("red", (64, 16 * (i % 2 + 1)))] if question else [],
                "image": None if question else image,
                "answer": "a square" if question else None,
                "source": "test",
                "metadata": None,
            }
        )
    return Dataset.from_list(rows, features=features)


def test_rows_with_the_same_image_or_instruction_are_on_one_side():
    rows = many_rows()
    (held,) = held_out_rows([rows], 0.3)
    assert 0 < len(held) < len(rows)

    def side(i):
        return i in held

    for low in range(0, 12, 4):
        assert len({side(i) for i in range(low, low + 4)}) == 1, "one instruction"
    for kind in range(3):
        assert len({side(i) for i in range(30, 36) if i % 3 == kind}) == 1, "one image"
    assert side(36) == side(38) and side(37) == side(39), "questions about one image"
    assert held == held_out_rows([rows], 0.3)[0]
    parts = held_out_rows([rows.select(range(20)), rows.select(range(20, 40))], 0.3)
    assert [*parts[0], *(20 + i for i in parts[1])] == held, "also across datasets"


def test_a_share_is_about_its_size_and_grows_with_it():
    assert sum(id_hash(f"row-{i}") < 0.1 for i in range(5000)) == pytest.approx(500, abs=80)
    rows = many_rows()
    assert set(held_out_rows([rows], 0.2)[0]) <= set(held_out_rows([rows], 0.4)[0])


def test_rows_that_all_belong_together_cannot_be_shared_out():
    rows = make_rows().map(lambda row: {"instruction": "remove the background"})
    wrong = [share for share in (0.3, 0.6, 0.9) if _fails(rows, share)]
    assert wrong == [0.3, 0.6, 0.9]


def _fails(rows, share) -> bool:
    try:
        held_out_rows([rows], share)
    except RecipeError as error:
        return "holds out none" in str(error) or "stay together" in str(error)
    return False


@pytest.mark.long
def test_held_out_rows_never_train(recipe_file, tmp_path, monkeypatch):
    """Every id that becomes a training sample in five epochs, and every id that is validated."""
    many_rows().save_to_disk(tmp_path / "many")
    trained, validated = set(), set()
    sample, fixed = BagelBackbone.sample, BagelBackbone.validation_samples
    monkeypatch.setattr(BagelBackbone, "sample", lambda s, row, epoch: (trained.add(row.id), sample(s, row, epoch))[1])
    monkeypatch.setattr(
        BagelBackbone, "validation_samples", lambda s, row, t: (validated.add(row.id), fixed(s, row, t))[1]
    )
    validation = {"share": 0.3, "every": 5, "times": 1}
    file = recipe_file(data={"path": str(tmp_path / "many")}, validation=validation, batch_size=20, steps=10)
    assert train_here(file) == 0
    rows = {f"many-{i}" for i in range(40)}
    assert trained and validated and not trained & validated and trained | validated == rows
    (numbers,) = json.loads((tmp_path / "run" / FILE).read_text())["rows"]
    assert {f"many-{i}" for i in numbers} == validated


@pytest.mark.long
def test_a_share_is_the_same_for_two_processes_and_after_resuming(recipe_file, tmp_path):
    many_rows().save_to_disk(tmp_path / "many")
    changes = {"data": {"path": str(tmp_path / "many")}, "validation": {"share": 0.3, "every": 2, "times": 2}}
    changes |= {"checkpoints": {"every": 2}}
    assert train_here(recipe_file("one", **changes)) == 0
    run("train", recipe_file("two", processes=2, **changes))
    held = [json.loads((tmp_path / name / FILE).read_text()) for name in ("one", "two")]
    assert held[0] == held[1]
    assert numbers(tmp_path / "two") == pytest.approx(numbers(tmp_path / "one"), abs=1e-5)
    file = recipe_file("half", steps=2, **changes)
    assert train_here(file, "--set", "optimizer.schedule=constant") == 0
    told = ["--set", "optimizer.schedule=constant", "--set", "steps=4", "--resume"]
    assert train_here(file, *told, "--set", "validation.share=0.4") == 2
    assert train_here(file, *told) == 0
    assert json.loads((tmp_path / "half" / FILE).read_text()) == held[0]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"validation": {"every": 2}}, "name the rows by one of `split`, `data` and `share`"),
        ({"validation": {"every": 2, "share": 0.1, "split": "test"}}, "name the rows by one of"),
        ({"validation": {"every": 2, "split": "test"}}, "validation: data.split=test"),
        ({"validation": {"every": 2, "split": "train"}}, "of its rows are training rows, for example 'question-0'"),
        ({"checkpoints": {"every": 2, "keep_best": True}}, "checkpoints.keep_best needs a validation section"),
        ({"validation": {"every": 2, "share": 1e-9}}, "holds out none of 10 rows"),
    ],
)
def test_settings_that_cannot_validate(recipe_file, two_splits, capsys, changes, told):
    assert train_here(recipe_file(data={"path": str(two_splits)}, **changes)) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_damaged_validation_row_is_named(recipe_file, two_splits, tmp_path, capsys):
    splits = load_from_disk(str(two_splits))
    bad = splits["validation"].select([0]).map(lambda row: {"image": None, "id": "bad"})
    splits["validation"] = concatenate_datasets([splits["validation"], bad])
    splits.save_to_disk(tmp_path / "bad")
    assert train_here(recipe_file(**with_split(tmp_path / "bad"))) == 2
    assert "error: Row bad: " in capsys.readouterr().err


@pytest.mark.long
def test_exact_match_is_that_of_greedy_answers(recipe_file, two_splits, tmp_path):
    """Train until the answers are learned: the share of exact answers is that of the pipeline's own answers."""
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline

    splits = load_from_disk(str(two_splits))
    questions = splits["train"].select([8, 9])
    DatasetDict({"train": questions, "validation": splits["validation"]}).save_to_disk(tmp_path / "asked")
    optimizer = {"lr": 3e-3, "schedule": "constant"}
    file = recipe_file(
        **with_split(tmp_path / "asked", optimizer=optimizer, steps=30, validation=SPLIT | {"every": 30})
    )
    assert train_here(file) == 0
    before, after = validations(tmp_path / "run")
    assert before.exact_match == 0 and after.exact_match > 0
    pipe = Echo4oPipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.float32)
    answers = [pipe.chat(q["instruction"], image=q["reference_images"], max_new_tokens=32) for q in questions]
    exact = [answer.strip() == q["answer"] for answer, q in zip(answers, questions)]
    assert sum(exact) / len(exact) == after.exact_match


@pytest.mark.parametrize("time", [0.0625, 0.5, 0.9375])
def test_fixed_times_are_amounts_of_noise_whatever_the_shift(time):
    for shift in (1.0, 4.0):
        raw = torch.tensor(bagel_objective.raw_time_of(time, shift))
        assert bagel_objective.shift_time(torch.sigmoid(raw), shift) == pytest.approx(time, abs=1e-6)
    for version in ("v1", "v2", "none"):
        raw = torch.tensor(omnigen2_objective.raw_time_of(time, 900, version))
        assert omnigen2_objective.shift_time(torch.sigmoid(raw), 900, version) == pytest.approx(time, abs=1e-6)
