"""LoRA adapters through the server: loaded once, selected by each request, with its scale."""

import base64
import io
import shutil
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")

import numpy as np
import openai
from PIL import Image

from echo4o.cli.generate_options import Adapter, ModelOptions
from echo4o.cli.models import Dtype
from echo4o.common.image_metadata import read_metadata
from echo4o.modeling.common.adapter_presets import SamplingPreset
from echo4o.modeling.common.lora_files import DIFFUSERS_FILE, read_adapter, write_adapter
from tests.serving.running import BASE, load_tiny, serving

PROMPT = "a photo of a red circle"


@pytest.fixture(scope="module")
def server(adapter_folders):
    """As `echo4o serve --lora warm=... --lora cold=...:0.5` starts it."""
    import torch

    from echo4o.cli.serve import load_served

    adapters = [
        Adapter("warm", str(adapter_folders / "warm"), 1.0),
        Adapter("cold", str(adapter_folders / "cold"), 0.5),
    ]
    loading = ModelOptions(dtype=Dtype.float32)
    with serving(load_served(str(BASE), "echo4o", torch.device("cpu"), loading, adapters)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client().with_options(timeout=600)


def generate(client, **fields):
    body = {"steps": 3, "seed": 5} | fields
    return client.images.generate(model="echo4o", prompt=PROMPT, extra_body=body).data[0]


def pixels(entry) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry.b64_json))), dtype=int)


def difference(a, b) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


def direct(adapter_folders, **scales: float) -> np.ndarray:
    """The image of a pipeline that has only these adapters."""
    import torch

    pipe = load_tiny()
    for name in scales:
        pipe.load_lora_weights(adapter_folders / name, adapter_name=name)
    if scales:
        pipe.set_adapters(list(scales), list(scales.values()))
    image = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
    return np.asarray(image, dtype=int)


@pytest.mark.long
def test_a_request_selects_adapters_and_scales(client, adapter_folders, tmp_path):
    (model,) = client.models.list().data
    assert model.model_extra["adapters"] == ["cold", "warm"]
    assert model.model_extra["default_adapters"] == [
        {"name": "warm", "scale": 1.0},
        {"name": "cold", "scale": 0.5},
    ]
    wanted = {
        "default": ({}, {"warm": 1.0, "cold": 0.5}),
        "one": ({"adapter": "warm"}, {"warm": 1.0}),
        "scaled": ({"adapter": "cold", "adapter_scale": 0.7}, {"cold": 0.7}),
        "both": ({"adapter": ["cold", "warm"], "adapter_scale": [0.2, 0.3]}, {"cold": 0.2, "warm": 0.3}),
        "none": ({"adapter": "none"}, {}),
    }
    entries = {name: generate(client, **fields) for name, (fields, _) in wanted.items()}
    for name, (_, scales) in wanted.items():
        assert np.abs(pixels(entries[name]) - direct(adapter_folders, **scales)).max() <= 1, name
        listed = [{"name": each, "scale": scale} for each, scale in scales.items()]
        assert entries[name].model_extra["settings"]["adapters"] == listed
    assert difference(entries["one"], entries["none"]) > 8
    assert difference(entries["one"], entries["scaled"]) > 8
    file = tmp_path / "scaled.png"
    file.write_bytes(base64.b64decode(entries["scaled"].b64_json))
    (stored,) = read_metadata(file).adapters
    assert stored["name"] == "cold" and stored["scale"] == 0.7 and stored["revision"] != "unknown"
    with pytest.raises(openai.BadRequestError, match="'hot' is not loaded; this server has cold, warm"):
        generate(client, adapter="hot")


@pytest.mark.long
def test_requests_with_different_adapters_that_wait_together_equal_single_ones(server, client):
    fields = [{"adapter": "warm"}, {"adapter": "cold"}, {"adapter": "none"}, {"adapter": "warm", "adapter_scale": 0.5}]
    fields = [each | {"seed": seed} for seed, each in enumerate(fields)] + [{"adapter": "cold", "seed": 9}]
    alone = [generate(client, **each) for each in fields]
    together: list = [None] * len(fields)

    def ask(index: int) -> None:
        together[index] = generate(client, **fields[index])

    engine, model, release = server.engine, server.engine.model, threading.Event()
    before = engine.metrics.batch_sizes
    (blocker,) = model.image_tasks([PROMPT], options=model.read_options({"steps": 2}))
    blocker.on_event = lambda event: release.wait()
    engine.submit([blocker])
    while not engine.running:
        time.sleep(0.001)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(fields))]
    for thread in threads:
        thread.start()
    while engine.waiting < len(fields):
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert server.engine.metrics.batch_sizes.get(2, 0) == before.get(2, 0) + 1, (
        "those with equal adapters run together"
    )
    assert all(difference(one, other) <= 2 for one, other in zip(alone, together, strict=True))


def test_few_step_adapters_set_the_sampling_of_the_requests_that_select_them(adapter_folders, tmp_path):
    import torch

    from echo4o.cli.serve import load_served

    adapters = []
    for name, source, preset in (
        ("fast", "warm", SamplingPreset(2, shift=3.0)),
        ("faster", "cold", SamplingPreset(1, shift=3.0)),
    ):
        folder = shutil.copytree(adapter_folders / source, tmp_path / name)
        state, settings = read_adapter(folder / DIFFUSERS_FILE)
        write_adapter(folder / DIFFUSERS_FILE, state, settings, preset)
        adapters.append(Adapter(name, str(folder), 0.0 if name == "faster" else 1.0))
    model = load_served(str(BASE), "echo4o", torch.device("cpu"), ModelOptions(dtype=Dtype.float32), adapters)

    def settings_of(names, **options) -> tuple:
        tasks = model.image_tasks(
            [PROMPT], seed=5, options=model.read_options(options), adapters=model.read_adapters(names, None)
        )
        (image,) = model.generate(tasks)
        return image.settings["num_inference_steps"], image.settings["guidance_scale"], model.pipe.num_timesteps

    of_checkpoint = model.pipe.config.presets["text_to_image"]["guidance_scale"]
    assert of_checkpoint != 1
    assert settings_of(None) == (2, 1.0, 2)
    assert settings_of("faster") == (1, 1.0, 1)
    assert settings_of("fast", steps=3, guidance_scale=2.0) == (3, 2.0, 3)
    assert settings_of("none", steps=3) == (3, of_checkpoint, 3)
    with pytest.raises(ValueError, match="'fast' .* and 'faster' .* need different sampling"):
        model.read_adapters(["fast", "faster"], None)
