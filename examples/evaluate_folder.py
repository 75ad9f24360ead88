"""Score a folder of images of any model on GenEval++ with a judge. Run it again to resume; no image is judged twice.

    OPENAI_API_KEY=... python examples/evaluate_folder.py images --prompts genevalpp.jsonl --out runs/scores

Name the images by the number of their prompt in the file: 1.png, 2.png, ... To use another server with the OpenAI
protocol, set OPENAI_BASE_URL and pass its model with --judge.
"""

import argparse
from pathlib import Path

from echo4o.evaluation import evaluate_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", type=Path)
parser.add_argument("--prompts", type=Path, required=True, help="the benchmark's prompts, one JSON object per line")
parser.add_argument("--benchmark", default="genevalpp")
parser.add_argument("--judge", default="openai:gpt-4.1-2025-04-14")
parser.add_argument("--out", type=Path, default=Path("runs/scores"))
options = parser.parse_args()

images = {path.stem: path for path in sorted(options.images.iterdir()) if path.suffix in (".png", ".jpg", ".jpeg")}
result = evaluate_images(options.benchmark, images, options.judge, options.out, prompts=options.prompts)

for name, group in result["groups"].items():
    print(f"{name:<24} {group['score']:.3f}  ({group['scored']} of {group['total']} images)")
print(f"score {result['score']:.3f}, coverage {result['coverage']:.1%}; see {options.out / 'report.html'}")
