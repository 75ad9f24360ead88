"""``python -m benchmarks [NAME ...]`` runs every bench_*.py beside this file, or the named ones."""

import argparse
import importlib
import platform
from pathlib import Path

import torch

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "parity" / "golden" / "checkpoint"


def main() -> None:
    """Run the benchmarks and say on what machine."""
    names = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures speed; prints ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all when none is given")
    parser.add_argument("--model", type=Path, default=GOLDEN, help="a pipeline or original checkpoint folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8, help="updates per picture")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, on {options.device}")
    for name in options.names or names:
        print(f"\n== {name}")
        importlib.import_module(f"benchmarks.bench_{name}").main(options)


if __name__ == "__main__":
    main()
