"""Few-step adapters: the teacher's trajectories, the objective, and runs of the command line from prompts to images."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from echo4o.common.image_metadata import read_metadata
from echo4o.modeling.common.lora_files import DIFFUSERS_FILE, find_adapter, read_adapter
from echo4o.training.backbones.bagel import BagelBackbone
from echo4o.training.backbones.base import named_generator
from echo4o.training.distillation import DistilledRows, segment_line
from echo4o.training.precompute import CacheError, precompute
from echo4o.training.precompute import main as precompute_main
from echo4o.training.recipe import RecipeError
from echo4o.training.recipe_files import load_recipe
from echo4o.training.teacher import Teacher, TeacherSettings, Trajectories, teacher_fingerprint
from echo4o.training.train import Trainer

from .conftest import COLOURS, make_backbone, picture
from .running import assert_same, losses_of, start, torchrun, train_here, weights_of

SMALL = {"updates": 4, "segments": 4, "batch_size": 3}


def prompt_rows(count: int = 6) -> Dataset:
    """Prompts, of which every second has a reference; no target images."""
    features = Features({"id": Value("string"), "instruction": Value("string"), "reference_images": List(Image())})
    rows = [
        {
            "id": f"prompt-{i}",
            "instruction": f"a {COLOURS[i % 4]} square number {i}",
            "reference_images": [picture(COLOURS[i % 4], (64, 32))] * (i % 2),
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def prompts_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "prompts"
    prompt_rows().save_to_disk(folder)
    return folder


def make_trajectories(prompts: Path, model: Path, out: Path, *options, code: int = 0) -> Path:
    arguments = [prompts, "--model", model, "--out", out, "--teacher", "--updates", 4, "--segments", 4, *options]
    assert precompute_main([str(a) for a in arguments]) == code
    return out


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory, prompts_folder, model_folder) -> Path:
    return make_trajectories(prompts_folder, model_folder, tmp_path_factory.mktemp("teacher") / "trajectories")


@pytest.fixture
def distill_file(recipe_file, prompts_folder, trajectories):
    """Writes a recipe that distils: `distill_file(name, **changes)`."""

    def write(name: str = "run", steps: int = 2, **changes) -> Path:
        values = {"data": {"path": str(prompts_folder)}, "distill": {"teacher": str(trajectories), "steps": steps}}
        values |= {"tune": {"method": "lora", "rank": 4, "alpha": 4, "experts": ["gen"]}}
        return recipe_file(name, **(values | changes))

    return write


def error_of(capsys) -> str:
    """The last line that a command printed as its error, without progress bars."""
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_a_trajectory_is_the_pipelines_own(tiny_pipeline, model_folder):
    backbone = make_backbone(tiny_pipeline)
    backbone.recipe = backbone.recipe.model_copy(update={"model": str(model_folder)})
    rows = list(prompt_rows(2))
    made = Teacher(backbone, TeacherSettings(updates=6, segments=3)).prepare(rows)
    for row, trajectory in zip(rows, made, strict=True):
        noise = torch.randn(
            tuple(trajectory.latents.shape[2:]), generator=named_generator(0, row["id"], 0, "teacher noise")
        )
        assert torch.equal(trajectory.latents[0, 0], noise)
        seen: list[torch.Tensor] = []

        def keep(pipe, step, timestep, tensors, seen=seen):
            seen.append(tensors["latents"][0])
            return {}

        final = tiny_pipeline(
            row["instruction"],
            image=row["reference_images"] or None,
            num_inference_steps=6,
            latents=noise[None],
            generator=named_generator(0, row["id"], 0, "teacher references"),
            output_type="latent",
            callback_on_step_end=keep,
        ).images[0]
        assert torch.allclose(trajectory.latents[0, 1:], torch.stack(seen[1::2]), atol=1e-4)
        assert torch.allclose(trajectory.latents[0, -1], final, atol=1e-4)
        shift = tiny_pipeline.scheduler.config.shift
        expected = [shift * u / (1 + (shift - 1) * u) for u in (1, 2 / 3, 1 / 3, 0)]
        assert trajectory.times == pytest.approx(expected)


def test_a_student_with_the_teachers_velocity_has_no_loss(tiny_pipeline, model_folder):
    """Without guidance and with one update for each segment, the model itself is the exact student."""
    backbone = make_backbone(tiny_pipeline, vit_dropout=0.3)
    backbone.recipe = backbone.recipe.model_copy(update={"model": str(model_folder)})
    tiny_pipeline.transformer.eval()
    settings = TeacherSettings(updates=3, segments=3, guidance={"guidance_scale": 1.0})
    for row, made in zip(prompt_rows(2), Teacher(backbone, settings).prepare(list(prompt_rows(2)))):
        for index in range(3):
            line = segment_line(made, 0, index, 3)
            references = named_generator(0, row["id"], 0, "teacher references")
            sample = backbone.line_sample(made.conditions, line.image, line.noise, line.start, references)
            with torch.no_grad():
                loss = backbone.losses(tiny_pipeline, backbone.collate([sample]))["mse"].values.mean()
            assert loss < 1e-5, (row["id"], index)
        other = segment_line(made, 0, 0, 1)  # one update instead of three is not exact
        sample = backbone.line_sample(
            made.conditions,
            other.image,
            other.noise,
            other.start,
            named_generator(0, row["id"], 0, "teacher references"),
        )
        with torch.no_grad():
            assert backbone.losses(tiny_pipeline, backbone.collate([sample]))["mse"].values.mean() > 1e-3


def test_the_line_of_a_segment_goes_through_both_ends():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 9, 2, 4, 4, generator=generator)
    times = [1.0, 0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2, 0.0]
    made = Trajectories("a", None, latents, times, "text")
    for steps in (8, 4, 2, 1):
        for index in range(steps):
            line, stride = segment_line(made, 0, index, steps), 8 // steps
            for end in (index * stride, (index + 1) * stride):
                point = (1 - times[end]) * line.image + times[end] * line.noise
                assert torch.allclose(point, latents[0, end], atol=1e-4)
            assert line.start == times[index * stride]


@pytest.mark.long
def test_every_segment_of_every_image_is_visited_once(model_folder, trajectories, tiny_pipeline, distill_file):
    recipe = load_recipe(distill_file(steps=4))
    rows = DistilledRows(BagelBackbone(tiny_pipeline, recipe), recipe)
    (prepared,) = rows.prepare([prompt_rows()[1]])
    times = [round(float(torch.sigmoid(rows.sample(prepared, epoch).raw_time)), 6) for epoch in range(8)]
    assert len(set(times)) == 4 and times[:4] == times[4:] and max(times) == 1.0
    assert torch.equal(rows.sample(prepared, 2).noise, rows.sample(prepared, 6).noise)


def test_any_number_of_processes_writes_the_same_trajectories(tmp_path, tiny_pipeline, model_folder):
    backbone = make_backbone(tiny_pipeline)
    backbone.recipe = backbone.recipe.model_copy(update={"model": str(model_folder)})
    teacher = Teacher(backbone, TeacherSettings(**SMALL))
    precompute(prompt_rows(), teacher, tmp_path / "one", rows_per_file=2)
    for rank in (1, 0):
        precompute(prompt_rows(), teacher, tmp_path / "two", rank=rank, processes=2, rows_per_file=2)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 1 + 3
    (tmp_path / "two" / "rows-00000001.safetensors").unlink()
    precompute(prompt_rows(), teacher, tmp_path / "two", rows_per_file=2)  # resumed
    assert {f.name: f.read_bytes() for f in (tmp_path / "two").iterdir()} == one
    with pytest.raises(CacheError, match="sampling: .*'seed': 0.* there, .*'seed': 1.* here"):
        precompute(
            prompt_rows(), Teacher(backbone, TeacherSettings(**SMALL, seed=1)), tmp_path / "two", rows_per_file=2
        )


def test_the_fingerprint_is_of_the_weights(tmp_path, tiny_pipeline, model_folder):
    before = teacher_fingerprint(str(model_folder))
    tiny_pipeline.save_pretrained(tmp_path / "same")
    assert teacher_fingerprint(str(tmp_path / "same")) == before
    with torch.no_grad():
        next(tiny_pipeline.transformer.layers[1].gen.parameters()).flatten()[0] += 1
    tiny_pipeline.save_pretrained(tmp_path / "other")
    assert teacher_fingerprint(str(tmp_path / "other")) != before


@pytest.mark.parametrize(
    "options, told",
    [
        (["--teacher", "--updates", "10", "--segments", "4"], "updates=10 must be a multiple of segments=4."),
        (["--updates", "10"], "--updates has no effect without --teacher."),
        (["--teacher", "--set", "steps=3"], "steps is not a guidance option; there are: guidance_scale"),
        (["--teacher", "--set", "guidance_range=[0,1]"], "Echo4oPipeline does not take guidance_range."),
    ],
)
def test_settings_that_are_not_possible_are_one_line(tmp_path, capsys, prompts_folder, model_folder, options, told):
    given = [str(prompts_folder), "--model", str(model_folder), "--out", str(tmp_path / "out"), *options]
    assert precompute_main(given) == 2
    assert f"error: {told}" in error_of(capsys)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_loss_falls_and_only_the_adapter_is_written(distill_file, tmp_path):
    file = distill_file(steps=4, optimizer={"lr": 1e-2}, batch_size=6)
    assert train_here(file, "--set", "steps=24") == 0
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert [f.name for f in (tmp_path / "run" / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.long
def test_validation_has_one_value_for_each_update(distill_file, tmp_path):
    file = distill_file(validation={"every": 4, "share": 0.3}, batch_size=2)
    assert train_here(file) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4] and set(lines[0]["times"]) == {"1", "0.5"}


@pytest.mark.long
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(distill_file, tmp_path):
    assert train_here(distill_file("whole", steps=2)) == 0
    changes = {"checkpoints": {"every": 1}}
    process = start("train", distill_file("cut", steps=2, **changes), "--set", "steps=400")
    log = tmp_path / "cut" / "train_log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert train_here(distill_file("cut", steps=2, **changes), "--resume", "--set", "steps=4") == 0
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert_same(weights_of(tmp_path / "cut" / "adapter"), weights_of(tmp_path / "whole" / "adapter"))


@pytest.mark.long
def test_two_processes_train_the_same_adapter(distill_file, tmp_path):
    changes = {"batch_size": 4, "micro_batch_size": 1}
    assert train_here(distill_file("one", **changes)) == 0
    torchrun(2, "echo4o.training.train", distill_file("two", **changes))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_steps_that_do_not_divide_the_segments_are_refused(distill_file, capsys):
    assert train_here(distill_file(steps=3)) == 2
    assert "distill.steps=3 does not divide the 4 segments of" in (told := error_of(capsys))
    assert told.endswith("choose one of 4, 2, 1.")


def test_stale_trajectories_are_refused(distill_file, tmp_path, tiny_pipeline, capsys):
    with torch.no_grad():
        next(tiny_pipeline.transformer.layers[0].gen.parameters()).add_(1e-3)
    tiny_pipeline.save_pretrained(tmp_path / "newer")
    assert train_here(distill_file(model=str(tmp_path / "newer"))) == 2
    assert "is stale: its trajectories are of a model with the fingerprint" in error_of(capsys)


def test_other_prompts_under_the_same_id_are_refused(distill_file, tmp_path, capsys):
    rows = prompt_rows()
    rows.map(lambda row: {"instruction": row["instruction"] + "!"}).save_to_disk(tmp_path / "changed")
    assert train_here(distill_file(data={"path": str(tmp_path / "changed")})) == 2
    assert "has another instruction than when" in error_of(capsys)
    rows.map(lambda row: {"reference_images": [picture("black")]}, features=rows.features).save_to_disk(
        tmp_path / "refs"
    )
    assert train_here(distill_file("refs", data={"path": str(tmp_path / "refs")})) == 2
    assert "has other references than when" in error_of(capsys)
    prompt_rows(8).save_to_disk(tmp_path / "more")
    assert train_here(distill_file("more", data={"path": str(tmp_path / "more")}, batch_size=8)) == 2
    assert "has nothing for 2 of 8 ids, for example " in error_of(capsys)


def test_a_cache_is_not_mistaken_for_trajectories_nor_the_other_way(
    distill_file, recipe_file, rows_folder, model_folder, trajectories, tmp_path, capsys
):
    assert precompute_main([str(rows_folder), "--model", str(model_folder), "--out", str(tmp_path / "latents")]) == 0
    capsys.readouterr()
    assert train_here(distill_file(distill={"teacher": str(tmp_path / "latents"), "steps": 2})) == 2
    assert "holds encoded images, not trajectories" in error_of(capsys)
    assert train_here(recipe_file("plain", latents=str(trajectories))) == 2
    assert "holds trajectories of a teacher: name it in distill.teacher" in error_of(capsys)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"tune": {"method": "full"}}, "distill trains an adapter: set tune.method: lora."),
        ({"objective": {"time_shift": 4.0}}, "objective has no effect with distill"),
        ({"latents": "somewhere"}, "leave latents out"),
        ({"resolution": {"max_side": 64}}, "resolution has no effect with distill"),
        ({"validation": {"every": 2, "share": 0.5, "times": 3}}, "validation.times has no effect with distill"),
    ],
)
def test_recipes_with_settings_without_effect_are_refused(distill_file, changes, told):
    with pytest.raises(RecipeError, match=told):
        load_recipe(distill_file(**changes))


def test_a_plan_needs_no_trajectories():
    from typer.testing import CliRunner

    from echo4o.cli import app

    done = CliRunner().invoke(app, ["train", "distill_lora", "--plan", "--set", "model=release"])
    assert done.exit_code == 0 and "fits on 1 GPU" in done.stdout


# --- from prompts to images ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_adapter_generates_by_its_preset_on_the_command_line(distill_file, tmp_path, model_folder):
    from typer.testing import CliRunner

    from echo4o.cli import app

    def echo4o(*arguments) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert train_here(distill_file(steps=2, checkpoints={"every": 4})) == 0
    adapter = tmp_path / "run" / "adapter"
    echo4o("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert read_adapter(tmp_path / "exported" / DIFFUSERS_FILE)[1] == read_adapter(adapter / DIFFUSERS_FILE)[1]
    echo4o("export", tmp_path / "run", "--to", "original", "--out", tmp_path / "original")
    assert read_adapter(find_adapter(tmp_path / "original"))[1]["sampling_preset"]["num_inference_steps"] == 2

    def image(name: str, *options) -> bytes:
        common = ("generate", "a red square", "--model", model_folder, "--seed", 0, "--device", "cpu")
        echo4o(*common, "--height", 32, "--width", 32, *options, "--out", tmp_path / f"{name}.png")
        return PILImage.open(tmp_path / f"{name}.png").tobytes()

    own = image("own", "--lora", adapter)
    assert own == image("same", "--lora", adapter, "--steps", 2, "--guidance-scale", 1)
    assert own != image("more", "--lora", adapter, "--steps", 4)
    assert own == image("exported", "--lora", tmp_path / "exported")
    assert own == image("original", "--lora", tmp_path / "original")
    echo4o(
        "generate",
        "--like",
        tmp_path / "own.png",
        "--lora",
        adapter,
        "--model",
        model_folder,
        "-o",
        tmp_path / "a.png",
    )
    assert PILImage.open(tmp_path / "a.png").tobytes() == own


def test_merging_would_lose_the_preset(distill_file, tmp_path):
    from typer.testing import CliRunner

    from echo4o.cli import app

    assert train_here(distill_file(checkpoints={"every": 4})) == 0
    for more in ([], ["--step", "4"]):
        given = ["export", str(tmp_path / "run"), "--merge", "--out", str(tmp_path / "merged"), *more]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 2 and "--merge would lose the preset of a few-step adapter" in done.output


def test_images_of_a_run_are_generated_by_the_preset(distill_file, tmp_path):
    images = {"every": 4, "prompts": ["a red square"], "validation_rows": 1}
    assert train_here(distill_file(images=images, validation={"every": 4, "share": 0.3})) == 0
    (folder,) = (tmp_path / "run" / "images").glob("step-*")
    assert read_metadata(folder / "0.png").settings == {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
    }


def test_a_server_and_an_evaluation_use_the_preset(distill_file, tmp_path, model_folder):
    from echo4o.evaluation.generate import GenerationSettings, describe_model
    from echo4o.modeling.pipelines import pipeline_class
    from echo4o.serving.served_model import ServedModel

    assert train_here(distill_file(steps=2)) == 0
    pipe = pipeline_class(model_folder).from_pretrained(model_folder)
    pipe.load_lora_weights(tmp_path / "run" / "adapter", adapter_name="fast")
    served = ServedModel(pipe, adapters=(("fast", 1.0),))
    assert served.default_settings(False, served.default_adapters)["num_inference_steps"] == 2
    described = describe_model(pipe, GenerationSettings(str(model_folder), adapter=str(tmp_path / "run" / "adapter")))
    assert described["steps"] == 2 and set(described["guidance"].values()) == {1.0}


# --- another backbone -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_omnigen2_goes_through_the_same_seam(tmp_path):
    """Without guidance and with one update for each segment, the model itself is the exact student here as well."""
    from echo4o.training.backbones.omnigen2 import OmniGen2Backbone
    from echo4o.training.backbones.omnigen2_recipe import OmniGen2Recipe
    from tests.modeling.omnigen2_models import golden_pipeline

    pipe = golden_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    prompt_rows(4).save_to_disk(tmp_path / "prompts")
    options = ["--height", 64, "--width", 64, "--set", "guidance_scale=1.0"]
    out = make_trajectories(tmp_path / "prompts", tmp_path / "model", tmp_path / "out", *options)
    values = {"backbone": "omnigen2", "model": str(tmp_path / "model"), "output_dir": tmp_path / "run", "steps": 2}
    values |= {"data": {"path": str(tmp_path / "prompts")}, "batch_size": 2, "device": "cpu"}
    values |= {"tune": {"method": "lora", "rank": 4, "alpha": 4}, "distill": {"teacher": out, "steps": 4}}
    recipe = OmniGen2Recipe.model_validate(values)
    backbone = OmniGen2Backbone(pipe, recipe)
    pipe.transformer.eval()
    rows = DistilledRows(backbone, recipe)
    for prepared in rows.prepare(list(prompt_rows(4))):
        for sample in rows.validation_samples(prepared, rows.noise_levels(None)):
            with torch.no_grad():
                loss = backbone.losses(pipe, backbone.collate([sample]))["mse"].values.mean()
            assert loss < 1e-5, (prepared.id, sample.raw_time)
    result = Trainer(recipe, pipe).run()
    stored = read_adapter(result.pipeline_dir / DIFFUSERS_FILE)[1]["sampling_preset"]
    assert stored == {"num_inference_steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "shift": None}
    again = golden_pipeline()
    again.load_lora_weights(result.pipeline_dir)
    again("a red square", height=32, width=32, output_type="latent")
    assert again.num_timesteps == 4


def test_a_backbone_without_the_seam_says_so(tmp_path, tiny_pipeline):
    from echo4o.training.backbones.base import Backbone

    with pytest.raises(ValueError, match="backbone bagel cannot be distilled"):
        Backbone.conditions(make_backbone(tiny_pipeline), {})
