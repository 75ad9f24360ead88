"""Generate an image from a prompt, on a GPU if there is one.

python examples/generate.py "a lighthouse made of glass" --model echo-4o --out lighthouse.png
"""

import argparse

import torch

from echo4o import Echo4oPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--model", required=True, help="pipeline folder or Hub repository")
parser.add_argument("--out", default="image.png")
parser.add_argument("--steps", type=int, default=49, help="sampler updates; fewer are faster and coarser")
parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same image")
parser.add_argument("--think", action="store_true", help="let the model plan the image in words first")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = Echo4oPipeline.from_pretrained(options.model, dtype=dtype).to(device)

result = pipe(
    options.prompt,
    num_inference_steps=options.steps,
    think=options.think,
    generator=torch.Generator().manual_seed(options.seed),
)
if result.texts:
    print(result.texts[0])
result.images[0].save(options.out)
print(options.out)
