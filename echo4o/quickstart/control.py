"""The control of the quickstart: the same run from random weights, which shows how much the base model contributes.

`python -m echo4o.quickstart.control OUT` runs it, takes as long as a quickstart, and writes `base/control.json`, which
is part of every later report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import AutoTokenizer

from echo4o.quickstart.base_model import build_pipeline
from echo4o.quickstart.run import BASE, run


def measure(out: Path, base: Path = BASE, seed: int = 0) -> dict:
    """Runs the quickstart from random weights with the VAE and tokenizer of the base model; returns the score."""
    random = Path(out) / "random"
    vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32)
    build_pipeline(AutoTokenizer.from_pretrained(base / "tokenizer"), vae, seed + 1).save_pretrained(random)
    result = run(Path(out), seed=seed, base=random)
    control = result["scores"]["after"]["overall"] | {"training": result["training"]}
    (base / "control.json").write_text(json.dumps(control, indent=2) + "\n", "utf-8")
    return control


if __name__ == "__main__":
    print(measure(Path(sys.argv[1])))
