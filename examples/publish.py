"""Publish a trained adapter with its card, and load it back from the Hub. Log in once with `hf auth login`.

python examples/publish.py runs/lora owner/my-lora --base-model owner/echo-4o
"""

import argparse
import subprocess
import sys

import torch

from echo4o import Echo4oPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="the folder of a run of `echo4o train`")
parser.add_argument("repository", help="owner/name; a missing repository is created and private")
parser.add_argument("--base-model", required=True, help="Hub repository of the pipeline that was trained")
parser.add_argument("--dry-run", action="store_true", help="list what would be published")
options = parser.parse_args()

command = [sys.executable, "-m", "echo4o", "push", options.run, options.repository, "--base-model", options.base_model]
subprocess.run([*command, *(["--dry-run"] if options.dry_run else [])], check=True)
if options.dry_run:
    sys.exit()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = Echo4oPipeline.from_pretrained(options.base_model).to(device)
pipe.load_lora_weights(options.repository)
pipe("a lighthouse made of glass", num_inference_steps=24).images[0].save("published.png")
print("published.png")
