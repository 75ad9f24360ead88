"""The original's adapter: loaded, scaled, fused."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .d_transformer import inputs_of
from .golden_set import GoldenSet

CASE = "mixed"  # of d_transformer, as the file's description says


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    folder = golden.directory / "j_lora"
    check("files", sorted(path.name for path in folder.iterdir()), sorted(file.json["files"]))
    keys = file.json["keys"].plain()
    for name in file.json["files"]:
        shapes = {key: list(tensor.shape) for key, tensor in load_file(folder / name).items()}
        check(f"{name}: keys", sorted(shapes), sorted(keys))
        check(f"{name}: shapes", [key for key in shapes if shapes[key] != keys.get(key)], [])
    check("trained_model_equals_loaded", file.json["trained_model_equals_loaded"], 0.0)
    other = GoldenFile(golden.directory / "d_transformer.json")
    inputs = inputs_of(other.tensors.under(CASE), other.json["cases"][CASE]["rows"])
    # Another transformer: an adapter must not stay in the one that other checks use.
    conversion = OmniGen2Pipeline.conversion()
    components = conversion.components_from_original(golden.directory / "checkpoint", dtype=torch.float32)
    pipe = OmniGen2Pipeline(**components)

    def compare(group: str) -> None:
        outputs = pipe.transformer(**inputs).sample
        check(f"{group}: rows", len(outputs), len(file.tensors.series(f"{group}.out")))
        for row, output in enumerate(outputs):
            check(f"{group}.out.{row}", output, file.tensors[f"{group}.out.{row}"], SINGLE)

    pipe.load_lora_weights(folder, adapter_name="original")
    with check.trying("loaded"):
        compare("loaded")
    with check.trying("scale_0.5"):
        pipe.set_adapters("original", 0.5)
        compare("scale_0.5")
        pipe.set_adapters("original", 1.0)
    with check.trying("fused"):
        pipe.fuse_lora()
        compare("fused")
