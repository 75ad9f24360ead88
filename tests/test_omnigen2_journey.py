"""OmniGen2 by the command line: convert, train an adapter on Shapes-4o, export, evaluate, publish, load on a bare machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.benchmark import rows_of
from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream
from echo4o.testing.hub import LoopbackHub
from echo4o.testing.processes import run_script
from tests.modeling.omnigen2_models import CHECKPOINT

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

SETTINGS = {
    "mixed_precision": "no",
    "device": "cpu",
    "steps": 12,
    "optimizer.lr": 0.02,
    "optimizer.warmup_steps": 1,
    "packing.tokens": 400,
    "packing.packs_per_step": 2,
    "checkpoints.every": 6,
    "objective.max_output_pixels": 4096,
    "objective.max_input_pixels": "[4096, 1024]",
    "objective.max_side_length": 64,
}
BARE = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
(target,) = sys.argv[1:]
try:
    import echo4o
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")
pipe = DiffusionPipeline.from_pretrained("owner/omnigen2", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)

def draw():
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images

before = draw()
pipe.load_lora_weights("owner/omnigen2-lora")
np.savez(target, before=before, after=draw())
"""


def settings(**changes) -> list[str]:
    return [part for key, value in (SETTINGS | changes).items() for part in ("--set", f"{key}={value}")]


class Machine:
    """A folder and a Hub in which commands run."""

    def __init__(self, root: Path, hub: LoopbackHub):
        self.root, self.hub = root, hub
        for home in ("home", "bare"):
            (root / home).mkdir()

    def echo4o(self, *arguments) -> str:
        environment = self.hub.environment(self.root / "home") | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "echo4o", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.root, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    root = tmp_path_factory.mktemp("journey")
    with LoopbackHub(user="owner") as hub:
        machine = Machine(root, hub)
        machine.echo4o("convert", CHECKPOINT, "omnigen2")
        rows = {"surreal_fantasy": 4, "multi_reference": 4, "instruction_following": 4}
        render_upstream(root / "upstream", rows, 0, "prompt")
        machine.echo4o("dataset", "build", "upstream", "--out", "rows")
        changes = {"model": "omnigen2", "data.path": "rows", "output_dir": "run"}
        machine.echo4o("train", "omnigen2_lora_single_gpu", *settings(**changes))
        yield machine


def test_the_adapter_changes_images(machine):
    draw = ["a red circle", "--height", 64, "--width", 64, "--steps", 2, "--seed", 0]
    machine.echo4o("generate", *draw, "--model", "omnigen2", "--out", "before.png")
    machine.echo4o("export", "run", "--merge", "--out", "merged")
    machine.echo4o("generate", *draw, "--model", "merged", "--out", "after.png")
    before, after = (np.asarray(Image.open(machine.root / f"{name}.png")).astype(int) for name in ("before", "after"))
    assert before.shape == (64, 64, 3) and np.abs(before - after).mean() > 1


def test_shapes4o_is_evaluated_with_the_adapter(machine):
    rows = rows_of(held_out_prompts()[:4])
    (machine.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = ["--prompts", "prompts.jsonl", "--judge", "pixels", "--steps", 2, "--height", 64, "--width", 64]
    adapter = ["--adapter", "run/adapter"]
    machine.echo4o("evaluate", "shapes4o", "--model", "omnigen2", *adapter, *options, "--out", "scores")
    described = json.loads((machine.root / "scores/generation.json").read_text())
    assert described["guidance"]["text_to_image"] == 4.0 and described["adapter"] == "run/adapter"
    assert json.loads((machine.root / "scores/result.json").read_text())["coverage"] == 1.0
    assert len(list((machine.root / "scores/images").glob("*.png"))) == 4


def test_the_pipeline_and_the_adapter_are_published_and_loaded_without_the_package(machine):
    machine.echo4o("push", "omnigen2", "owner/omnigen2")
    machine.echo4o("push", "run", "owner/omnigen2-lora", "--base-model", "owner/omnigen2")
    cards = [
        machine.hub.repo(name).files["README.md"].data.decode() for name in ("owner/omnigen2", "owner/omnigen2-lora")
    ]
    assert all("OmniGen2" in card and "BAGEL" not in card for card in cards)
    environment = machine.hub.environment(machine.root / "bare")
    run_script(BARE, machine.root / "drawn.npz", env=environment, hide=["echo4o"])
    drawn = np.load(machine.root / "drawn.npz")
    assert np.abs(drawn["before"] - drawn["after"]).max() > 1e-3
