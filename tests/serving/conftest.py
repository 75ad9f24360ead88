"""The quickstart's model behind a server, once for all tests of this folder."""

import pytest

from tests.serving.running import load_tiny, serving


@pytest.fixture(scope="package")
def tiny():
    """The pipeline; tests leave it as they found it."""
    return load_tiny()


@pytest.fixture(scope="package")
def server(tiny):
    from echo4o.serving.served_model import ServedModel

    with serving(ServedModel(tiny)) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="package")
def adapter_folders(tmp_path_factory):
    """Two adapters for the quickstart's model, `warm` and `cold`, with random weights that change its images."""
    import torch
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_tiny()
    torch.manual_seed(0)
    for name in ("warm", "cold"):
        targets = type(pipe.transformer)._lora_targets["gen"]
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        pipe.transformer.add_adapter(config, name)
        pipe.save_lora_adapter(folder / name, name)
    return folder
