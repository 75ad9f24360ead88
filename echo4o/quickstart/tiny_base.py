"""Makes what the quickstart starts from, and what is committed under ``base/``: ``python -m echo4o.quickstart.tiny_base``.

Everything comes from seeds: the tokenizer in a second, the VAE in about a quarter of an hour of one free core, and then
the base model. None of it sees held-out content; the VAE sees pictures only.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
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
    """Trains the VAE and saves it as ``folder/vae``, in 16 bit; returns what was saved."""
    vae = train_vae(settings or VaeTraining(), say=lambda line: print(line, flush=True)).to(STORED_DTYPE)
    _replace(folder / "vae", vae.save_pretrained)
    return load_vae(folder)


def load_tokenizer(folder: Path = BASE) -> Qwen2Tokenizer:
    """The tokenizer under ``folder/tokenizer``."""
    return Qwen2Tokenizer.from_pretrained(_existing(folder / "tokenizer"))


def load_vae(folder: Path = BASE) -> AutoencoderKL:
    """The VAE under ``folder/vae``, in float32 and eval mode."""
    return AutoencoderKL.from_pretrained(_existing(folder / "vae"), dtype=torch.float32).eval()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; `make tiny-base` makes it")
    return folder


def _replace(folder: Path, save) -> None:
    """Saves into the folder; an interrupted run leaves the old one as it was."""
    with replacing_folder(folder) as work:
        save(work)
        _forget_paths(work / "config.json")


def _forget_paths(config: Path) -> None:
    """Drops the folder that a configuration was loaded from: it says nothing on another machine."""
    if config.is_file():
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m echo4o.quickstart.tiny_base", description=__doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to make; default: all, in order")
    parser.add_argument("--out", type=Path, default=BASE, help="where; default: the package's own base folder")
    parser.add_argument("--minutes", type=float, help="end the VAE's training after so many minutes")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the weights depend on it in the last digits")
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
    print(f"made {', '.join(parts)} in {options.out}\nnext: echo4o quickstart")


if __name__ == "__main__":
    main()
