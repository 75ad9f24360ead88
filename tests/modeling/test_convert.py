"""Conversion from the original layout and back is bit-exact in every form, and can be interrupted."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.common import files
from echo4o.modeling.bagel import convert
from echo4o.modeling.bagel.convert import components_from_original, convert_to_diffusers, convert_to_original
from echo4o.modeling.common import conversion, safetensors_stream
from echo4o.modeling.common.weights import read_header
from tests.modeling.checkpoints import (
    CHECKPOINT,
    MODEL_FILES,
    OTHER_FILES,
    WEIGHT_FILES,
    copy_checkpoint,
    shard,
    stored,
    there_and_back,
    to_bfloat16,
    to_several_dtypes,
)

# --- what must be kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [None, to_bfloat16, to_several_dtypes])
def test_there_and_back_is_bit_exact(tmp_path, change):
    src = copy_checkpoint(tmp_path / "src", change)
    back = there_and_back(src, tmp_path)
    for name in WEIGHT_FILES:
        assert stored(back / name) == stored(src / name)
    for name in OTHER_FILES:
        assert (back / name).read_bytes() == (src / name).read_bytes()
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in src.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_checkpoint_in_float8_is_converted_as_it_is_and_computes_in_bfloat16(tmp_path, dtype):
    from echo4o import Echo4oPipeline
    from echo4o.planning.generation_memory import make_plan, read_stored
    from echo4o.training.backbones.base import ImageCall

    def narrowed(tensors):
        return {name: t.to(dtype) if t.ndim == 2 else t.to(torch.bfloat16) for name, t in tensors.items()}

    source = copy_checkpoint(tmp_path / "source", narrowed)
    convert_to_diffusers(source, tmp_path / "folder")
    assert stored(source / "ema.safetensors").keys() and dtype in {
        t[0] for t in stored(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors").values()
    }
    for pipe in (Echo4oPipeline.from_pretrained(tmp_path / "folder"), Echo4oPipeline.from_original(source)):
        assert pipe.transformer.dtype == pipe.vision_model.dtype == torch.bfloat16
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a dot", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)
    plan = make_plan(read_stored(str(tmp_path / "folder")), 24e9, ImageCall(32, 32))
    assert {row.dtype for row in plan.rows} == {"bfloat16"}


def test_sharded_source_gives_the_same_folder(tmp_path):
    src = shard(copy_checkpoint(tmp_path / "src"))
    convert_to_diffusers(CHECKPOINT, tmp_path / "whole")
    back = there_and_back(src, tmp_path)
    assert stored(back / "ema.safetensors") == stored(CHECKPOINT / "ema.safetensors")
    for file in sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_small_shards(tmp_path):
    limit = 50_000
    back = there_and_back(CHECKPOINT, tmp_path, shard_bytes=limit)
    for name in WEIGHT_FILES:
        assert stored(back / name) == stored(CHECKPOINT / name)
    for component in MODEL_FILES:
        folder = tmp_path / "there" / component
        files = sorted(folder.glob("*.safetensors"))
        weight_map = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
        assert len(files) > 2 and set(weight_map.values()) == {f.name for f in files}
        for file in files:
            header = read_header(file)
            assert all(weight_map[name] == file.name for name in header)
            assert sum(t.nbytes for t in header.values()) <= limit or len(header) == 1
    loaded = components_from_folder(tmp_path / "there")
    assert loaded["transformer"].config.num_layers == 2


def components_from_folder(folder: Path) -> dict:
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline

    return Echo4oPipeline.from_pretrained(folder).components


def test_folder_and_direct_loading_hold_the_same_tensors(tmp_path):
    src = copy_checkpoint(tmp_path / "src", to_bfloat16)
    convert_to_diffusers(src, tmp_path / "there")
    direct, folder = components_from_original(src), components_from_folder(tmp_path / "there")
    for name in MODEL_FILES:
        a, b = direct[name].state_dict(), folder[name].state_dict()
        assert a.keys() == b.keys() and len(a) > 0
        assert all(a[k].dtype == b[k].dtype == torch.bfloat16 and torch.equal(a[k], b[k]) for k in a)
        assert dict(direct[name].config).keys() <= dict(folder[name].config).keys()
        assert not direct[name].training
    assert direct["scheduler"].config.shift == folder["scheduler"].config.shift == 3.0
    text = "a <|vision_start|> red cat<|im_end|>"
    assert direct["tokenizer"](text).input_ids == folder["tokenizer"](text).input_ids


def test_direct_loading_takes_a_dtype_and_leaves_components_out():
    loaded = components_from_original(CHECKPOINT, dtype=torch.bfloat16, skip=["vae", "tokenizer"])
    assert loaded.keys() == {"transformer", "vision_model", "scheduler"}
    assert {t.dtype for t in loaded["transformer"].state_dict().values()} == {torch.bfloat16}


@pytest.mark.long
def test_folder_from_save_pretrained_goes_back(tmp_path):
    from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline

    Echo4oPipeline.from_original(CHECKPOINT).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / convert.KEPT_FOLDER).exists()
    convert_to_original(tmp_path / "saved", tmp_path / "back")
    for name in WEIGHT_FILES:
        assert stored(tmp_path / "back" / name) == stored(CHECKPOINT / name)
    for name in ("llm_config.json", "vit_config.json", "generation_config.json"):
        made, given = (json.loads((folder / name).read_text()) for folder in (tmp_path / "back", CHECKPOINT))
        given = {k: v for k, v in given.items() if k != "torch_dtype"}  # the golden file says bfloat16, stores float32
        assert given.items() <= made.items()
    made, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", CHECKPOINT))
    assert made["vae_config"] == given["vae_config"]
    assert json.loads((tmp_path / "back/vocab.json").read_text()) == json.loads(
        (CHECKPOINT / "vocab.json").read_text()
    )
    assert [m for m in (tmp_path / "back/merges.txt").read_text().splitlines() if m[:1] != "#"] == [
        m for m in (CHECKPOINT / "merges.txt").read_text().splitlines() if m[:1] != "#"
    ]
    convert_to_diffusers(tmp_path / "back", tmp_path / "again")
    for component in MODEL_FILES:
        file = f"{component}/diffusion_pytorch_model.safetensors"
        assert stored(tmp_path / "again" / file) == stored(tmp_path / "saved" / file)


def test_kept_json_files_are_not_used_when_the_components_changed(tmp_path):
    convert_to_diffusers(CHECKPOINT, tmp_path / "there")
    file = tmp_path / "there/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 12345.0}))
    convert_to_original(tmp_path / "there", tmp_path / "back")
    assert json.loads((tmp_path / "back/llm_config.json").read_text())["rope_theta"] == 12345.0


def test_sizes_come_from_tensors_where_config_json_is_absent_or_mistaken(tmp_path):
    src = copy_checkpoint(tmp_path / "src")
    (src / "config.json").unlink()
    convert_to_diffusers(src, tmp_path / "without")
    (src / "config.json").write_text(json.dumps({"max_latent_size": 9, "vit_max_num_patch_per_side": 9}))
    convert_to_diffusers(src, tmp_path / "mistaken")
    for folder in (tmp_path / "without", tmp_path / "mistaken"):
        transformer, vision, vae = (json.loads((folder / c / "config.json").read_text()) for c in MODEL_FILES)
        assert (transformer["max_latent_size"], transformer["latent_patch_size"]) == (16, 2)
        assert (vision["max_patches_per_side"], vision["num_layers"]) == (16, 2)
        assert (vae["block_out_channels"], vae["layers_per_block"]) == ([32, 32, 64, 32], 1)
        assert (vae["scaling_factor"], vae["shift_factor"]) == (0.3611, 0.1159)


# --- how it is written -----------------------------------------------------------------------------------------------


def test_memory_stays_at_a_few_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 1 << 18)
    save_file({"a": torch.randn(8 << 20), "b": torch.randn(8 << 20)}, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")
    outputs = [safetensors_stream.TensorCopy(name.upper(), (8, 1 << 20), t) for name, t in header.items()]
    tracemalloc.start()
    safetensors_stream.write_file(tmp_path / "out.safetensors", outputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 < (64 << 20)
    a, b = load_file(tmp_path / "in.safetensors"), load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(a[k].reshape(8, -1), b[k.upper()]) for k in a)


def test_interrupted_conversion_continues(tmp_path, monkeypatch):
    calls = []

    def interrupted(path, outputs, progress):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        safetensors_stream.write_file(path, outputs, progress)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_to_diffusers(CHECKPOINT, tmp_path / "there", shard_bytes=200_000)
    assert not (tmp_path / "there/model_index.json").exists()
    times = {p: p.stat().st_mtime_ns for p in calls[:2]}
    other = copy_checkpoint(tmp_path / "other", to_bfloat16)
    with pytest.raises(FileExistsError, match="not an interrupted conversion of the same weights"):
        convert_to_diffusers(other, tmp_path / "there", shard_bytes=200_000)
    convert_to_diffusers(CHECKPOINT, tmp_path / "there", shard_bytes=200_000)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    convert_to_original(tmp_path / "there", tmp_path / "back")
    assert stored(tmp_path / "back/ema.safetensors") == stored(CHECKPOINT / "ema.safetensors")
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "there/.conversion.json").exists()


def test_target_must_be_free_and_roomy(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_to_diffusers(CHECKPOINT, tmp_path / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="has 0.0 GB free"):
        convert_to_diffusers(CHECKPOINT, tmp_path / "small")


def test_a_weight_file_gets_its_name_after_it_is_on_the_disk(tmp_path, monkeypatch):
    save_file({"a": torch.randn(8)}, tmp_path / "in.safetensors")
    copies = [safetensors_stream.TensorCopy("a", (8,), read_header(tmp_path / "in.safetensors")["a"])]
    path, flushed = tmp_path / "out.safetensors", []
    sync = files.sync
    monkeypatch.setattr(files, "sync", lambda stream: (sync(stream), flushed.append(path.exists())))
    safetensors_stream.write_file(path, copies)
    assert flushed == [False] and path.exists()
