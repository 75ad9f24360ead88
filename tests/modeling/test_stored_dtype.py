"""A model loads in the dtype of the files that are really loaded: by the package, as a model alone, through remote code."""

import inspect
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel import transformer_bagel, vision_bagel
from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.testing.hub import LoopbackHub
from echo4o.testing.processes import run_script

from .test_loading import CHECKPOINT

MODELS = {"transformer": BagelTransformer2DModel, "vision_model": BagelVisionModel}
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module", params=["10GB", "40KB"], ids=["whole", "shards"])
def variants(request, folder, tmp_path_factory) -> Path:
    """bfloat16 weights and a float16 variant in one folder; as whole files, and as shards with an index."""
    saved = tmp_path_factory.mktemp("variants") / "pipeline"
    for dtype, variant in ((torch.bfloat16, None), (torch.float16, "fp16")):
        pipe = Echo4oPipeline.from_pretrained(folder, dtype=dtype)
        pipe.save_pretrained(saved, variant=variant, max_shard_size=request.param)
    return saved


def dtypes(pipe) -> set[torch.dtype]:
    return {getattr(pipe, name).dtype for name in MODELS}


@pytest.mark.parametrize("variant, dtype", [(None, torch.bfloat16), ("fp16", torch.float16)])
def test_all_ways_of_loading_follow_the_variant(variants, variant, dtype):
    for name, model in MODELS.items():
        assert model.from_pretrained(variants, subfolder=name, variant=variant).dtype == dtype
        assert model.from_pretrained(variants / name, variant=variant, dtype="auto").dtype == dtype
        assert model.from_pretrained(variants / name, variant=variant, dtype="float32").dtype == torch.float32
    for asked in (None, "auto"):
        assert dtypes(Echo4oPipeline.from_pretrained(variants, variant=variant, dtype=asked)) == {dtype}
    assert dtypes(DiffusionPipeline.from_pretrained(variants, trust_remote_code=True, variant=variant)) == {dtype}


def test_a_variant_beside_float32(folder, tmp_path):
    saved = shutil.copytree(folder, tmp_path / "pipeline")
    Echo4oPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(saved, variant="fp16")
    for name, model in MODELS.items():
        assert model.from_pretrained(saved, subfolder=name).dtype == torch.float32
    assert dtypes(DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)) == {torch.float32}


def test_a_variant_of_one_component_alone(folder, tmp_path):
    saved = shutil.copytree(folder, tmp_path / "pipeline")
    BagelTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float16).save_pretrained(
        saved / "transformer", variant="fp16"
    )
    package = Echo4oPipeline.from_pretrained(saved, variant="fp16")
    remote = DiffusionPipeline.from_pretrained(saved, variant="fp16", trust_remote_code=True)
    for pipe in (package, remote):
        assert (pipe.transformer.dtype, pipe.vision_model.dtype) == (torch.float16, torch.float32)


def test_stray_files_do_not_count(variants):
    for name in MODELS:
        save_file({"w": torch.zeros(1_000_000)}, variants / name / "another_model.safetensors")
        save_file({"w": torch.zeros(1_000_000)}, variants / name / "a.safetensors")
    try:
        for name, model in MODELS.items():
            assert model.from_pretrained(variants, subfolder=name).dtype == torch.bfloat16
    finally:
        for name in MODELS:
            for file in ("another_model", "a"):
                (variants / name / f"{file}.safetensors").unlink()


@pytest.mark.parametrize("module", [transformer_bagel, vision_bagel])
@pytest.mark.parametrize(
    "stored, dtype",
    [
        ({"w": torch.zeros(64, 64, dtype=torch.uint8), "norm": torch.ones(64).bfloat16()}, torch.bfloat16),
        ({"w": torch.zeros(64, 64, dtype=torch.int8), "norm": torch.ones(64).half()}, torch.float16),
        ({"w": torch.zeros(64, 64, dtype=torch.int32), "scale": torch.ones(64)}, torch.float32),
        ({"w": torch.zeros(64, 64).to(torch.float8_e4m3fn), "norm": torch.ones(64)}, torch.bfloat16),
        ({"w": torch.zeros(64, 64).to(torch.float8_e5m2), "v": torch.zeros(8).half()}, torch.bfloat16),
        ({"w": torch.zeros(64).half(), "norm": torch.ones(40)}, torch.float32),  # most bytes, not most values
        ({"w": torch.zeros(64, 64, dtype=torch.uint8)}, None),
    ],
)
def test_integers_do_not_vote_and_float8_computes_in_bfloat16(tmp_path, module, stored, dtype):
    save_file(stored, tmp_path / f"{STEM}.safetensors")
    assert module._stored_dtype(tmp_path) == dtype


def test_the_most_bytes_of_all_shards_count_not_those_of_the_first(folder, tmp_path):
    model = BagelTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file({name: tensor.float() for name, tensor in load_file(first).items()}, first, {"format": "pt"})
    assert BagelTransformer2DModel.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_all_component_files_hold_the_same_code():
    """Each is fetched alone, so that they cannot share it."""
    files = (
        "bagel.vision_bagel",
        "omnigen2.transformer_omnigen2",
        "blip3o.transformer_blip3o",
        "blip3o.vision_blip3o",
    )
    for file in files:
        module = import_module(f"echo4o.modeling.{file}")
        for name in ("_read_dtype", "_stored_files", "_stored_dtype", "_check_initialization"):
            if name == "_check_initialization" and "vision" in file:
                continue  # a vision tower takes no adapters
            assert inspect.getsource(getattr(module, name)) == inspect.getsource(getattr(transformer_bagel, name)), (
                file
            )
        models = [c for c in vars(module).values() if isinstance(c, type) and vars(c).get("_auto_class")]
        assert len(models) == 1, file
        assert inspect.getsource(models[0].extract_init_dict) == inspect.getsource(
            BagelTransformer2DModel.extract_init_dict
        )


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_kept_in_float32(folder, name):
    """`_keep_in_fp32_modules` names nothing, and nothing is kept: by loading, by `.to` and on the way back."""
    model = MODELS[name]
    assert not model._keep_in_fp32_modules
    loaded = model.from_pretrained(folder, subfolder=name, dtype=torch.float16)
    cast = model.from_pretrained(folder, subfolder=name).to(torch.float16)
    for half in (loaded, cast):
        assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), cast.state_dict().values()))


FROM_HUB = """
import torch
from diffusers import DiffusionPipeline
from echo4o import BagelTransformer2DModel, BagelVisionModel, Echo4oPipeline

for repo in ("ns/whole", "ns/shards"):
    for variant, dtype in ((None, torch.bfloat16), ("fp16", torch.float16)):
        for name, model in (("transformer", BagelTransformer2DModel), ("vision_model", BagelVisionModel)):
            got = model.from_pretrained(repo, subfolder=name, variant=variant).dtype
            assert got == dtype, (repo, variant, name, got)
        for pipe in (
            Echo4oPipeline.from_pretrained(repo, variant=variant),
            DiffusionPipeline.from_pretrained(repo, variant=variant, trust_remote_code=True),
        ):
            got = pipe.transformer.dtype, pipe.vision_model.dtype
            assert got == (dtype, dtype), (repo, variant, type(pipe), got)
try:
    BagelTransformer2DModel.from_pretrained("ns/absent", subfolder="transformer")
except OSError as error:
    assert "ns/absent" in str(error), error
else:
    raise AssertionError("a repository that does not exist")
"""


@pytest.mark.long
def test_models_from_the_hub(folder, tmp_path):
    (tmp_path / "home").mkdir()
    with LoopbackHub() as hub:
        for name, size in (("whole", "10GB"), ("shards", "40KB")):
            for dtype, variant in ((torch.bfloat16, None), (torch.float16, "fp16")):
                pipe = Echo4oPipeline.from_pretrained(folder, dtype=dtype)
                pipe.save_pretrained(tmp_path / name, variant=variant, max_shard_size=size)
            hub.add_folder(f"ns/{name}", tmp_path / name)
        run_script(FROM_HUB, env=hub.environment(tmp_path / "home"))
