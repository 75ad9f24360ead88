"""Pictures do not depend on how the work is shared, and no picture is drawn twice."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from echo4o.common.locks import FolderLock
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.prompt_files import read_prompts
from echo4o.evaluation.generate import GenerationSettings, generate_images, image_seed


class Drawer:
    """A pipeline whose pictures show what it was given: the generator's seed and the batch's size."""

    config = {"presets": {"text_to_image": {"guidance_scale": 4.0, "image_guidance_scale": 1.0}}}
    dtype = "torch.float32"

    def __init__(self):
        self.prompts, self.options = [], []

    def __call__(self, prompt, generator, image=None, num_images_per_prompt=1, num_inference_steps=49, **options):
        self.prompts += prompt
        self.options.append(options | {"image": image, "num_inference_steps": num_inference_steps})
        seeds = [one.initial_seed() for one in generator]
        assert len(seeds) == len(prompt) * num_images_per_prompt
        return SimpleNamespace(
            images=[Image.new("RGB", (8, 8), (s % 256, s // 256 % 256, len(prompt))) for s in seeds]
        )


def process(index: int, number: int):
    return SimpleNamespace(
        process_index=index, num_processes=number, is_main_process=index == 0, wait_for_everyone=lambda: None
    )


def draw(prompts, out, settings=None, processes=1):
    drawers = [Drawer() for _ in range(processes)]
    for index, drawer in enumerate(drawers):
        state = process(index, processes)
        generate_images(prompts, settings or GenerationSettings("model"), out, lambda drawer=drawer: drawer, state)
    return drawers


def pictures(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "images").iterdir()}


@pytest.fixture
def eight(prompts):
    return read_prompts(get_benchmark("genevalpp"), prompts)


@pytest.mark.parametrize("processes", [2, 3, 11])
def test_the_number_of_processes_changes_nothing(processes, eight, tmp_path):
    settings = GenerationSettings("model", per_prompt=2, batch_size=3)
    draw(eight, tmp_path / "one", settings)
    drawers = draw(eight, tmp_path / "many", settings, processes)
    assert pictures(tmp_path / "one") == pictures(tmp_path / "many")
    assert len(pictures(tmp_path / "one")) == 16
    assert sorted(text for drawer in drawers for text in drawer.prompts) == sorted(prompt.text for prompt in eight)


def test_each_image_has_a_seed_of_its_own():
    seeds = {image_seed(seed, name, number) for seed in (0, 1) for name in ("1", "11", "1_1") for number in (1, 11)}
    assert len(seeds) == 12
    assert image_seed(0, "1", 1) == image_seed(0, "1", 1)


def test_a_second_run_generates_only_missing_or_broken_images(eight, tmp_path):
    draw(eight, tmp_path)
    before = pictures(tmp_path)
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "5.png").write_bytes(before["5.png"][:30])
    (drawer,) = draw(eight, tmp_path)
    assert drawer.prompts == [eight[2].text, eight[4].text]
    assert pictures(tmp_path) == before
    (drawer,) = draw(eight, tmp_path)
    assert drawer.prompts == []


def test_a_broken_batch_is_generated_as_a_batch(eight, tmp_path):
    settings = GenerationSettings("model", batch_size=4)
    draw(eight, tmp_path, settings)
    before = pictures(tmp_path)
    (tmp_path / "images" / "2.png").unlink()
    (drawer,) = draw(eight, tmp_path, settings)
    assert len(drawer.prompts) == 4
    assert pictures(tmp_path) == before


def test_two_processes_do_not_generate_into_one_folder(eight, tmp_path):
    with FolderLock(tmp_path / "out"), pytest.raises(ValueError, match="out is in use by another process"):
        draw(eight, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    draw(eight, tmp_path / "out")


def test_other_settings_need_another_folder(eight, tmp_path):
    draw(eight, tmp_path, GenerationSettings("model", steps=3))
    draw(eight, tmp_path, GenerationSettings("model", steps=3))
    with pytest.raises(ValueError, match="generated with steps 3, not 4: use another --out"):
        draw(eight, tmp_path, GenerationSettings("model", steps=4))
    with pytest.raises(ValueError, match="generated with seed 0, not 1"):
        draw(eight, tmp_path, GenerationSettings("model", steps=3, seed=1))


def test_everything_that_images_depend_on_is_recorded(eight, tmp_path):
    (drawer,) = draw(eight, tmp_path, GenerationSettings("model", guidance=3.0, height=64))
    assert drawer.options[0] == {
        "guidance_scale": 3.0, "height": 64, "image": None, "num_inference_steps": 49,
    }  # fmt: skip
    written = json.loads((tmp_path / "generation.json").read_text())
    assert written["guidance"] == 3.0
    assert written["image_guidance"] == {"text_to_image": 1.0}
    assert (written["steps"], written["dtype"], written["seed"]) == (49, "float32", 0)


def test_references_reach_the_model(tmp_path):
    Image.new("RGB", (9, 5)).save(tmp_path / "cat.png")
    row = {"key": "k1", "task_type": "single_object", "instruction": "the cat", "input_images": ["cat.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    prompts = read_prompts(get_benchmark("omnicontext"), tmp_path / "rows.jsonl")
    (drawer,) = draw(prompts, tmp_path / "out")
    assert [picture.size for picture in drawer.options[0]["image"][0]] == [(9, 5)]
    assert (tmp_path / "out" / "images" / "k1.png").is_file()


@pytest.mark.long
def test_two_real_processes_generate_what_one_generates(tmp_path, prompts):
    """The golden model under torchrun: two gloo processes, and one, give the same bytes."""
    import subprocess
    import sys

    from tests.evaluation.conftest import ROOT

    checkpoint = ROOT / "tests" / "parity" / "golden" / "checkpoint"
    command = ["echo4o", "evaluate", "generate", "genevalpp", "--model", str(checkpoint), "--prompts", str(prompts)]
    command += ["--limit", "4", "--steps", "1", "--height", "32", "--width", "32", "--device", "cpu", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    for number, start in ((1, [sys.executable, "-m"]), (2, launch)):
        done = subprocess.run([*start, *command, str(tmp_path / str(number))], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = pictures(tmp_path / "1"), pictures(tmp_path / "2")
    assert len(one) == 4 and one == two
