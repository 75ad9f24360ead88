"""Conversion between the original's layout and ours: bit for bit, in every released form, with clear errors."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.modeling.blip3o.convert import components_from_original, convert_to_diffusers, convert_to_original
from echo4o.modeling.blip3o.original_layout import key_of, original_name
from echo4o.modeling.blip3o.pipeline_blip3o import Blip3oPipeline
from echo4o.modeling.common.weights import component_tensors
from echo4o.modeling.pipelines import original_class, pipeline_class

from .conftest import CHECKPOINT, GOLDEN, change_json, variant

pytestmark = pytest.mark.long


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def require_same_files(one: Path, other: Path) -> None:
    assert files(one) == files(other)
    assert [name for name in files(one) if not filecmp.cmp(one / name, other / name, shallow=False)] == []


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True, "eva": "file"}, {"eva": "absent", "dtype": torch.bfloat16}, {"dtype": torch.float16}],
    ids=["8B", "4B, EVA in a file", "without EVA, bfloat16", "float16"],
)
def test_there_and_back_gives_the_same_bytes(tmp_path, options):
    source = variant(tmp_path, **options)
    convert_to_diffusers(source, tmp_path / "ours")
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    require_same_files(source, tmp_path / "back")


def test_a_converted_folder_generates_as_the_checkpoint(tiny, converted):
    pipe = Blip3oPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)
    assert pipeline_class(converted) is Blip3oPipeline and original_class(CHECKPOINT) is Blip3oPipeline
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "feature_steps": 2, "output_type": "latent"}
    want, got = (p("a cube", generator=torch.Generator().manual_seed(1), **options).images for p in (tiny, pipe))
    assert torch.equal(want, got)
    assert pipe.config.tokenizer_max_length == tiny.config.tokenizer_max_length == 150
    assert pipe.chat("Why?", max_new_tokens=5) == tiny.chat("Why?", max_new_tokens=5)


def test_a_tied_head_is_the_embedding_table_in_both_ways_of_loading(tmp_path):
    source = variant(tmp_path, tied=True, eva="file")
    convert_to_diffusers(source, tmp_path / "ours")
    assert "lm_head.weight" not in component_tensors(tmp_path / "ours" / "language_model")
    for pipe in (Blip3oPipeline.from_original(source), Blip3oPipeline.from_pretrained(tmp_path / "ours")):
        model = pipe.language_model
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert pipe.vision_model is not None


def test_without_the_tower_images_are_generated_and_reconstruction_says_what_lacks(tmp_path):
    source = variant(tmp_path, eva="absent")
    convert_to_diffusers(source, tmp_path / "ours")
    pipe = Blip3oPipeline.from_pretrained(tmp_path / "ours")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vision_model is None
    assert pipe("a", output_type="features", feature_steps=1).images.shape[0] == 1
    from PIL import Image

    with pytest.raises(ValueError, match="EVA-CLIP tower"):
        pipe.reconstruct(Image.new("RGB", (8, 8)))
    pipe.save_pretrained(tmp_path / "saved")
    assert Blip3oPipeline.from_pretrained(tmp_path / "saved").vision_model is None


def test_the_tower_can_be_left_out_when_loading(converted):
    pipe = Blip3oPipeline.from_pretrained(converted, vision_model=None)
    assert pipe.vision_model is None


def test_saved_pipelines_load_again(tmp_path, converted):
    pipe = Blip3oPipeline.from_pretrained(converted)
    pipe.save_pretrained(tmp_path / "saved")
    again = Blip3oPipeline.from_pretrained(tmp_path / "saved")
    for name in ("transformer", "language_model", "vision_model", "unet", "vae"):
        state = getattr(again, name).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in getattr(pipe, name).state_dict().items())
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["transformer_blip3o", "Blip3oTransformer2DModel"]
    assert index["language_model"] == ["transformers", "Qwen2_5_VLForConditionalGeneration"]


def test_a_saved_pipeline_goes_back_with_the_kept_files_of_its_base(tmp_path, converted):
    """`save_pretrained` does not write the original's JSON files; the error says where they are."""
    Blip3oPipeline.from_pretrained(converted).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="`save_pretrained` does not write it: copy it from the converted folder"):
        convert_to_original(tmp_path / "saved", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    shutil.copytree(converted / "original", tmp_path / "saved" / "original")
    convert_to_original(tmp_path / "saved", tmp_path / "back")
    # The library writes the tokenizer's files in another form.
    kept = [
        name for name in files(CHECKPOINT) if name.endswith(".safetensors") or name.startswith("diffusion-decoder")
    ]
    assert {*kept, "config.json"} <= {*files(tmp_path / "back")}
    for name in (name for name in kept if name.endswith(".safetensors")):
        want, got = (load_file(folder / name) for folder in (CHECKPOINT, tmp_path / "back"))
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


def test_shards_have_indexes_that_load(tmp_path):
    convert_to_diffusers(CHECKPOINT, tmp_path / "ours", shard_bytes=200_000)
    assert (tmp_path / "ours" / "language_model" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "ours" / "transformer").glob("*-of-*.safetensors"))) > 1
    Blip3oPipeline.from_pretrained(tmp_path / "ours")
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    require_same_files(CHECKPOINT, tmp_path / "back")


def test_names_are_one_to_one():
    for name in component_tensors(CHECKPOINT):
        key = key_of(name)
        assert original_name(key.component, key.name) == name


def test_an_interrupted_conversion_resumes(tmp_path, monkeypatch):
    import echo4o.modeling.common.conversion as conversion

    write, written = conversion.write_file, []

    def stop_at_third(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *args)

    monkeypatch.setattr(conversion, "write_file", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        convert_to_diffusers(CHECKPOINT, tmp_path / "ours")
    times = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(conversion, "write_file", write)
    convert_to_diffusers(CHECKPOINT, tmp_path / "ours")
    assert times == {path: path.stat().st_mtime_ns for path in written}
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    require_same_files(CHECKPOINT, tmp_path / "back")


# --- what cannot be converted -----------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_decoder_says_where_to_take_it_from(tmp_path):
    source = variant(tmp_path)
    shutil.rmtree(source / "diffusion-decoder")
    with pytest.raises(FileNotFoundError, match="take it from the release"):
        convert_to_diffusers(source, tmp_path / "ours")


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
    source = variant(tmp_path)
    file = next(f for f in sorted(source.glob("model-*")) if "model.latent_queries" in load_file(f))
    tensors = load_file(file)
    tensors["model.dit.model.more"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, file)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    weight_map = {n: f for n, f in index["weight_map"].items() if n != "model.norm.weight"}
    for other in source.glob("model-*"):
        if other != file:
            held = load_file(other)
            held.pop("model.norm.weight", None)
            save_file(held, other)
    change_json(source / "model.safetensors.index.json", weight_map=weight_map | dict.fromkeys(tensors, file.name))
    with pytest.raises(ValueError) as error:
        convert_to_diffusers(source, tmp_path / "ours")
    assert "transformer: unexpected more" in str(error.value)
    assert "model.language_model.norm.weight is [3] and must be [64]" in str(error.value)
    assert not (tmp_path / "ours").exists()


class Evil:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    source = variant(tmp_path, eva="file")
    torch.save({"cls_token": Evil()}, tmp_path / "eva_clip_vision_tower" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        convert_to_diffusers(source, tmp_path / "ours")
    assert "must not run" not in capsys.readouterr().out


def test_pickled_language_models_are_refused(tmp_path):
    source = variant(tmp_path)
    for file in source.glob("model*.safetensors*"):
        file.unlink()
    torch.save({}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        convert_to_diffusers(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_pooling": "none"}, "gen_pooling='none' is not known"),
        ({"tiny": {"dit_config": {"learn_sigma": True}}}, "learn_sigma"),
        ({"tiny": {"gen_vision_tower_config": {"vision_cfg": {"postnorm": False}}}}, "postnorm"),
    ],
)
def test_settings_that_are_not_supported_are_errors(tmp_path, changes, message):
    source = variant(tmp_path)
    change_json(source / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert_to_diffusers(source, tmp_path / "ours")


def test_non_finite_weights_are_refused(tmp_path):
    source = variant(tmp_path)
    file = sorted(source.glob("model-*"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="non-finite"):
        convert_to_diffusers(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="non-finite"):
        components_from_original(source)


def test_the_golden_towers_are_the_same_tensors():
    """The tower in the checkpoint and its file of its own, whichever is used."""
    state = torch.load(GOLDEN / "eva_clip_vision_tower" / "pytorch_model.bin", weights_only=True)
    model = Blip3oPipeline.from_original(CHECKPOINT).vision_model.state_dict()
    assert state.keys() == model.keys() and all(torch.equal(state[n], t) for n, t in model.items())
