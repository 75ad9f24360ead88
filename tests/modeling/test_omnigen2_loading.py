"""The released layout of OmniGen2: loaded, converted and converted back; both loading modes; adapters."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import echo4o
from echo4o.modeling.common.weights import component_tensors
from echo4o.modeling.omnigen2.convert import convert_to_diffusers, convert_to_original
from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline
from echo4o.modeling.pipelines import original_class, pipeline_class
from echo4o.testing.hub import LoopbackHub
from echo4o.testing.processes import offline_environment, run_script
from tests.modeling.omnigen2_models import CHECKPOINT, GOLDEN, golden_pipeline, other_pipeline

WEIGHTED = ("transformer", "vae", "mllm")
ADAPTER = GOLDEN / "j_lora"


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a dot", generator=generator, **options).images


DRAW = "import numpy as np, torch\n" + inspect.getsource(draw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omnigen2") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return draw(golden_pipeline())


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bits(folder: Path) -> dict:
    """Name, dtype, shape and bytes of every stored tensor."""
    found = {}
    for component in WEIGHTED:
        for name, tensor in component_tensors(folder / component).items():
            with open(tensor.file, "rb") as file:
                file.seek(tensor.start)
                found[component, name] = (tensor.dtype, tensor.shape, file.read(tensor.nbytes))
    return found


# --- layouts ---


def test_the_released_layout_is_recognised_and_loaded(folder, drawn):
    assert pipeline_class(CHECKPOINT) is OmniGen2Pipeline and original_class(CHECKPOINT) is OmniGen2Pipeline
    assert original_class(folder) is None
    pipe = OmniGen2Pipeline.from_pretrained(CHECKPOINT)
    assert pipe.config._name_or_path == str(CHECKPOINT) and pipe.transformer.dtype == torch.float32
    assert np.array_equal(draw(pipe), drawn)
    assert np.array_equal(draw(echo4o.load_pipeline(folder)), drawn)
    half = OmniGen2Pipeline.from_original(CHECKPOINT, dtype="bfloat16")
    assert {half.transformer.dtype, half.mllm.dtype, half.vae.dtype} == {torch.bfloat16}


def test_conversion_and_back_keep_every_bit(folder, tmp_path):
    assert bits(folder) == bits(CHECKPOINT)
    convert_to_original(folder, tmp_path / "back")
    want, got = files_of(CHECKPOINT), files_of(tmp_path / "back")
    assert want.keys() == got.keys()
    differing = [name for name in want if want[name] != got[name]]
    assert [name for name in differing if not name.endswith(".safetensors")] == []
    assert bits(tmp_path / "back") == bits(CHECKPOINT)


def test_shards_keep_their_names_and_dtype(folder, tmp_path):
    source = shutil.copytree(CHECKPOINT, tmp_path / "sharded")
    for component in ("mllm", "transformer"):
        (file,) = (source / component).glob("*.safetensors")
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        stem, names = file.stem, sorted(tensors)
        parts = [names[::2], names[1::2]]
        file.unlink()
        weight_map = {}
        for number, part in enumerate(parts, 1):
            shard = f"{stem}-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, source / component / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (source / component / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    convert_to_diffusers(source, tmp_path / "converted")
    assert bits(tmp_path / "converted") == bits(source)
    pipe = OmniGen2Pipeline.from_pretrained(tmp_path / "converted")
    assert {pipe.transformer.dtype, pipe.mllm.dtype} == {torch.bfloat16} and pipe.vae.dtype == torch.float32
    convert_to_original(tmp_path / "converted", tmp_path / "back")
    assert OmniGen2Pipeline.from_pretrained(tmp_path / "back").mllm.dtype == torch.bfloat16


def test_a_saved_pipeline_converts_to_the_released_layout(tmp_path):
    pipe = other_pipeline()
    pipe.save_pretrained(tmp_path / "saved")
    convert_to_original(tmp_path / "saved", tmp_path / "released")
    again = OmniGen2Pipeline.from_pretrained(tmp_path / "released")
    assert again.scheduler.config.use_dynamic_shifting and np.array_equal(draw(again), draw(pipe))


def test_checkpoints_that_do_not_fit(tmp_path):
    source = shutil.copytree(CHECKPOINT, tmp_path / "source")
    file = source / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for change, words in (
        (lambda t: t.pop("x_embedder.bias"), "missing x_embedder.bias"),
        (lambda t: t.update(more=torch.zeros(2)), "unexpected more"),
        (lambda t: t.update({"x_embedder.bias": torch.zeros(3)}), r"x_embedder.bias is \(3,\)"),
        (lambda t: t.update({"x_embedder.bias": torch.full((72,), float("nan"))}), "non-finite values"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            convert_to_diffusers(source, tmp_path / "out")
        with pytest.raises((ValueError, RuntimeError)):
            OmniGen2Pipeline.from_pretrained(source)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(FileNotFoundError, match="does not have the layout"):
        convert_to_diffusers(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is not a pipeline folder"):
        convert_to_original(CHECKPOINT, tmp_path / "out")


def test_missing_tensors_of_the_language_model_are_named(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    file = damaged / "mllm/model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"mllm: missing model\.norm\.weight"):
        OmniGen2Pipeline.from_pretrained(damaged)


# --- adapters ---


@pytest.mark.long
def test_the_original_adapter_in_all_its_spellings(tmp_path):
    pipe = golden_pipeline()
    base = draw(pipe)
    state = load_file(ADAPTER / "pytorch_lora_weights.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    spellings = {
        "released": state,
        "comfy": {f"diffusion_model.{name}": tensor for name, tensor in bare.items()},
        "bare": {name.replace(".weight", ".default.weight"): tensor for name, tensor in bare.items()},
    }
    results = {}
    for name, tensors in spellings.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
        results[name] = draw(pipe)
        pipe.unload_lora_weights()
    assert all(np.array_equal(result, results["released"]) for result in results.values())
    assert not np.array_equal(results["released"], base) and np.array_equal(draw(pipe), base)


@pytest.mark.long
def test_adapters_are_saved_fused_and_swapped(tmp_path):
    pipe = golden_pipeline()
    base = draw(pipe)
    folders = []
    for seed in (0, 1):
        other = golden_pipeline()
        torch.manual_seed(seed)
        targets = other.lora_targets["attention"]
        other.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
        folders.append(other.save_lora_adapter(tmp_path / str(seed)).parent)
    pipe.load_lora_weights(folders[0], adapter_name="a")
    first = draw(pipe)
    pipe.load_lora_weights(folders[1], adapter_name="a", hotswap=True)
    second = draw(pipe)
    assert not np.array_equal(first, base) and not np.array_equal(first, second)
    pipe.fuse_lora()
    assert np.abs(draw(pipe) - second).max() < 1e-4
    pipe.unfuse_lora()
    pipe.set_adapters("a", 0.0)
    assert np.abs(draw(pipe) - base).max() < 1e-4
    pipe.unload_lora_weights()
    assert np.abs(draw(pipe) - base).max() < 1e-4


# --- without the package, and through a Hub ---

REMOTE = (
    DRAW
    + """
import sys
from diffusers import DiffusionPipeline
source, adapter, target = sys.argv[1:]
try:
    import echo4o
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
first = draw(pipe)
pipe.load_lora_weights(adapter)
adapted = draw(pipe)
pipe.unload_lora_weights()
pipe.save_pretrained(target + "/saved")
again = DiffusionPipeline.from_pretrained(target + "/saved", trust_remote_code=True)
assert pipe.chat("What?", max_new_tokens=3) == again.chat("What?", max_new_tokens=3)
np.savez(target + "/drawn.npz", first=first, adapted=adapted, again=draw(again))
"""
)


@pytest.mark.long
def test_without_the_package(folder, drawn, tmp_path):
    (tmp_path / "home").mkdir()
    run_script(REMOTE, folder, ADAPTER, tmp_path, env=offline_environment(tmp_path / "home"), hide=["echo4o"])
    results = np.load(tmp_path / "drawn.npz")
    assert np.array_equal(results["first"], drawn) and np.array_equal(results["again"], drawn)
    assert not np.array_equal(results["adapted"], drawn)
    assert np.array_equal(draw(OmniGen2Pipeline.from_pretrained(tmp_path / "saved")), drawn)


RELEASED_FROM_THE_HUB = (
    DRAW
    + """
import sys
from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline
(target,) = sys.argv[1:]
pipe = OmniGen2Pipeline.from_pretrained("ns/released")
assert pipe.config._name_or_path == "ns/released"
np.savez(target + "/released.npz", drawn=draw(pipe))
pipe.push_to_hub("ns/ours")
"""
)


@pytest.mark.long
def test_the_release_loads_from_a_hub_and_is_published_with_code(drawn, tmp_path):
    for name in ("home", "home2"):
        (tmp_path / name).mkdir()
    with LoopbackHub() as hub:
        hub.add_folder("ns/released", CHECKPOINT)
        run_script(RELEASED_FROM_THE_HUB, tmp_path, env=hub.environment(tmp_path / "home"))
        assert np.array_equal(np.load(tmp_path / "released.npz")["drawn"], drawn)
        environment = hub.environment(tmp_path / "home2")
        run_script(REMOTE, "ns/ours", ADAPTER, tmp_path, env=environment, hide=["echo4o"])
    assert np.array_equal(np.load(tmp_path / "drawn.npz")["first"], drawn)
