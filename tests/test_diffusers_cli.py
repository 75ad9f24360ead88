"""diffusers' own command works on our folders, with their code and without importing echo4o."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ARTEFACTS = Path(__file__).parent / "artefacts_0_1"
pytest.importorskip("diffusers.commands.run", reason="this version of diffusers has no `diffusers-cli run`")


def run(out: Path, *options: str, **call) -> Image.Image:
    """An image that `diffusers-cli run` generates with the artefacts' pipeline."""
    arguments = json.dumps({"prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 2} | call)
    command = [sys.executable, "-m", "diffusers.commands.diffusers_cli", "run", "-m", str(ARTEFACTS / "pipeline")]
    command += ["--trust-remote-code", "--device-map", "cpu", "--seed", "1", "--pipeline-kwargs", arguments]
    done = subprocess.run([*command, "--output", str(out), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return Image.open(out)


@pytest.mark.long
def test_generate_edit_and_adapter(tmp_path):
    image = run(tmp_path / "a.png")
    assert image.size == (32, 32)
    assert run(tmp_path / "again.png").tobytes() == image.tobytes(), "the seed decides"
    assert run(tmp_path / "edited.png", image=str(tmp_path / "a.png")).tobytes() != image.tobytes()
    adapter = json.dumps({"lora_id": str(ARTEFACTS / "adapters" / "diffusers")})
    assert run(tmp_path / "adapted.png", "--lora", adapter).tobytes() != image.tobytes()
