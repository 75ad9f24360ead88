"""Train a LoRA on a dataset from the Hub, then generate with it. Run it again to resume after an interruption.

python examples/train_lora.py --model owner/echo-4o --dataset owner/echo-4o-image --out runs/lora
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from echo4o import Echo4oPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="pipeline folder or Hub repository")
parser.add_argument("--dataset", required=True, help="Hub repository, or a folder that `echo4o dataset build` wrote")
parser.add_argument("--out", type=Path, default=Path("runs/lora"))
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--rank", type=int, default=32)
options = parser.parse_args()

settings = {  # changes to the recipe `lora_single_gpu`; see docs/training.md
    "model": options.model,
    "data.path": options.dataset,
    "output_dir": options.out,
    "steps": options.steps,
    "optimizer.warmup_steps": min(100, options.steps // 10),
    "tune.rank": options.rank,
    "checkpoints.every": 250,
    "images": "null",  # generate no images during training
}
changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
subprocess.run([sys.executable, "-m", "echo4o", "train", "lora_single_gpu", *changes, "--resume"], check=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = Echo4oPipeline.from_pretrained(options.model).to(device)
pipe.load_lora_weights(str(options.out / "adapter"))
pipe("a lighthouse made of glass", num_inference_steps=24).images[0].save(options.out / "lighthouse.png")
print(options.out / "lighthouse.png")
