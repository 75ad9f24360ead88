"""Loading and saving a folder with the package; test_remote_code.py does it without."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.modeling.common import loading, publishing

CHECKPOINT = Path(__file__).parents[1] / "parity/golden/checkpoint"
WEIGHTED = ("transformer", "vision_model", "vae")


def draw(pipe, **options):
    """One small picture from fixed noise, (1, 64, 64, 3); also run, as text, by processes of test_remote_code.py."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(
        "a red cat", height=64, width=64, num_inference_steps=2, latents=noise, output_type="np", **options
    ).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The golden checkpoint as a pipeline folder, float32."""
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def picture(folder) -> np.ndarray:
    return draw(Echo4oPipeline.from_pretrained(folder))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two drawings are one; float32 sums of another process differ in the last bits."""
    return a.shape == b.shape and float(np.abs(a - b).max()) < 1e-5


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- with the package ------------------------------------------------------------------------------------------------


def test_package_loads_its_own_classes_without_trust(folder):
    pipe = Echo4oPipeline.from_pretrained(str(folder))
    assert type(pipe) is Echo4oPipeline
    assert type(pipe.transformer).__module__ == "echo4o.modeling.bagel.transformer_bagel"
    assert pipe.scheduler.config.shift == 3.0
    assert pipe.config._name_or_path == str(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_the_default(folder, tmp_path, dtype):
    pipe = Echo4oPipeline.from_pretrained(folder, dtype=dtype)
    pipe.vae.to(torch.float32)  # the release's VAE is stored wider than the rest
    pipe.save_pretrained(tmp_path / "saved")
    again = Echo4oPipeline.from_pretrained(tmp_path / "saved")
    assert {name: getattr(again, name).dtype for name in WEIGHTED} == {
        "transformer": dtype,
        "vision_model": dtype,
        "vae": torch.float32,
    }
    for name in WEIGHTED:
        a, b = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    wide = Echo4oPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert wide.transformer.dtype == torch.float32
    mixed = Echo4oPipeline.from_pretrained(tmp_path / "saved", dtype={"vae": torch.bfloat16})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (dtype, torch.bfloat16)


def dtypes_of(pipe) -> list[torch.dtype]:
    return [getattr(pipe, name).dtype for name in WEIGHTED]


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_go_by_name_as_well(folder, name):
    assert dtypes_of(Echo4oPipeline.from_pretrained(folder, dtype=name)) == [torch.bfloat16] * 3
    assert dtypes_of(Echo4oPipeline.from_pretrained(folder, torch_dtype=name)) == [torch.bfloat16] * 3
    assert dtypes_of(Echo4oPipeline.from_original(CHECKPOINT, dtype=name)) == [torch.bfloat16] * 3
    mixed = Echo4oPipeline.from_pretrained(folder, dtype={"vae": name, "transformer": "auto"})
    assert dtypes_of(mixed) == [torch.float32, torch.float32, torch.bfloat16]
    mixed = Echo4oPipeline.from_pretrained(folder, dtype={"default": name, "vae": torch.float16})
    assert dtypes_of(mixed) == [torch.bfloat16, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ["auto", None])
def test_the_stored_dtype_can_be_asked_for(folder, name):
    assert dtypes_of(Echo4oPipeline.from_pretrained(folder, dtype=name)) == [torch.float32] * 3
    assert dtypes_of(Echo4oPipeline.from_original(CHECKPOINT, dtype=name)) == [torch.float32] * 3


@pytest.mark.parametrize("value", ["bf17", "nn", "int8", torch.int8, 16, {"vae": "x"}])
def test_unknown_dtypes_are_refused_before_anything_is_read(value):
    assert "is not a floating dtype" in refused("/nowhere", ValueError, dtype=value)
    with pytest.raises(ValueError, match="is not a floating dtype"):
        Echo4oPipeline.from_original("/nowhere", dtype=value)


def test_models_alone_load_in_their_stored_dtype(copy):
    for name in ("vision_model", "transformer"):
        file = copy / name / "diffusion_pytorch_model.safetensors"
        save_file({n: t.to(torch.float16) for n, t in load_file(file).items()}, file)
    transformer, vision = BagelTransformer2DModel, BagelVisionModel
    assert transformer.from_pretrained(copy / "transformer").dtype == torch.float16
    assert vision.from_pretrained(copy / "vision_model").dtype == torch.float16
    assert vision.from_pretrained(copy, subfolder="vision_model").dtype == torch.float16
    assert vision.from_pretrained(copy / "vision_model", dtype=torch.float32).dtype == torch.float32


def test_the_dtype_of_most_bytes_is_the_stored_one(copy):
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    wide = ("pos_embed", "norm_out.und.weight")
    save_file({n: t if n in wide else t.to(torch.bfloat16) for n, t in load_file(file).items()}, file)
    assert Echo4oPipeline.from_pretrained(copy).transformer.embed_tokens.weight.dtype == torch.bfloat16


def test_saving_keeps_the_folder_whole(folder, tmp_path):
    Echo4oPipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index == json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "Echo4oPipeline"]
    assert index["transformer"] == ["transformer_bagel", "BagelTransformer2DModel"]
    code = {n: text for n, text in files_of(folder).items() if n.endswith(".py")}
    assert {n: text for n, text in files_of(tmp_path / "saved").items() if n.endswith(".py")} == code
    assert str(folder) not in "".join(p.read_text() for p in (tmp_path / "saved").rglob("*.json"))


def test_saving_over_the_folder_that_is_loaded(copy):
    pipe = Echo4oPipeline.from_pretrained(copy)
    with torch.no_grad():
        pipe.transformer.proj_in.weight += 1
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.save_pretrained(copy)
    assert all(torch.equal(before[k], v) for k, v in pipe.transformer.state_dict().items())
    again = Echo4oPipeline.from_pretrained(copy).transformer.state_dict()
    assert all(torch.equal(before[k], v) for k, v in again.items())


def test_shards_and_variants(folder, tmp_path):
    pipe = Echo4oPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    pipe.to(dtype=torch.bfloat16).save_pretrained(tmp_path / "saved", variant="bf16")
    assert len(list((tmp_path / "saved/transformer").glob("*-of-*.safetensors"))) > 2
    assert Echo4oPipeline.from_pretrained(tmp_path / "saved").transformer.dtype == torch.float32
    assert Echo4oPipeline.from_pretrained(tmp_path / "saved", variant="bf16").transformer.dtype == torch.bfloat16


def test_components_that_are_passed_need_no_folder(folder, copy):
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    shutil.rmtree(copy / "vae")
    assert Echo4oPipeline.from_pretrained(copy, vae=vae).vae is vae


def test_derived_class_is_published_as_the_class_it_derives_from(folder, tmp_path):
    class Mine(Echo4oPipeline):
        pass

    Mine.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["_class_name"][1] == "Echo4oPipeline"
    assert type(Mine.from_pretrained(tmp_path / "saved")) is Mine


def test_libraries_written_by_stock_diffusers_are_understood(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "Echo4oPipeline"
    index["transformer"][0] = "diffusers_modules.local.transformer_bagel"
    index["vision_model"][0] = "echo4o.modeling.bagel.vision_bagel"
    (copy / "model_index.json").write_text(json.dumps(index))
    assert type(Echo4oPipeline.from_pretrained(copy)) is Echo4oPipeline


def test_from_original_equals_the_converted_folder(picture):
    pipe = Echo4oPipeline.from_original(CHECKPOINT, max_references=2)
    assert pipe.config.max_references == 2
    assert same(draw(pipe), picture)


def test_from_original_takes_a_device_and_known_options_only():
    assert Echo4oPipeline.from_original(CHECKPOINT, device="cpu").device == torch.device("cpu")
    for options, message in (({"foo": 1}, "has no foo; it has transformer,"), ({"device": "gpu"}, "is unknown")):
        with pytest.raises(ValueError, match=message):
            Echo4oPipeline.from_original("/nowhere", **options)


def test_from_pipe_shares_components_and_options(folder, picture):
    class Mine(Echo4oPipeline):
        pass

    pipe = Echo4oPipeline.from_pretrained(folder, max_references=2)
    assert pipe.config.max_references == 2
    again = Mine.from_pipe(pipe)
    assert type(again) is Mine and again.config.max_references == 2
    assert all(again.components[name] is module for name, module in pipe.components.items())
    assert again.config._name_or_path == str(folder)
    assert same(draw(again), picture)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    other = Echo4oPipeline.from_pipe(pipe, vae=vae, max_references=3)
    assert other.vae is vae and other.config.max_references == 3 and pipe.config.max_references == 2
    assert dtypes_of(Echo4oPipeline.from_pipe(other, torch_dtype="bfloat16")) == [torch.bfloat16] * 3
    with pytest.raises(ValueError, match="has no foo"):
        Echo4oPipeline.from_pipe(pipe, foo=1)
    with pytest.raises(ValueError, match="DDPMPipeline has no transformer, vision_model, vae, tokenizer, which"):
        Echo4oPipeline.from_pipe(diffusers.DDPMPipeline(unet=None, scheduler=pipe.scheduler))


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(source, error: type[Exception], **options) -> str:
    with pytest.raises(error) as caught:
        Echo4oPipeline.from_pretrained(source, **options)
    return str(caught.value)


def test_folders_that_are_no_pipeline(tmp_path):
    assert "There is no folder" in refused(tmp_path / "nowhere", FileNotFoundError)
    assert "There is no folder" in refused("./nowhere", FileNotFoundError)
    assert "is not a pipeline folder" in refused(tmp_path, FileNotFoundError)
    assert "from_original" in refused(CHECKPOINT, FileNotFoundError)
    assert "There is no folder 'nowhere'" in refused("nowhere", FileNotFoundError)
    for name in (None, "", 7):
        assert f"is needed, not {name!r}" in refused(name, ValueError)


def test_an_unreachable_hub_is_distinguished_from_a_repository_without_a_pipeline():
    message = refused("ns/anything", FileNotFoundError, local_files_only=True)  # a broken line is the same error
    assert "'ns/anything' is not in the local cache, and the Hub cannot be reached" in message


@pytest.mark.parametrize("entry", [[None, "BagelTransformer2DModel"], [None, None], None, ["x"]])
def test_index_without_a_class(copy, entry):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"transformer": entry}))
    assert "model_index.json names no library and class for transformer." in refused(copy, ValueError)
    (copy / "model_index.json").write_text("[]")
    assert "not an object" in refused(copy, ValueError)


def test_folder_of_another_pipeline(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    assert "holds a FluxPipeline, not a Echo4oPipeline" in refused(copy, ValueError)


def test_lacking_components_and_weights(copy):
    (copy / "vae/diffusion_pytorch_model.safetensors").rename(copy / "vae/diffusion_pytorch_model.bin")
    message = refused(copy, ValueError)
    assert "pickled" in message and "diffusion_pytorch_model.bin" in message
    (copy / "vae/diffusion_pytorch_model.bin").unlink()
    assert "holds no .safetensors weights" in refused(copy, FileNotFoundError)
    shutil.rmtree(copy / "vae")
    assert "lacks the component folders that its index names: vae" in refused(copy, FileNotFoundError)


@pytest.mark.parametrize("component", WEIGHTED)
def test_damaged_weights(copy, component):
    file = copy / component / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    message = refused(copy, ValueError)
    assert "is truncated" in message and str(file) in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.1.gen.to_k.bias", "pos_embed"])
def test_non_finite_weights(copy, name, value):
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    assert f"transformer: non-finite values in {name}" in refused(copy, ValueError)


def test_missing_and_unexpected_weights_are_listed_together(copy):
    for component, old, new in (
        ("transformer", "layers.0.und.norm1.weight", "layers.0.und.norm9.weight"),
        ("vision_model", "connector.fc1.bias", "connector.fc7.bias"),
    ):
        file = copy / component / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[new] = tensors.pop(old)
        save_file(tensors, file)
    message = refused(copy, ValueError)
    for line in (
        "transformer: missing layers.0.und.norm1.weight",
        "transformer: unexpected layers.0.und.norm9.weight",
        "vision_model: missing connector.fc1.bias",
        "vision_model: unexpected connector.fc7.bias",
    ):
        assert line in message


def test_wrong_shapes(copy):
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_in.bias"] = torch.zeros(65)
    save_file(tensors, file)
    message = refused(copy, ValueError)
    assert "proj_in.bias" in message and "65" in message and "64" in message


def test_pickles_are_neither_read_nor_written(folder, tmp_path):
    assert "use_safetensors=False" in refused(folder, ValueError, use_safetensors=False)
    with pytest.raises(ValueError, match="safe_serialization=False"):
        Echo4oPipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "mps", 0])
def test_absent_devices(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    expected = "Use 'cpu'"
    assert expected in refused(folder, ValueError, device=device)
    assert expected in refused(folder, ValueError, device_map=device)
    pipe = Echo4oPipeline.from_pretrained(folder, device="cpu")
    with pytest.raises(ValueError, match=expected):
        pipe.to(device)
    with pytest.raises(ValueError, match=expected):
        pipe.to(device=device)
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "auto", "balanced", [0]])
def test_unknown_devices_are_refused_before_anything_is_read(device):
    assert "is unknown" in refused("/nowhere", ValueError, device=device)
    if device not in loading.DEVICE_MAPS:
        assert "is unknown" in refused("/nowhere", ValueError, device_map=device)


def test_injected_lora_layers_are_not_saved_as_plain_weights(folder, tmp_path):
    from peft import LoraConfig

    pipe = Echo4oPipeline.from_pretrained(folder)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="transformer has LoRA layers"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_models_are_compared_with_the_files_that_they_came_from(copy):
    """What a bare machine does with components that diffusers has loaded; the process of test_remote_code.py does it."""
    names = set(load_file(copy / "vae/diffusion_pytorch_model.safetensors"))
    vae = AutoencoderKL.from_pretrained(copy / "vae")
    assert set(loading._tensors_of_origin(vae)) == names
    vae.save_pretrained(copy / "vae", variant="bf16")
    (copy / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert set(loading._tensors_of_origin(AutoencoderKL.from_pretrained(copy / "vae", variant="bf16"))) == names
    vae.peft_config = {"default": None}
    assert loading._tensors_of_origin(vae) == {}
    made = AutoencoderKL.from_config(vae.config)
    made.register_to_config(_name_or_path=None)
    assert [loading._tensors_of_origin(x) for x in (made, None, torch.nn.Linear(1, 1), "text")] == [{}] * 4


def test_code_that_would_not_load_elsewhere_is_refused(folder, tmp_path):
    for name, text in (
        ("x/a", "from .b import x\nfrom ..common.c import y\n"),
        ("x/b", "from ..common.d import x\n"),
        ("common/c", "x = 1\n"),
        ("common/d", ""),
    ):
        (tmp_path / name).with_suffix(".py").parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".py").write_text(text)
    modules = (".b", "..common.c")
    sources = publishing.pipeline_sources(tmp_path / "x/a.py", modules)
    assert list(sources) == ["pipeline.py", "b.py", "c.py"]
    with pytest.raises(ValueError, match="b.py imports .'.d'., which _published_modules does not list"):
        publishing.require_closed(sources)
    sources = publishing.pipeline_sources(tmp_path / "x/a.py", (*modules, "..common.d"))
    publishing.require_closed(sources)
    assert sources["b.py"] == "from .d import x\n" and "if False:\n    from .d import *\n" in sources["pipeline.py"]
    with pytest.raises(ValueError, match="two modules would be published as c.py"):
        publishing.pipeline_sources(tmp_path / "x/a.py", (*modules, ".c"))
    with pytest.raises(ValueError, match="must stand alone"):
        publishing.require_standalone(sources["pipeline.py"], "a.py")
    for text in ("from ..x import y", "from . import y", "from ..common import y", "from ...common.x import y"):
        with pytest.raises(ValueError, match="outside its own folder"):
            publishing.relative_imports(text)

    Elsewhere = type("Elsewhere", (AutoencoderKL,), {"__module__": "no_such_module"})
    pipe = Echo4oPipeline.from_pretrained(folder)
    pipe.vae = Elsewhere.from_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="component 'vae' has no source file"):
        pipe.save_pretrained(tmp_path / "saved")


def test_published_names_collide_with_nothing_in_diffusers(folder):
    stems = [p.stem for p in folder.rglob("*.py")]
    assert len(stems) == len(set(stems)) >= 5
    assert [s for s in stems if hasattr(diffusers.pipelines, s)] == []


@pytest.mark.parametrize(
    "component, name, value, wanted",
    [
        ("transformer", "hidden_size", "64", "a whole number above 0"),
        ("transformer", "num_layers", 2.5, "a whole number above 0"),
        ("transformer", "num_key_value_heads", 0, "a whole number above 0"),
        ("transformer", "rope_theta", True, "a number above 0"),
        ("vision_model", "patch_size", None, "a whole number above 0"),
        ("vision_model", "hidden_act", 7, "a string"),
    ],
)
def test_configurations_of_the_wrong_type(copy, component, name, value, wanted):
    file = copy / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert f"{name}={value!r} in the config.json of a Bagel" in refused(copy, ValueError)
    assert refused(copy, ValueError).endswith(f"must be {wanted}.")
