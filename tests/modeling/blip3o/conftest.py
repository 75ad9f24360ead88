"""The golden checkpoint of BLIP3-o, and variants of its layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[2] / "parity" / "golden_blip3o"
CHECKPOINT = GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def tiny():
    """The golden pipeline; tests leave it as they found it."""
    from echo4o.modeling.blip3o.pipeline_blip3o import Blip3oPipeline

    pipe = Blip3oPipeline.from_original(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The golden checkpoint as a pipeline folder; tests leave it as they found it."""
    from echo4o.modeling.blip3o.convert import convert_to_diffusers

    folder = tmp_path_factory.mktemp("blip3o") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


def variant(folder: Path, *, tied: bool = False, eva: str = "checkpoint", dtype: torch.dtype | None = None) -> Path:
    """The golden checkpoint in another layout.

    Args:
        tied: without a stored head, as the 4B model.
        eva: "checkpoint", "file" or "absent".
        dtype: of the decoder's weights; None: float32.
    """
    checkpoint = shutil.copytree(CHECKPOINT, folder / "checkpoint", copy_function=shutil.copyfile)
    if eva == "file":
        shutil.copytree(GOLDEN / "eva_clip_vision_tower", folder / "eva_clip_vision_tower")
    dropped = ("lm_head.",) * tied + ("model.gen_vision_tower.",) * (eva != "checkpoint")
    weight_map = {}
    for file in sorted(checkpoint.glob("model-*.safetensors")):
        tensors = {n: t for n, t in load_file(file).items() if not dropped or not n.startswith(dropped)}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    change_json(checkpoint / "model.safetensors.index.json", weight_map=weight_map)
    change_json(checkpoint / "config.json", tie_word_embeddings=tied)
    if dtype is not None:
        for part in ("unet", "vae"):
            file = checkpoint / "diffusion-decoder" / part / "diffusion_pytorch_model.bf16.safetensors"
            save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return checkpoint


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values, indent=2), "utf-8")
