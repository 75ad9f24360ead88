"""The control of the quickstart: the same run from random weights, so that the base's share in the score is known.

`python -m echo4o.quickstart.control OUT` measures it (as long as a quickstart) and writes `base/control.json`, which
every later report prints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer

from echo4o.quickstart.base_model import build_pipeline
from echo4o.quickstart.run import BASE, run


def measure(out: Path, base: Path = BASE, seed: int = 0) -> dict:
    """Run the quickstart from random weights around the base's VAE and tokenizer; returns what is written."""
    random = Path(out) / "random"
    vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32)
    build_pipeline(AutoTokenizer.from_pretrained(base / "tokenizer"), vae, seed + 1).save_pretrained(random)
    result = run(Path(out), seed=seed, base=random)
    control = result["scores"]["after"]["overall"] | {"training": result["training"]}
    (base / "control.json").write_text(json.dumps(control, indent=2) + "\n", "utf-8")
    return control


if __name__ == "__main__":
    print(measure(Path(sys.argv[1])))
