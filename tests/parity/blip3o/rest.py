"""What lies in a golden directory of BLIP3-o beside its numbered files: manifest, checkpoint, pictures, full sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from echo4o.modeling.blip3o.convert import ROOT_JSONS, TOKENIZER_FILES
from echo4o.modeling.blip3o.original_layout import EVA_FILE, read_eva
from echo4o.modeling.common.weights import component_tensors, read_header

from ..golden import Record
from ..report import Check, Report
from . import full_size
from .golden_set import GoldenSet

FILES = {
    "README.md",
    "FACTS.md",
    "manifest.json",
    "full_size.json",
    "checkpoint",
    "eva_clip_vision_tower",
    "inputs",
}


def check(golden: GoldenSet, report: Report) -> None:
    """Check the manifest, the EVA tower's file and the full sizes; report files that no check reads."""
    check = report.at("manifest")
    with check.trying():
        _check_manifest(golden, golden.manifest.json, check)
        golden.manifest.check_coverage(check)
    pixels = {name.partition(".")[0] for name in read_header(golden.directory / "b_eva.safetensors")}
    for name in golden.unused_pictures():
        if Path(name).stem.removeprefix("img_") in pixels:  # b_eva.py compares it
            continue
        report.at("inputs").fail(name, "picture not checked")
    with report.at("checkpoint").trying():
        _check_files(golden, report.at("checkpoint"))
    with report.at("eva_clip_vision_tower").trying():
        _check_eva(golden, report.at("eva_clip_vision_tower"))
    if (golden.directory / "full_size.json").is_file():
        with report.at("full_size").trying():
            content = json.loads((golden.directory / "full_size.json").read_text("utf-8"))
            full_size.check(content, report.at("full_size"))


def _check_manifest(golden: GoldenSet, json: Record, check: Check) -> None:
    pipe = golden.pipeline
    known = pipe.tokenizer.get_vocab()
    for token, number in json["special_ids"].items():
        check(f"special_ids.{token}", known.get(token), number)
    for text, ids in json["tokenizer_samples"].items():
        check(f"tokenizer_samples.{text!r}", pipe.tokenizer.encode(text, add_special_tokens=False), ids)
    for name, picture in json["pictures"].items():
        with check.trying(f"pictures.{name}"):
            pattern = make_image(picture["width"], picture["height"], picture["s"])
            check(f"pictures.{name}", np.array(golden.picture(f"img_{name}.png")), np.array(pattern))
    check("n_query", pipe.transformer.config.num_queries, json["n_query"])
    stored = component_tensors(golden.directory / "checkpoint")
    check("checkpoint_keys", sorted(stored), sorted(json["checkpoint_keys"]))
    with check.trying("config"):
        _check_config(golden, json["config"], check.of("config"))
    json.note("seed", "versions")


def _check_config(golden: GoldenSet, config: Record, check: Check) -> None:
    """Sizes found in the checkpoint are those that it was made with."""
    pipe = golden.pipeline
    text = pipe.language_model.config.text_config
    names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"kv": "num_key_value_heads", "inter": "intermediate_size"}
    for theirs, ours in names.items():
        check(theirs, getattr(text, ours), config[theirs])
    check("mrope", text.rope_parameters["mrope_section"], config["mrope"])
    vision = pipe.language_model.config.vision_config
    for name, value in config["vis"].items():
        check(f"vis.{name}", getattr(vision, {"in_chans": "in_channels"}.get(name, name)), value)
    _check_head(pipe.transformer.config, config["dit"], check.of("dit"))
    _check_tower(pipe.vision_model.config, config, check)
    for name, value in config["flow"].items():
        check(f"flow.{name}", pipe.scheduler.config[name], value)
    for part, component in (("unet", pipe.unet), ("vae", pipe.vae), ("euler", pipe.decoder_scheduler)):
        for name, value in config[part].items():
            check(f"{part}.{name}", component.config[name], value)
    check("max_len", pipe.config.tokenizer_max_length, config["max_len"])
    check("tie", pipe.language_model.config.tie_word_embeddings, config["tie"])
    check("with_eva", golden.original.eva == "checkpoint", config["with_eva"])
    config.note("n_und")  # an argument of each training row


def _check_head(ours, dit: Record, check: Check) -> None:
    names = {"input_size": "sample_size", "dim": "hidden_size", "n_layers": "num_layers"}
    names |= {"n_heads": "num_attention_heads", "n_kv_heads": "num_kv_heads", "latent_embedding_size": "condition_dim"}
    for name in ("input_size", "patch_size", "in_channels", "dim", "n_layers", "n_heads", "norm_eps", "qk_norm"):
        check(name, ours[names.get(name, name)], dit[name])
    check("n_kv_heads", ours.num_kv_heads, dit["n_kv_heads"] or dit["n_heads"])
    check("latent_embedding_size", ours.condition_dim, dit["latent_embedding_size"])
    inner, multiple = int(2 * (4 * dit["dim"]) / 3), dit["multiple_of"]
    if dit["ffn_dim_multiplier"] is not None:
        inner = int(dit["ffn_dim_multiplier"] * inner)
    check("ffn", ours.ffn_dim, multiple * -(-inner // multiple))
    check("learn_sigma", False, dit["learn_sigma"])


def _check_tower(ours, config: Record, check: Check) -> None:
    eva, names = config["eva"], {"width": "hidden_size", "head_width": "head_dim", "layers": "num_layers"}
    for name in ("image_size", "patch_size", "width", "head_width", "layers"):
        check(f"eva.{name}", ours[names.get(name, name)], eva[name])
    check("eva.mlp_ratio", ours.intermediate_size, int(eva["width"] * eva["mlp_ratio"]))
    check("pooling", f"early_pool2d_{ours.pooling_stride}", config["pooling"])


def _check_files(golden: GoldenSet, check: Check) -> None:
    folder = golden.directory / "checkpoint"
    read = {t.file for name in ("language_model", "transformer") for t in golden.original.tensors[name].values()}
    read |= {t.file for part in ("unet", "vae") for t in golden.original.tensors[part].values()}
    read |= {folder / name for name in (*ROOT_JSONS, *TOKENIZER_FILES)}
    if golden.original.eva == "checkpoint":
        read |= {t.file for t in golden.original.tensors["vision_model"].values()}
    decoder = folder / "diffusion-decoder"
    read |= {decoder / "model_index.json", decoder / "scheduler/scheduler_config.json"}
    read |= {decoder / part / "config.json" for part in ("unet", "vae")}
    read.add(decoder / "feature_extractor/preprocessor_config.json")  # describes what the target's pixels check
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in read:
            check.fail(str(path.relative_to(folder)), "file not checked")


def _check_eva(golden: GoldenSet, check: Check) -> None:
    """The tower's own file; where the checkpoint holds a tower as well, they are the same."""
    folder = golden.directory / Path(EVA_FILE).parent
    for path in sorted(folder.iterdir()):
        if path.name != Path(EVA_FILE).name:
            check.fail(path.name, "file not checked")
    tower = {name: stored.values for name, stored in read_eva(golden.directory / EVA_FILE).items()}
    ours = golden.pipeline.vision_model.state_dict()
    check("names", sorted(tower), sorted(ours))
    different = [name for name in tower if name in ours and not torch.equal(tower[name], ours[name])]
    check("values", different, [])


def make_image(width: int, height: int, s: int) -> Image.Image:
    """The pattern of a picture, from its size and number."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (x * 3 + y * 5 + 17 * s) % 256
    green = ((x * y) // 8 + 31 * s) % 256
    blue = (((x - width // 2) ** 2 + (y - height // 2) ** 2) // (4 + s)) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))
