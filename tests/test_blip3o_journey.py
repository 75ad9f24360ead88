"""BLIP3-o from the original's layout to the Hub: convert, precompute, train on Shapes-4o, generate, evaluate, push."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from echo4o.dataset_scripts.build import build
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream
from echo4o.modeling.blip3o.pipeline_blip3o import Blip3oPipeline
from echo4o.modeling.pipelines import pipeline_class
from echo4o.testing.processes import run_script
from tests.push_fixtures import REPO, names, send
from tests.training.running import log_of, run

pytest_plugins = ["tests.push_fixtures"]
CHECKPOINT = Path(__file__).parent / "parity" / "golden_blip3o" / "checkpoint"
CIRCLES = {"class": "circle", "color": "red"}
LOAD = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
images = pipe("a red circle", height=32, width=32, num_inference_steps=1, feature_steps=1).images
assert images[0].size == (32, 32)
"""


def features(pipe) -> np.ndarray:
    import torch

    pipe.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "feature_steps": 3, "output_type": "features"}
    return pipe("a red circle", **options).images.float().numpy()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_head_trained_on_shapes_reaches_the_hub(tmp_path, hub, api):
    render_upstream(tmp_path / "upstream", {"surreal_fantasy": 4, "instruction_following": 4})
    build(str(tmp_path / "upstream"), tmp_path / "rows")
    run("convert", CHECKPOINT, tmp_path / "base")
    run("dataset", "precompute", tmp_path / "rows", "--model", tmp_path / "base", "--out", tmp_path / "latents")
    recipe = {
        "backbone": "blip3o",
        "model": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "rows")},
        "latents": str(tmp_path / "latents"),
        "optimizer": {"lr": 3e-3},
        "batch_size": 4,
        "steps": 10,
        "device": "cpu",
        "save_dtype": "float32",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("train", tmp_path / "recipe.yaml")
    losses = [entry["loss"] for entry in log_of(tmp_path / "run")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])

    trained = tmp_path / "run" / "pipeline"
    assert pipeline_class(trained) is Blip3oPipeline
    before, after = (features(Blip3oPipeline.from_pretrained(folder)) for folder in (tmp_path / "base", trained))
    assert np.abs(after - before).max() > 1e-2
    sampling = ["--steps", 2, "--height", 64, "--width", 64]
    run("generate", "a red circle", "--model", trained, "--out", tmp_path / "image.png", *sampling)
    assert Image.open(tmp_path / "image.png").size == (64, 64)
    evaluated, prompts = tmp_path / "evaluated", tmp_path / "prompts.jsonl"
    rows = [{"tag": "counting", "prompt": f"{n} red circles", "include": [CIRCLES | {"count": n}]} for n in (1, 2)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", trained, "--judge", "pixels", "--prompts", prompts, "--out", evaluated, *sampling]
    run("evaluate", "shapes4o", *options)
    assert json.loads((evaluated / "result.json").read_text())["also"]["overall_accuracy"] >= 0

    done = send(trained, api, verify=True)
    assert done.verified.endswith("it loads") and set(hub.repo(REPO).files) == names(trained) | {"README.md"}
    card = hub.repo(REPO).files["README.md"].data.decode()
    assert "license: openrail++" in card and "Qwen research license (not for commercial use)" in card
    (tmp_path / "home").mkdir()
    run_script(LOAD, REPO, env=hub.environment(tmp_path / "home"), hide=["echo4o"])
