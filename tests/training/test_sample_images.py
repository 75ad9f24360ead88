"""Images during training: with references, beside targets, the same for any number of processes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o.common.image_metadata import read_metadata
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline

from .conftest import picture
from .running import torchrun, train_here
from .test_validation import two_splits, with_split  # noqa: F401


@pytest.fixture
def images(tmp_path):
    picture("green", (64, 32)).save(tmp_path / "green.png")
    edit = {"prompt": "a blue square", "references": [str(tmp_path / "green.png")], "seed": 5}
    return {"every": 2, "steps": 2, "prompts": ["a red square", edit], "validation_rows": 2, "seed": 3}


def pixels(folder, step=4):
    folder = folder / "images" / f"step-{step:08d}"
    return [np.asarray(Image.open(folder / f"{index}.png")).astype(int) for index in range(4)]


@pytest.mark.long
def test_references_and_validation_rows_are_generated_and_shown(recipe_file, two_splits, tmp_path, images):  # noqa: F811
    assert train_here(recipe_file(**with_split(two_splits, images=images))) == 0
    pipe = Echo4oPipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.float32)
    inputs = json.loads((tmp_path / "run" / "images" / "inputs.json").read_text())
    assert [len(entry["references"]) for entry in inputs[:2]] == [0, 1] and all(e["target"] for e in inputs[2:])
    for index, (entry, shown) in enumerate(zip(inputs, pixels(tmp_path / "run"))):
        references = [Image.open(tmp_path / "run" / "images" / name) for name in entry["references"]]
        generator = torch.Generator().manual_seed(5 if index == 1 else 3 + index)
        again = pipe(entry["text"], image=references or None, num_inference_steps=2, generator=generator).images[0]
        assert np.abs(np.asarray(again).astype(int) - shown).max() <= 1
    stored = read_metadata(tmp_path / "run" / "images" / "step-00000004" / "1.png")
    assert (stored.prompt, stored.seeds, stored.model) == ("a blue square", (5,), "pipeline")
    assert stored.revision == "run, step 4" and len(stored.references) == 1
    page = (tmp_path / "run" / "run.html").read_text()
    assert page.count('alt="target"') == 2 and page.count('alt="reference"') >= 1
    assert "<td>2</td>" in page and "<td>4</td>" in page


@pytest.mark.long
def test_the_same_images_for_two_processes_and_sharded_weights(recipe_file, two_splits, tmp_path, images):  # noqa: F811
    file = recipe_file("one", **with_split(two_splits, images=images, ema={"decay": 0.5}))
    assert train_here(file) == 0
    runs = []
    for kind in ("none", "fsdp2"):
        runs += ["--", file, "--set", f"sharding={kind}", "--set", f"output_dir={tmp_path / kind}"]
    torchrun(2, "tests.training.force_fsdp2", *runs[1:])
    for kind in ("none", "fsdp2"):
        for step in (2, 4):
            for one, two in zip(pixels(tmp_path / "one", step), pixels(tmp_path / kind, step)):
                assert np.abs(one - two).max() <= 1, kind
    assert json.loads((tmp_path / "fsdp2" / "sharded-0.json").read_text())["sharded"] > 100


@pytest.mark.parametrize(
    "change, told",
    [
        ({"prompts": [{"prompt": "a", "references": ["nowhere.png"]}]}, "images.prompts.0.references: nowhere.png"),
        ({"prompts": [], "validation_rows": 0}, "give `prompts`, or a number of `validation_rows`"),
        ({"prompts": [], "validation_rows": 2}, "images.validation_rows needs a validation section"),
        ({"prompts": [{"prompt": "a", "reference": []}]}, "images.prompts.0"),
    ],
)
def test_settings_that_cannot_generate(recipe_file, capsys, change, told):
    assert train_here(recipe_file(images={"every": 2} | change)) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
