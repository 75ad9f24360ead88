"""Conversion from the original layout and back: bit-exact in every form, and clear about everything that is wrong."""

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel import convert
from echo4o.modeling.bagel.convert import components_from_original, convert_to_diffusers, convert_to_original
from echo4o.modeling.common import conversion, safetensors_stream
from echo4o.modeling.common.weights import read_header

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


def test_interrupted_conversion_goes_on(tmp_path, monkeypatch):
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


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(src: Path, tmp_path: Path, error: type[Exception]) -> str:
    """The message that both doors refuse `src` with; nothing is written."""
    with pytest.raises(error) as caught:
        convert_to_diffusers(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    with pytest.raises(error) as direct:
        components_from_original(src)
    assert str(direct.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("lost", ["ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"])
def test_lacking_files_are_named(tmp_path, lost):
    src = copy_checkpoint(tmp_path / "src")
    (src / lost).unlink()
    if lost.endswith(".json"):
        (src / "config.json").unlink()  # which holds copies of both
    message = refused(src, tmp_path, FileNotFoundError)
    assert "is not an original BAGEL checkpoint" in message and lost in message


def test_no_checkpoint_at_all(tmp_path):
    assert "There is no folder" in refused(tmp_path / "nowhere", tmp_path, FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "is not an original BAGEL checkpoint" in refused(tmp_path / "empty", tmp_path, FileNotFoundError)
    src = copy_checkpoint(tmp_path / "src")
    for name in ("tokenizer.json", "vocab.json"):
        (src / name).unlink()
    assert "tokenizer" in refused(src, tmp_path, FileNotFoundError)


@pytest.mark.parametrize("name", ["ema.pt", "pytorch_model.bin", "ema.ckpt"])
def test_pickled_weights_are_refused_by_name(tmp_path, name):
    src = copy_checkpoint(tmp_path / "src")
    (src / "ema.safetensors").rename(src / name)
    assert name in refused(src, tmp_path, ValueError)


def test_pickled_vae_is_refused_by_name(tmp_path):
    src = copy_checkpoint(tmp_path / "src")
    (src / "ae.safetensors").rename(src / "ae.pt")
    assert "ae.pt" in refused(src, tmp_path, ValueError)


@pytest.mark.parametrize("file", WEIGHT_FILES)
@pytest.mark.parametrize("damage", ["cut", "header", "garbage", "longer", "pointer", "empty"])
def test_damaged_files_are_named(tmp_path, file, damage):
    src = copy_checkpoint(tmp_path / "src")
    data = (src / file).read_bytes()
    forms = {
        "cut": (data[:-1000], "is truncated"),
        "header": (data[:100], "is truncated"),
        "garbage": (b"\x10" + b"\0" * 7 + b"{" * 16 + data, "damaged safetensors header"),
        "longer": (data + b"\0" * 8, "longer than its header says"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        "empty": (b"", "no safetensors file"),
    }
    content, message = forms[damage]
    (src / file).write_bytes(content)
    text = refused(src, tmp_path, ValueError)
    assert file in text and message in text


def change_header(file: Path, change) -> None:
    """Rewrite a safetensors file's header; the data stays."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


Q0, Q1 = (f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[Q0].update(data_offsets=h[Q1]["data_offsets"]), "follows bytes of no tensor|overlaps another"),
        (lambda h: h[Q0].update(data_offsets=[o - h[Q0]["data_offsets"][0] - 100 for o in h[Q0]["data_offsets"]]), Q0),
        (lambda h: h.update(more={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}), "overlaps another"),
        (lambda h: h.pop(Q0), "follows bytes of no tensor"),
        (lambda h: h[Q0].update(shape=[-64, -64]), Q0),
        (lambda h: h[Q0].update(shape=["64", 64]), Q0),
    ],
)
def test_tensors_share_no_bytes_and_leave_none_out(tmp_path, change, message):
    src = copy_checkpoint(tmp_path / "src")
    change_header(src / "ema.safetensors", change)
    text = refused(src, tmp_path, ValueError)
    assert "damaged safetensors header" in text and re.search(message, text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["language_model.model.norm.weight", "decoder.conv_in.weight"])
def test_non_finite_weights_are_named(tmp_path, name, value, dtype):
    def spoil(tensors):
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        if name in tensors:
            tensors[name].view(-1)[3] = value
        return tensors

    src = copy_checkpoint(tmp_path / "src", spoil)
    with pytest.raises(ValueError, match="non-finite") as caught:
        convert_to_diffusers(src, tmp_path / "dst")
    assert name in str(caught.value)
    assert not (tmp_path / "dst/model_index.json").exists() and not list((tmp_path / "dst").rglob("*.partial"))
    with pytest.raises(ValueError, match="non-finite"):
        components_from_original(src)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    def spoil(tensors):
        if "lm_head" in str(tensors.keys()):
            del tensors["language_model.model.layers.1.mlp_moe_gen.up_proj.weight"]
            tensors["language_model.model.norm.weight"] = torch.ones(65)
            tensors["extra.weight"] = torch.ones(2, 3)
        else:
            tensors["encoder.mid.attn_1.q.weight"] = torch.ones(32, 32)
            del tensors["decoder.conv_out.bias"]
        return tensors

    message = refused(copy_checkpoint(tmp_path / "src", spoil), tmp_path, ValueError)
    for line in (
        "missing from ema.safetensors: language_model.model.layers.1.mlp_moe_gen.up_proj.weight [112, 64]",
        "wrong shape in ema.safetensors: language_model.model.norm.weight is [65], expected [64]",
        "unexpected in ema.safetensors: extra.weight [2, 3]",
        "wrong shape in ae.safetensors: encoder.mid.attn_1.q.weight is [32, 32], expected [32, 32, 1, 1]",
        "missing from ae.safetensors: decoder.conv_out.bias [3]",
    ):
        assert f"\n  {line}" in message
    assert "does not fit (5)" in message


def test_lost_tables_are_listed_like_other_tensors(tmp_path):
    def spoil(tensors):
        tensors.pop("vae2llm.weight", None)
        tensors.pop("vit_pos_embed.pos_embed", None)
        if "latent_pos_embed.pos_embed" in tensors:
            tensors["latent_pos_embed.pos_embed"] = torch.ones(255, 64)
        return tensors

    message = refused(copy_checkpoint(tmp_path / "src", spoil), tmp_path, ValueError)
    assert "missing from ema.safetensors: vae2llm.weight [64, 64]" in message
    assert "missing from ema.safetensors: vit_pos_embed.pos_embed [256, 64]" in message
    assert "latent_pos_embed.pos_embed has 255 rows, which is not a square number" in message

    src = copy_checkpoint(
        tmp_path / "lost", lambda t: {n: v for n, v in t.items() if n != "latent_pos_embed.pos_embed"}
    )
    line = "missing from ema.safetensors: latent_pos_embed.pos_embed"
    assert f"{line} [256, 64]" in refused(src, tmp_path, ValueError)
    (src / "config.json").unlink()
    assert f"{line} [?, 64]" in refused(src, tmp_path, ValueError)


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        (
            "vit_config.json",
            "num_hidden_layers",
            4,
            "missing from ema.safetensors: vit_model.vision_model.encoder.layers.2.",
        ),
        (
            "vit_config.json",
            "num_hidden_layers",
            2,
            "unexpected in ema.safetensors: vit_model.vision_model.encoder.layers.1.",
        ),
        ("llm_config.json", "num_hidden_layers", 1, "unexpected in ema.safetensors: language_model.model.layers.1."),
        ("llm_config.json", "vocab_size", 300, "language_model.lm_head.weight is [336, 64], expected [300, 64]"),
        ("llm_config.json", "hidden_size", None, "llm_config.json does not say hidden_size"),
        ("llm_config.json", "num_attention_heads", 5, "hidden_size 64 is not a multiple of num_attention_heads 5"),
    ],
)
def test_json_files_that_contradict_the_tensors(tmp_path, file, key, value, expected):
    src = copy_checkpoint(tmp_path / "src")
    content = json.loads((src / file).read_text())
    content.pop(key)
    (src / file).write_text(json.dumps(content | ({} if value is None else {key: value})))
    assert expected in refused(src, tmp_path, ValueError)


def test_indexes_that_cannot_be_followed(tmp_path):
    src = shard(copy_checkpoint(tmp_path / "src"))
    index = src / "model.safetensors.index.json"
    (src / "model-00002-of-00003.safetensors").rename(src / "elsewhere.safetensors")
    assert "model-00002-of-00003.safetensors" in refused(src, tmp_path, FileNotFoundError)
    good = index.read_text()
    index.write_text(good.replace("model-00002-of-00003.safetensors", "model-00002-of-00003.bin"))
    assert "model-00002-of-00003.bin" in refused(src, tmp_path, ValueError)
    index.write_text(good.replace("model-00002-of-00003.safetensors", "../elsewhere.safetensors"))
    assert "../elsewhere.safetensors" in refused(src, tmp_path, ValueError)
    for weights in ([1], {"a": 1}, {"a": ["x"]}):
        index.write_text(json.dumps({"weight_map": weights}))
        assert "has no weight_map" in refused(src, tmp_path, ValueError)
    index.write_text("{")
    assert "is not valid JSON" in refused(src, tmp_path, ValueError)
    shutil.copy(index, src / "other.safetensors.index.json")
    assert "several weight indexes" in refused(src, tmp_path, ValueError)


def test_way_back_stays_in_the_folder(tmp_path):
    there = tmp_path / "there"
    convert_to_diffusers(CHECKPOINT, there, shard_bytes=200_000)
    index = there / "transformer/diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    shutil.copy(there / "transformer" / names[0], tmp_path / "outside.safetensors")
    index.write_text(index.read_text().replace(names[0], "../../outside.safetensors"))
    with pytest.raises(ValueError, match="names files that are not loaded: ../../outside.safetensors"):
        convert_to_original(there, tmp_path / "dst")
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match="has no weight_map"):
        convert_to_original(there, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_way_back_refuses_what_it_cannot_map(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a pipeline folder"):
        convert_to_original(CHECKPOINT, tmp_path / "dst")
    there = tmp_path / "there"
    convert_to_diffusers(CHECKPOINT, there)
    file = there / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_in.weight"] = tensors["proj_in.weight"][:, :60].contiguous()
    tensors["layers.0.und.to_q.lora_A.weight"] = tensors.pop("layers.0.und.to_q.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        convert_to_original(there, tmp_path / "dst")
    for line in (
        "wrong shape in transformer/: proj_in.weight is [64, 60], expected [64, 64]",
        "missing from transformer/: layers.0.und.to_q.weight [64, 64]",
        "unexpected in transformer/: layers.0.und.to_q.lora_A.weight [64, 64]",
    ):
        assert line in str(caught.value)
    shutil.rmtree(there / "vae")
    with pytest.raises(FileNotFoundError, match="vae/config.json"):
        convert_to_original(there, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
