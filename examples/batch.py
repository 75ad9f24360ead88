"""Generate images for every line of a file, several at a time. Run it again to continue after an interruption.

python examples/batch.py prompts.txt --model echo-4o --out images --batch-size 4
"""

import argparse
from pathlib import Path

import torch

from echo4o import Echo4oPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", type=Path, help="text file with one prompt per line")
parser.add_argument("--model", required=True, help="pipeline folder or Hub repository")
parser.add_argument("--out", type=Path, default=Path("images"))
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--steps", type=int, default=49)
options = parser.parse_args()

prompts = [line.strip() for line in options.prompts.read_text("utf-8-sig").splitlines() if line.strip()]
missing = [number for number in range(len(prompts)) if not (options.out / f"{number:05d}.png").exists()]
options.out.mkdir(parents=True, exist_ok=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = Echo4oPipeline.from_pretrained(options.model, dtype=dtype).to(device)

for start in range(0, len(missing), options.batch_size):
    numbers = missing[start : start + options.batch_size]
    images = pipe(
        [prompts[number] for number in numbers],
        num_inference_steps=options.steps,
        # One generator per image: the noise depends on the number of the image, not on its batch.
        generator=[torch.Generator().manual_seed(number) for number in numbers],
    ).images
    for number, image in zip(numbers, images):
        image.save(options.out / f"{number:05d}.png")
print(f"{len(missing)} images in {options.out}")
