"""Edit an image, or combine several. Every image that you pass is a reference.

python examples/edit.py "make it night" lighthouse.png --model echo-4o --out night.png
python examples/edit.py "the cup on the table" cup.png table.png --model echo-4o --out both.png
"""

import argparse

import torch
from PIL import Image

from echo4o import Echo4oPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("instruction")
parser.add_argument("references", nargs="+", help="image files, in the order in which the instruction names them")
parser.add_argument("--model", required=True, help="pipeline folder or Hub repository")
parser.add_argument("--out", default="edited.png")
parser.add_argument("--steps", type=int, default=49)
parser.add_argument("--image-guidance-scale", type=float, default=2.0, help="higher: closer to the references")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = Echo4oPipeline.from_pretrained(options.model, dtype=dtype).to(device)

references = [Image.open(path) for path in options.references]  # turned upright by the pipeline
edited = pipe(  # the result has the size of the last reference
    options.instruction,
    image=references,
    num_inference_steps=options.steps,
    image_guidance_scale=options.image_guidance_scale,
    generator=torch.Generator().manual_seed(0),
).images[0]
edited.save(options.out)
print(options.out)
