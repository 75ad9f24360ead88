"""`echo4o train` as a person meets it: its help, `--plan`, `--set`, and what it refuses to do quietly."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.training.recipe_files import bundled_names

from .running import run, train_here


def echo4o(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def plan(recipe, *arguments):
    return echo4o("train", recipe, "--plan", "--set", "model=release", *arguments)


def test_help_teaches_the_recipes():
    told = echo4o("train", "--help").output
    for name in bundled_names():
        assert name in told or name == "quickstart_base"


def test_a_plan_that_fits_names_every_amount():
    done = plan("lora_single_gpu", "--gpu", "80GB")
    assert done.exit_code == 0
    for title in ("weights", "gradients", "optimizer states", "moving average", "activations", "host memory", "disk"):
        assert title in done.stdout
    assert done.stdout.rstrip().endswith("fits on 1 GPU of 80.0 GB") and "NOT" not in done.stdout


def test_a_plan_assumes_80_gb_and_the_recipes_processes_by_default():
    assert plan("full_fsdp2_8gpu").stdout.rstrip().endswith("fits on 8 GPUs of 80.0 GB")
    assert "on 4 GPUs of 141.0 GB" in plan("full_fsdp2_8gpu", "--gpu", "141GB", "--num-gpus", 4).stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe, gpu, count, nearest",
    [
        ("lora_single_gpu", "24GB", 1, "qlora_24gb"),
        ("full_fsdp2_8gpu", "48GB", 8, "lora_single_gpu --set processes=8 --set packing.packs_per_step=8"),
        ("full_fsdp2_8gpu", "24GB", 8, "qlora_24gb --set processes=8"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_nearest_that_does(recipe, gpu, count, nearest):
    done = plan(recipe, "--gpu", gpu, "--num-gpus", count)
    assert done.exit_code == 1
    *_, verdict, advice = done.stdout.rstrip().splitlines()
    assert verdict.startswith("does NOT fit on") and advice == f"nearest that fits: {nearest}"
    words = nearest.split() if nearest[0] != "-" else [recipe, *nearest.split()]
    assert plan(words[0], "--gpu", gpu, "--num-gpus", count, *words[1:]).exit_code == 0, "the advice is good"


@pytest.mark.long
def test_where_nothing_fits_it_says_so():
    done = plan("lora_single_gpu", "--gpu", "4GB")
    assert done.exit_code == 1 and "no bundled recipe fits: use more or larger GPUs" in done.stdout


WRONG = [
    (["lora_single_gpu", "--plan", "--gpu", "lots"], "'lots' is not an amount of memory: write 80GB or 16GiB."),
    (["lora_single_gpu", "--plan", "--gpu", "0GB"], "'0GB' is not an amount of memory above zero."),
    (["lora_single_gpu", "--gpu", "24GB"], "--gpu has no effect without --plan."),
    (["lora_single_gpu", "--num-gpus", "8"], "--num-gpus has no effect without --plan."),
    (["full_fsdp2_8gpu", "--plan", "--num-gpus", "1"], "sharding: fsdp2 needs several GPUs: set --num-gpus."),
    (
        ["lora_single_gpu", "--set", "optimizer.speed=1"],
        "optimizer.speed: unknown key; known here: name, kernel",
    ),
    (["lora_single_gpu", "--set", "steps=many"], "steps: Input should be a valid integer"),
    (["lora_single_gpu", "--set", "steps"], "--set steps: write section.key=value, for example optimizer.lr=1e-5."),
    (["lora_single_gpu", "--set", "steps=[1"], "--set steps=[1: '[1' is not a YAML value."),
    (["lora_single_gpu", "--set", "steps.more=1"], "--set steps.more: steps is 3000 and has no settings inside."),
    (["lora_single_gpu", "--set", "data.3.path=x"], "data.0.3: unknown key"),
    (["lora_single_gpu", "--set", "tune.method=dora"], "tune: set `method: full` or `method: lora`"),
    (
        ["lora_single_gpu", "--set", "tune.experts=[gen,text]"],
        "tune.experts.1: Input should be 'gen' or 'und' (given: 'text')",
    ),
    (["lora_single_gpu", "--set", "mixed_precision=fp16"], "mixed_precision: Input should be 'no' or 'bf16'"),
    (["lora_singel_gpu"], "bundled recipes: blip3o_full_8gpu"),
]


@pytest.mark.parametrize("arguments, told", WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_options_and_settings_are_reported(arguments, told):
    more = [] if arguments[0] == "lora_singel_gpu" else ["--set", "model=release"]
    done = echo4o("train", *arguments, *more)
    assert done.exit_code == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_name_without_a_folder_is_not_requested_from_the_hub():
    done = echo4o("train", "lora_single_gpu", "--plan", "--set", "model=echo-5o")
    assert done.exit_code == 2
    assert (
        "model: echo-5o has no configuration of its transformer to plan with (there is no such folder" in done.stderr
    )


@pytest.mark.long
def test_a_launcher_that_starts_fewer_processes_than_asked_is_refused(recipe_file, tmp_path):
    launch = ["--cpu", "--num_processes", 2, "-m", "echo4o.training.train", recipe_file()]
    told = run(*launch, module="accelerate.commands.launch", code=1)
    assert "accelerate launch was asked for several processes and started one" in told
    assert not (tmp_path / "run").exists()


def test_a_machine_with_too_few_gpus_does_not_start(recipe_file, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it was started"))
    done = echo4o("train", recipe_file(device="auto", processes=64))
    assert done.exit_code == 2 and "the recipe needs 64 processes, but this machine has" in done.stderr


def test_missing_columns_are_named_before_a_model_is_loaded(recipe_file, tmp_path, capsys):
    from datasets import Dataset

    Dataset.from_list([{"id": "a", "prompt": "b", "image": None}]).save_to_disk(tmp_path / "mine")
    assert train_here(recipe_file(data={"path": str(tmp_path / "mine")}, model="nowhere")) == 2
    told = capsys.readouterr().err
    assert (
        "has no column instruction, reference_images; training reads id, instruction, reference_images, image" in told
    )
    assert "there are: id, prompt, image." in told


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data": {"split": "test"}}, "data.split=test has no effect"),
        ({"data": {"name": "mine"}}, "data.name=mine has no effect"),
        (
            {"data": {"path": "nowhere"}},
            "data.path=nowhere: there is no such folder (a Hub repository is called owner/name).",
        ),
        ({"output_dir": "{file}"}, "cannot be created: File exists"),
        ({"output_dir": "{file}/below"}, "cannot be created: Not a directory"),
        ({"tune": {"method": "lora", "rank": 1000}}, "tune.rank=1000 exceeds the matrices: at most 64."),
        ({"latents": "nowhere"}, "nowhere is not a cache"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_the_first_step(
    recipe_file, rows_folder, tmp_path, capsys, changes, told
):
    (tmp_path / "file").write_text("taken")
    changes = {
        key: value.format(file=tmp_path / "file") if key == "output_dir" else value for key, value in changes.items()
    }
    if "data" in changes:
        changes["data"] = {"path": str(rows_folder)} | changes["data"]
    assert train_here(recipe_file(**changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert told in line


@pytest.mark.parametrize(
    "component, changes",
    [
        ("transformer", {"hidden_size": "64"}),
        ("vision_model", {"num_layers": [2]}),
        ("vae", {"latent_channels": "sixteen"}),
    ],
)
def test_a_configuration_of_the_wrong_type_is_one_line(
    recipe_file, model_folder, tmp_path, capsys, component, changes
):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    recipe = recipe_file(model=str(tmp_path / "model"))
    assert train_here(recipe) == 2
    told = capsys.readouterr().err
    assert "error: model: " in told and "cannot be loaded" in told and "Traceback" not in told
    planned = echo4o("train", recipe, "--plan")
    assert planned.exit_code == 2 and "does not describe a model" in planned.stderr and component in planned.stderr


@pytest.mark.parametrize("column, value", [("id", None), ("instruction", None), ("image", None)])
def test_a_row_without_its_parts_is_named(recipe_file, tmp_path, capsys, column, value):
    from datasets import Dataset

    from .conftest import make_rows

    rows = make_rows()
    table = [dict(row) for row in rows.select([0, 2, 4])]
    table[1][column] = value
    Dataset.from_list(table, features=rows.features).save_to_disk(tmp_path / "mine")
    assert train_here(recipe_file(data={"path": str(tmp_path / "mine")}, batch_size=3)) == 2
    told = capsys.readouterr().err
    assert f"error: Row {table[1]['id']}" in told and column in told
