"""A pipeline folder and a loopback Hub for the tests of `echo4o push`."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from echo4o.hub.push import push
from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.testing.hub import LoopbackHub

REPO = "ns/model"
CHECKPOINT = Path(__file__).parent / "parity" / "golden" / "checkpoint"
FAKE = {  # put together here, so that this file holds none
    "a Hugging Face token": "hf_" + "aB3" * 12,
    "an OpenAI or similar API key": "sk-" + "proj-" + "x9" * 15,
    "an AWS access key": "AKIA" + "ABCDEFGHIJKLMNOP",
    "a GitHub token": "ghp_" + "a1" * 18,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a Google API key": "AI" + "za" + "Sy4_-x9" * 5,
    "an Azure key": "aB3" * 17 + "x" + "JQ" + "QJ99BCACYeBjFXJ3w3AAABACOGabcd",
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return HfApi(endpoint=hub.url, token=hub.token)


def send(folder, api, repo: str = REPO, **options):
    return push(folder, repo, api=api, pause=0.001, **{"verify": False, **options})


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
