"""Changed copies of the golden checkpoint, for the tests of the conversion."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel.convert import components_from_original, convert_to_diffusers, convert_to_original

CHECKPOINT = Path(__file__).parents[1] / "parity/golden/checkpoint"
WEIGHT_FILES = ("ema.safetensors", "ae.safetensors")
OTHER_FILES = sorted(p.name for p in CHECKPOINT.iterdir() if p.name not in WEIGHT_FILES)
MODEL_FILES = ("transformer", "vision_model", "vae")


def copy_checkpoint(folder: Path, change=None) -> Path:
    """A copy of the golden checkpoint; `change` gets and returns the tensors of each weight file."""
    shutil.copytree(CHECKPOINT, folder)
    for path in [folder, *folder.iterdir()]:
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    if change:
        for name in WEIGHT_FILES:
            save_file(change(load_file(CHECKPOINT / name)), folder / name, {"format": "pt"})
    return folder


def stored(*files: Path) -> dict[str, tuple]:
    """(dtype, shape, bytes) of every tensor in some files, by name."""
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()
    }


def there_and_back(src: Path, tmp_path: Path, **options) -> Path:
    convert_to_diffusers(src, tmp_path / "there", **options)
    convert_to_original(tmp_path / "there", tmp_path / "back")
    return tmp_path / "back"


def to_bfloat16(tensors):
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def to_several_dtypes(tensors):
    def dtype(name):
        if "pos_embed" in name or "norm" in name:
            return torch.float32
        return torch.float16 if name.startswith(("decoder", "connector")) else torch.bfloat16

    return {name: tensor.to(dtype(name)) for name, tensor in tensors.items()}


def shard(folder: Path, parts: int = 3) -> Path:
    """Replace ema.safetensors by shards and an index."""
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    weight_map = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(src: Path, tmp_path: Path, error: type[Exception]) -> str:
    """The message that both doors refuse `src` with; nothing is written."""
    with pytest.raises(error) as caught:
        convert_to_diffusers(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    with pytest.raises(error) as direct:
        components_from_original(src)
    assert str(direct.value) == str(caught.value)
    return str(caught.value)
