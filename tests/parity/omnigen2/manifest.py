"""What the manifest says of the checkpoint, its tokenizer and its pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..golden import GoldenFile
from ..report import Check
from .golden_set import GoldenSet


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """The pattern that the golden set's pictures are made of (its README)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (x * 3 + y * 5 + 17 * seed) % 256
    green = ((x * y) // 8 + 31 * seed) % 256
    blue = (((x - width // 2) ** 2 + (y - height // 2) ** 2) // (4 + seed)) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    json, pipe = file.json, golden.pipe
    tokenizer = pipe.tokenizer
    special = json["special_tokens"].plain()
    check("special_tokens", [tokenizer.convert_tokens_to_ids(token) for token in special], list(special.values()))
    check("tokenizer_len", len(tokenizer), json["tokenizer_len"])
    for name in ("pad_token_id", "eos_token_id", "padding_side"):
        check(name, getattr(tokenizer, name), json[name])
    for text, ids in json["sample_encodings"].items():
        check(f"sample_encodings.{text!r}", pipe.token_ids(text), ids)
    for name, image in json["images"].items():
        with check.trying(f"images.{name}"):
            picture = golden.picture(name.removeprefix("inputs/"))
            check(f"images.{name}.size_wh", picture.size, image["size_wh"])
            check(f"images.{name}.mode", picture.mode, image["mode"])
            check(f"images.{name}.pixels", np.array(picture), np.array(make_image(*image["size_wh"], image["seed"])))
    for name, count in json["parameters"].items():
        got = sum(p.numel() for p in getattr(pipe, name).parameters())
        check(f"parameters.{name}", got, count)
    with check.trying("config"):
        _check_config(pipe, json["config"], check.of("config"))
    with check.trying("files"):
        for name, size in json["files"].items():
            check(f"files.{name}", (golden.directory / name).is_file(), True)
            assert isinstance(size, int)
    json.note("set", "reference", "seed", "prompts", "negative_prompt", "versions")  # how the set was made


def _check_config(pipe, config, check) -> None:
    """Sizes found in the checkpoint are those that it was made with."""
    for name, value in config["transformer"].items():
        got = pipe.transformer.config[name]
        check(f"transformer.{name}", got if value is None else list(got) if isinstance(value, list) else got, value)
    for name, value in config["vae"].items():
        got = pipe.vae.config[name]
        check(f"vae.{name}", list(got) if isinstance(value, list) else got, value)
    text, mllm = pipe.mllm.config.text_config, config["mllm"]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        check(f"mllm.{name}", getattr(text, name), mllm[name])
    check("mllm.mrope", text.rope_parameters["mrope_section"], mllm["mrope"])
    check("mllm.theta", text.rope_parameters["rope_theta"], mllm["theta"])
    check("mllm.tie", pipe.mllm.config.tie_word_embeddings, mllm["tie"])
    vision = pipe.mllm.config.vision_config
    for name, value in config["vision"].items():
        check(f"vision.{name}", getattr(vision, name), value)
    check("vocab", text.vocab_size, config["vocab"])
    config.note(*config)  # seeds and arguments that each file repeats
