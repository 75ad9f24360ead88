"""What the manifest says of the checkpoint, its tokenizer and its pictures."""

from __future__ import annotations

import numpy as np

from echo4o.modeling.bagel.options_bagel import THINK_PROMPTS
from echo4o.modeling.bagel.original_configs import read_original_jsons
from echo4o.modeling.common.weights import read_json

from ..golden import GoldenFile
from ..report import Check
from .f_transforms import make_image
from .g_packing import special_tokens
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    json = file.json
    tokenizer = golden.components["tokenizer"]
    check(
        "special_tokens",
        list(vars(golden.tokens).values()),
        list(vars(special_tokens(json["special_tokens"])).values()),
    )
    check("tokenizer_len", len(tokenizer), json["tokenizer_len"])
    for text, ids in json["sample_encodings"].items():
        check(f"sample_encodings.{text!r}", tokenizer.encode(text, add_special_tokens=False), ids)
    with check.trying("config"):
        _check_config(golden, json["config"], check.of("config"))
    for name, image in json["images"].items():
        with check.trying(f"images.{name}"):
            picture = golden.picture(image["file"].removeprefix("inputs/"))
            check(f"images.{name}.size_wh", picture.size, image["size_wh"])
            check(f"images.{name}.mode", picture.mode, image["mode"])
            pattern = make_image(*image["size_wh"], image["seed"]).convert(image["mode"])
            check(f"images.{name}.pixels", np.array(picture), np.array(pattern))
    for name, ours in (("vlm_think", "text"), ("gen_think", "image")):
        check(f"system_prompts.{name}", THINK_PROMPTS[ours], json["system_prompts"][name])
    with check.trying("generation_config"):
        _check_generation(golden, json["special_tokens"]["eos_token_id"], check.of("generation_config"))
    json.note("transforms", "versions")  # each file repeats its transforms, and they are checked there


def _check_generation(golden, eos: int, check) -> None:
    """Token ids of generation_config.json, which no code reads, against what is read: tokenizer, manifest, llm_config."""
    folder = golden.directory / "checkpoint"
    if not (folder / "generation_config.json").is_file():
        return
    content = read_json(folder / "generation_config.json")
    llm = read_original_jsons(folder)[0]
    special = set(golden.components["tokenizer"].added_tokens_decoder)
    for key, value in content.items():
        if key.endswith("_token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            check(f"{key}: no special tokens", [i for i in ids if i not in special], [])
            if key == "eos_token_id":
                check(f"{key}: has the one that ends an answer", eos in ids, True)
            if type(value) is type(llm.get(key)):
                check(f"{key}: as in llm_config.json", value, llm[key])


def _check_config(golden, config, check) -> None:
    """Sizes found in the checkpoint are those that it was made with."""
    llm, vit = golden.components["transformer"].config, golden.components["vision_model"].config
    same = ("hidden_size", "intermediate_size", "num_attention_heads")
    got = {"llm": {name: llm[name] for name in (*same, "num_key_value_heads", "rope_theta")}}
    got["llm"]["num_hidden_layers"] = llm.num_layers
    got["vit"] = {name: vit[name] for name in same}
    got["vit"]["num_hidden_layers"] = vit.num_layers + 1  # the original drops the last layer
    for part, values in got.items():
        for name in values:
            check(f"{part}.{name}", values[name], config[part][name])
    check("vit.image_size", vit.max_patches_per_side, config["vit"]["image_size"] // vit.patch_size)
    check("vocab", llm.vocab_size, config["vocab"])
    check("max_latent_size", llm.max_latent_size, config["max_latent_size"])
    check("vit_max", vit.max_patches_per_side, config["vit_max"])
    config.note(*config)  # the rest says how the set was made: seeds, and arguments that each file repeats
