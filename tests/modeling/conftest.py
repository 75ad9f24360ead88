"""A tiny BAGEL with the golden weights, for every test of the model."""

from pathlib import Path

import pytest
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"


@pytest.fixture(scope="session")
def pipe():
    """The golden checkpoint with the golden picture limits; tests leave it as they found it."""
    from echo4o import Echo4oPipeline

    pipe = Echo4oPipeline.from_original(
        GOLDEN / "checkpoint",
        vae_image_limits={"max_size": 64, "min_size": 32},
        vision_image_limits={"max_size": 56, "min_size": 28},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image.Image]:
    """The golden pictures by name: img_a (91x52), img_b (40x77), img_c (80x48), img_d (33x33)."""
    return {path.stem: Image.open(path).convert("RGB") for path in sorted((GOLDEN / "inputs").glob("*.png"))}


@pytest.fixture
def fresh():
    """A function that returns a new pipeline, for tests that change it."""
    from echo4o import Echo4oPipeline

    def make():
        pipe = Echo4oPipeline.from_original(
            GOLDEN / "checkpoint",
            vae_image_limits={"max_size": 64, "min_size": 32},
            vision_image_limits={"max_size": 56, "min_size": 28},
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def adapters(fresh, tmp_path):
    """A function that saves an adapter of random weights and returns its folder: by expert, seed, options."""

    import torch

    from tests.modeling.lora_adapters import config

    def make(expert="gen", seed=0, **options):
        pipe = fresh()
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config(expert=expert, **options))
        folder = tmp_path / f"{expert}-{seed}"
        pipe.save_lora_adapter(folder)
        return folder

    return make
