"""A tiny random BAGEL and a few rows of the dataset's form."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
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
def own_environment():
    """Accelerate keeps settings in the environment and in a shared state: no test may inherit another's."""
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost these sizes more than they give, the more so beside other test workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def forgotten_engine():
    """Accelerate remembers a process's first settings; a run of the command line has a process of its own."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_pipeline():
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline

    return Echo4oPipeline.from_original(
        CHECKPOINT,
        dtype=torch.float32,
        vae_image_limits={"max_size": 64, "min_size": 32},
        vision_image_limits={"max_size": 56, "min_size": 28},
    )


def make_backbone(pipeline, seed: int = 0, tune: dict | None = None, **objective):
    """The pipeline as a backbone, without dropout of conditions unless `objective` says otherwise."""
    from echo4o.training.backbones.bagel import BagelBackbone, BagelRecipe

    values = {"model": "unused", "output_dir": "unused", "data": {"path": "unused"}, "steps": 1, "batch_size": 1}
    never = {"text_dropout": 0, "vit_dropout": 0, "vae_dropout": 0}
    values |= {"seed": seed, "tune": tune or {"method": "full"}, "objective": never | objective}
    return BagelBackbone(pipeline, BagelRecipe.model_validate(values))


def make_rows(questions: int = 0):
    from datasets import Dataset, Features, Image, List, Value

    names = ("id", "instruction", "task", "category", "source", "metadata", *(["answer"] if questions else []))
    features = Features({n: Value("string") for n in names} | {"reference_images": List(Image()), "image": Image()})
    made = [row(i, references=(0, 1, 0, 2)[i % 4], size=((64, 64), (64, 32))[i % 2]) for i in range(8)]
    for i in range(questions):
        asked = {
            "id": f"question-{i}",
            "instruction": "what is it?",
            "image": None,
            "answer": f"a {COLOURS[i]} square",
        }
        made.append(row(i, references=1) | asked)
    return Dataset.from_list([{"answer": None} | r if questions else r for r in made], features=features)


@pytest.fixture
def tiny_pipeline():
    """The golden checkpoint's model, float32, for pictures of at most 64 pixels."""
    return make_pipeline()


@pytest.fixture
def rows():
    """Eight rows of mixed sizes; every second has one or two references. Order as in a `datasets.Dataset`."""
    return make_rows()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The tiny pipeline as a folder, for runs by the command line."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory):
    """The rows as a folder saved by `datasets`, with two questions about pictures among them."""
    folder = tmp_path_factory.mktemp("data") / "rows"
    make_rows(questions=2).save_to_disk(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path, model_folder, rows_folder):
    """Writes a recipe for a short run and returns its path: `recipe_file(name, **changes)`."""
    import yaml

    def write(name: str = "run", **changes) -> Path:
        values = {
            "model": str(model_folder),
            "output_dir": str(tmp_path / name),
            "data": {"path": str(rows_folder)},
            "optimizer": {"lr": 1e-3, "warmup_steps": 1, "schedule": "linear"},
            "steps": 4,
            "batch_size": 2,
            "device": "cpu",
            "save_dtype": "float32",
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
        return file

    return write
