"""Creates the base model of the quickstart, which is committed under ``base/``: ``python -m echo4o.quickstart.tiny_base``.

All parts are trained from fixed seeds: the tokenizer in a second, the VAE in about a quarter of an hour on one idle core,
then the base model. Held-out content is not in their training data.
"""

import argparse
import json
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import Qwen2Tokenizer

from echo4o.common.files import replacing_folder
from echo4o.quickstart.tiny_tokenizer import train_tokenizer
from echo4o.quickstart.tiny_vae import VaeTraining, train_vae

BASE = Path(__file__).parent / "base"
PARTS = ("tokenizer", "vae", "model")
STORED_DTYPE = torch.bfloat16


def make_tokenizer(folder: Path = BASE) -> Qwen2Tokenizer:
    """Trains the tokenizer and saves it as ``folder/tokenizer``."""
    tokenizer = train_tokenizer()
    _replace(folder / "tokenizer", tokenizer.save_pretrained)
    return tokenizer


def make_vae(folder: Path = BASE, settings: VaeTraining | None = None) -> AutoencoderKL:
    """Trains the VAE and saves it in 16 bit as ``folder/vae``; returns the saved VAE."""
    vae = train_vae(settings or VaeTraining(), say=lambda line: print(line, flush=True))
    cast(torch.nn.Module, vae).to(STORED_DTYPE)  # the annotation of diffusers' `to` lacks its arguments
    _replace(folder / "vae", vae.save_pretrained)
    return load_vae(folder)


def load_tokenizer(folder: Path = BASE) -> Qwen2Tokenizer:
    """Loads the tokenizer from ``folder/tokenizer``."""
    return Qwen2Tokenizer.from_pretrained(_existing(folder / "tokenizer"))


def load_vae(folder: Path = BASE) -> AutoencoderKL:
    """Loads the VAE from ``folder/vae`` in float32 and eval mode."""
    return AutoencoderKL.from_pretrained(_existing(folder / "vae"), dtype=torch.float32).eval()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; `make tiny-base` creates it")
    return folder


def _replace(folder: Path, save) -> None:
    """Replaces the folder by what `save` writes; after an interruption the old one is unchanged."""
    with replacing_folder(folder) as work:
        save(work)
        _forget_paths(work / "config.json")


def _forget_paths(config: Path) -> None:
    """Removes the local path from which a configuration was loaded."""
    if config.is_file():
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m echo4o.quickstart.tiny_base", description=__doc__)
    parser.add_argument(
        "--part", choices=(*PARTS, "all"), default="all", help="the part to create; default: all, in order"
    )
    parser.add_argument(
        "--out", type=Path, default=BASE, help="the folder to write; default: the base folder of the package"
    )
    parser.add_argument("--minutes", type=float, help="end the training of the VAE after this time")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; the weights depend on it in the last digits"
    )
    options = parser.parse_args(arguments)
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; it must be above 0")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; it must be 1 or more")
    torch.set_num_threads(options.threads)
    parts = PARTS if options.part == "all" else (options.part,)
    options.out.mkdir(parents=True, exist_ok=True)
    if "tokenizer" in parts:
        make_tokenizer(options.out)
    if "vae" in parts:
        make_vae(options.out, VaeTraining(minutes=options.minutes))
    if "model" in parts:
        from echo4o.quickstart.base_model import train_base

        print(json.dumps(train_base(load_tokenizer(options.out), load_vae(options.out), options.out), indent=2))
    print(f"created {', '.join(parts)} in {options.out}\nnext: echo4o quickstart")


if __name__ == "__main__":
    main()
