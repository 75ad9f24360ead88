"""Conversion, both ways of loading, and the memory plan refuse the same checkpoints, with the same words."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from echo4o.modeling.pipelines import original_class, pipeline_class
from echo4o.planning.generation_memory import read_stored
from tests.modeling.blip3o.conftest import CHECKPOINT as BLIP3O
from tests.modeling.checkpoints import CHECKPOINT as BAGEL
from tests.modeling.checkpoints import shard, stored
from tests.modeling.omnigen2_models import CHECKPOINT as OMNIGEN2

ORIGINALS = {"bagel": BAGEL, "omnigen2": OMNIGEN2, "blip3o": BLIP3O}
TOKENIZER = {"bagel": "", "omnigen2": "processor", "blip3o": ""}  # folder of the tokenizer in the original layout
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
STEM = "diffusion_pytorch_model"
REFUSALS = (ValueError, FileNotFoundError)
pytestmark = pytest.mark.long


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    for path in (target, *target.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    return target


@pytest.fixture(scope="module", params=ORIGINALS)
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def converted(backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(backbone) / "pipeline"
    original_class(ORIGINALS[backbone]).conversion().convert_to_diffusers(ORIGINALS[backbone], folder)
    return folder


def original_refused(source: Path, backbone: str, words: str) -> None:
    cls, target = original_class(ORIGINALS[backbone]), source.parent / "target"
    for door in (lambda: cls.conversion().convert_to_diffusers(source, target), lambda: cls.from_original(source)):
        with pytest.raises(REFUSALS, match=words):
            door()
        assert not target.exists()


def pipeline_refused(folder: Path, words: str, back: bool = False) -> None:
    cls = pipeline_class(folder)
    doors = [lambda: cls.from_pretrained(folder), lambda: read_stored(str(folder))]
    if back:
        doors.append(lambda: cls.conversion().convert_to_original(folder, folder.parent / "back"))
    for door in doors:
        with pytest.raises(REFUSALS, match=words):
            door()


def accepted(source: Path, backbone: str) -> Path:
    """Convert, load and plan a checkpoint in the original layout; returns the pipeline folder."""
    cls, target = original_class(ORIGINALS[backbone]), source.parent / "target"
    cls.conversion().convert_to_diffusers(source, target)
    direct, loaded = cls.from_original(source), cls.from_pretrained(target)
    assert direct.tokenizer("a red dot").input_ids == loaded.tokenizer("a red dot").input_ids
    read_stored(str(target))
    return target


# --- tokenizers --------------------------------------------------------------------------------------------------------


def without_files(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def in_one_file(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        Qwen2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in FILES[1:]:
        (folder / name).unlink(missing_ok=True)


def vocabulary_alone(folder: Path) -> None:
    in_one_file(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    without_files(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def without_special_tokens(folder: Path) -> None:
    in_one_file(folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = []
    without_files(folder)
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))


DAMAGES = {
    "no files": (without_files, "holds no tokenizer|lacks the tokenizer's files"),
    "a vocabulary alone": (vocabulary_alone, "its tokenizer cannot be loaded"),
    "half a file": (lambda folder: (folder / "tokenizer.json").write_text('{"version"'), "cannot be loaded"),
    "a list": (lambda folder: (folder / "tokenizer.json").write_text("[]"), "its tokenizer cannot be loaded"),
    "a wrong configuration": (
        lambda folder: (folder / "tokenizer_config.json").write_text("no JSON"),
        "its tokenizer cannot be loaded",
    ),
    "no special tokens": (without_special_tokens, "The tokenizer (has no|lacks) <"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tokenizers(backbone, converted, tmp_path, damage):
    if (backbone, damage) == ("omnigen2", "no special tokens"):
        return  # its prompts have none that the vocabulary could lack
    change, words = DAMAGES[damage]
    source = copy(ORIGINALS[backbone], tmp_path / "source")
    change(source / TOKENIZER[backbone])
    original_refused(source, backbone, words)
    folder = copy(converted, tmp_path / "pipeline")
    change(folder / "tokenizer")
    pipeline_refused(folder, words)


def test_a_tokenizer_of_one_file_is_enough(backbone, tmp_path):
    source = copy(ORIGINALS[backbone], tmp_path / "source")
    in_one_file(source / TOKENIZER[backbone])
    accepted(source, backbone)


# --- indexes -----------------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> tuple[Path, dict]:
    """Divide the transformer of a pipeline folder into two shards; returns the index and its content."""
    tensors = load_file(folder / f"{STEM}.safetensors")
    (folder / f"{STEM}.safetensors").unlink()
    weight_map = {name: f"{STEM}-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    return folder / f"{STEM}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}


def names_of_others(folder: Path, content: dict) -> None:
    content["weight_map"]["decoder.conv_in.bias"] = f"{STEM}-00001-of-00002.safetensors"


def tensors_of_others(folder: Path, content: dict) -> None:
    save_file({"decoder.conv_in.bias": torch.zeros(4)}, folder / f"{STEM}-00003-of-00002.safetensors")
    content["weight_map"]["decoder.conv_in.bias"] = f"{STEM}-00003-of-00002.safetensors"


def left_out(folder: Path, content: dict) -> None:
    content["weight_map"].pop(max(content["weight_map"]))


@pytest.mark.parametrize(
    "change, words",
    [
        (names_of_others, "names tensors that its files do not hold: decoder.conv_in.bias"),
        (tensors_of_others, "unexpected (in transformer/: )?decoder.conv_in.bias"),
        (left_out, "missing|lacks"),
    ],
)
def test_indexes(backbone, converted, tmp_path, change, words):
    folder = copy(converted, tmp_path / "pipeline")
    index, content = sharded(folder / "transformer")
    change(folder / "transformer", content)
    index.write_text(json.dumps(content))
    pipeline_refused(folder, words, back=True)


def test_an_index_that_also_names_the_vae(tmp_path):
    """Its file is the one that is read anyway."""
    source = shard(copy(BAGEL, tmp_path / "source"))
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(load_file(source / "ae.safetensors"), "ae.safetensors")
    index.write_text(json.dumps(content))
    plain = copy(BAGEL, tmp_path / "other" / "source")
    one, other = accepted(source, "bagel"), accepted(plain, "bagel")
    for component in ("transformer", "vision_model", "vae"):
        assert stored(*(one / component).glob("*.safetensors")) == stored(*(other / component).glob("*.safetensors"))


# --- configurations ----------------------------------------------------------------------------------------------------


def test_a_configuration_without_weights(backbone, converted, tmp_path):
    source = copy(ORIGINALS[backbone], tmp_path / "source")
    for file in source.rglob("*.safetensors*"):
        file.unlink()
    original_refused(source, backbone, "is not an original|holds no .safetensors weights")
    for component in ("transformer", "vae"):
        folder = copy(converted, tmp_path / f"without {component}")
        for file in (folder / component).glob("*.safetensors*"):
            file.unlink()
        pipeline_refused(folder, f"{component} holds no .safetensors weights", back=True)


def test_a_single_configuration_file(tmp_path):
    source = copy(BAGEL, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for name in ("llm_config", "vit_config"):
        config[name] = json.loads((source / f"{name}.json").read_text())
        (source / f"{name}.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    accepted(source, "bagel")


def test_a_folder_without_the_optional_tower(tmp_path):
    from tests.modeling.blip3o.conftest import variant

    accepted(variant(tmp_path, eva="absent"), "blip3o")
