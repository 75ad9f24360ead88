"""Adapters that do not fit are refused with one sentence, and the pipeline is as it was."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel

FILE = "pytorch_lora_weights.safetensors"
NAME = "transformer.layers.0.gen.to_q.lora_A.weight"


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """An adapter of the golden model; (folder, its weights, its configuration)."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = LoraConfig(
        r=4, lora_alpha=13, target_modules=BagelTransformer2DModel._lora_targets["gen"], init_lora_weights=False
    )
    pipe.transformer.add_adapter(settings)
    pipe.save_lora_adapter(folder)
    pipe.unload_lora_weights()
    return folder, load_file(folder / FILE), settings.to_dict()


@pytest.fixture
def refused(pipe):
    """A function that loads, expects an error that matches, and looks at what was left behind."""

    def load(source, match, error=ValueError, **options):
        before = {name: id(module) for name, module in pipe.transformer.named_modules()}
        with pytest.raises(error, match=match) as caught:
            pipe.load_lora_weights(source, **options)
        assert {name: id(module) for name, module in pipe.transformer.named_modules()} == before
        assert not getattr(pipe.transformer, "peft_config", None)
        return caught.value

    return load


@pytest.fixture
def changed(saved, tmp_path):
    """A function that writes the adapter with other weights or configuration."""

    def write(weights=None, settings=None, header=True):
        _, state, config = saved
        config = {f"transformer.{k}": v for k, v in {**config, **(settings or {})}.items()}
        metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if header else {})
        save_file(state if weights is None else weights, tmp_path / FILE, metadata)
        return tmp_path

    return write


def test_weights_that_do_not_fit(changed, saved, refused):
    _, state, _ = saved
    refused(changed(weights={}), "The adapter has no weights")
    refused(changed({n.replace("transformer.", "unet."): t for n, t in state.items()}), "'unet.*' does not begin with")
    refused(
        changed({n.replace(".gen.", ".moe_gen."): t for n, t in state.items()}), "has no layers for layers.0.moe_g"
    )
    wide = {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in state.items()}
    refused(changed(wide), r"gate_proj.lora_A.weight is \(4, 128\) and must be \(4, 64\) for this model")
    refused(
        changed({n: t for n, t in state.items() if n != NAME}), "to_q has lora_B.weight and must have lora_A.weigh"
    )
    refused(changed({n: t for n, t in state.items() if ".to_v." not in n}), "it lacks weights of layers.0.gen.to_v")
    refused(changed(state | {NAME: state[NAME] * float("nan")}), "non-finite values in layers.0.gen.to_q.lora_A")
    refused(
        changed({n: t.clone() for n, t in state.items()} | {"transformer.proj_in.weight": torch.zeros(1)}), "proj_in"
    )
    und = {n.replace(".gen.", ".und."): t.clone() for n, t in state.items() if ".to_q." in n}
    refused(changed(state | und), "which its configuration does not name")


def test_configurations_that_do_not_fit(changed, refused):
    refused(changed(header=False), "has no configuration, so that its alpha is unknown")
    refused(changed(settings={"r": 8}), r"must be \(8, 64\) for this model \(rank 8\)")
    refused(changed(settings={"use_dora": True}), "must have lora_A.weight, lora_B.weight, lora_magnitude_vector")
    refused(changed(settings={"peft_type": "LOHA"}), "has the type LOHA; only LORA is supported")
    refused(changed(settings={"use_tomorrow": True}), "does not know the adapter's options use_tomorrow")
    refused(changed(settings={"r": -1}), "cannot be used")
    refused(changed(), "has the type list", config=[])


def test_files_that_are_none(saved, refused, changed, tmp_path):
    folder, _, _ = saved
    refused(tmp_path / "nowhere", "There is no adapter", FileNotFoundError)
    refused("nowhere", "names of Hub repositories are owner/name", FileNotFoundError)
    refused("ns/nothing", "cannot be reached", FileNotFoundError, local_files_only=True)
    refused(tmp_path, "holds no adapter", FileNotFoundError)
    refused(folder, "has no 'x.safetensors'; it has pytorch_lora", FileNotFoundError, weight_name="x.safetensors")
    file = changed() / FILE
    shutil.copy(file, tmp_path / "other.safetensors")
    assert Echo4oPipeline.lora_state_dict(tmp_path)  # the usual name
    file.rename(tmp_path / "one.safetensors")
    refused(tmp_path, "several adapters .one.safetensors, other.safetensors.: name one with weight_name")
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-4])
    refused(tmp_path / "one.safetensors", "is truncated")


def test_pickles_are_refused(saved, refused, pipe, tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    refused(tmp_path, "pickled weights")
    refused(tmp_path / "pytorch_lora_weights.bin", "only .safetensors files are loaded")
    refused(tmp_path, "only .safetensors files are loaded", weight_name="pytorch_lora_weights.bin")
    refused(tmp_path, "means pickled weights", use_safetensors=False)
    options = {"transformer_lora_layers": saved[1], "transformer_lora_adapter_metadata": saved[2]}
    with pytest.raises(ValueError, match="pickled weights, which are not written"):
        pipe.save_lora_weights(tmp_path / "saved", **options, safe_serialization=False)


def test_peft_folder_without_its_configuration(saved, refused, tmp_path):
    state = {n.replace("transformer.", "base_model.model."): t for n, t in saved[1].items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "but adapter_config.json is missing: its alpha is unknown")
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(tmp_path, "not an object")


def test_names(saved, refused, pipe):
    folder, _, _ = saved
    for name in ("a.b", "", 7):
        refused(folder, "must be a non-empty string without a dot", adapter_name=name)
    refused(folder, "'x' is none of", adapter_name="x", hotswap=True)
    with pytest.raises(ValueError, match=r"must be one of the loaded adapters: \[\]"):
        pipe.save_lora_adapter(folder)
    pipe.load_lora_weights(folder, adapter_name="x")
    try:
        for act, match in (
            (lambda: pipe.load_lora_weights(folder, adapter_name="x"), "the adapter name 'x' is in use"),
            (lambda: pipe.set_adapters("y"), "There is no adapter 'y'; loaded are x"),
            (lambda: pipe.delete_adapters(["x", "y"]), "There is no adapter 'y'; loaded are x"),
            (lambda: pipe.save_lora_adapter(folder, "y"), "one of the loaded adapters"),
        ):
            with pytest.raises(ValueError, match=f"(?i){match}"):
                act()
        assert pipe.get_list_adapters() == {"transformer": ["x"]}
    finally:
        pipe.unload_lora_weights()


def test_saving_needs_a_configuration_and_a_folder(saved, pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="without its alpha"):
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=saved[1])
    with pytest.raises(NotADirectoryError, match="is a file"):
        pipe.save_lora_weights(
            tmp_path / "file", transformer_lora_layers=saved[1], transformer_lora_adapter_metadata=saved[2]
        )
