"""Conversion: errors name every file, tensor and entry that is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo4o.modeling.bagel.convert import components_from_original, convert_to_diffusers, convert_to_original
from tests.modeling.checkpoints import CHECKPOINT, WEIGHT_FILES, copy_checkpoint, refused, shard


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
        "empty": (b"", "is not a safetensors file"),
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
