"""A tiny random BAGEL and a few rows of the dataset's form."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

CHECKPOINT = Path(__file__).parents[1] / "parity" / "golden" / "checkpoint"
COLOURS = ("red", "green", "blue", "yellow")


def picture(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4), colour)
    return image


def row(index: int, references: int = 0, size: tuple[int, int] = (64, 64)) -> dict:
    """A row with the dataset's features, pictures decoded."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "id": f"row-{index}",
        "instruction": f"a {colour} square",
        "task": "multi_reference" if references else "text_to_image",
        "category": "test",
        "reference_images": [picture(COLOURS[(index + 1 + r) % 4], (64, 32)) for r in range(references)],
        "image": picture(colour, size),
        "source": "test",
        "metadata": None,
    }


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost these sizes more than they give, the more so beside other test workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_pipeline():
    """The golden checkpoint's model, float32, for pictures of at most 64 pixels."""
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline

    return Echo4oPipeline.from_original(
        CHECKPOINT,
        dtype=torch.float32,
        vae_image_limits={"max_size": 64, "min_size": 32},
        vision_image_limits={"max_size": 56, "min_size": 28},
    )


@pytest.fixture
def rows():
    """Eight rows of mixed sizes; every second has one or two references. Order as in a `datasets.Dataset`."""
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    names = ("id", "instruction", "task", "category", "source", "metadata")
    features = Features({**{n: text for n in names}, "reference_images": List(Image()), "image": Image()})
    made = [row(i, references=(0, 1, 0, 2)[i % 4], size=((64, 64), (64, 32))[i % 2]) for i in range(8)]
    return Dataset.from_list(made, features=features)
