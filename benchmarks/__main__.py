"""``python -m benchmarks [NAME ...]`` runs every bench_*.py beside this file, or the named ones.

``python -m benchmarks compare A.json B.json`` compares the results of two runs.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.results import BenchmarkResults, compare, machine

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "parity" / "golden" / "checkpoint"
OUT = Path("build/benchmarks/results.json")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks, or compare two runs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        compare_files(arguments[1:])
    else:
        run(arguments)


def compare_files(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description="Compares two result files.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(compare(BenchmarkResults.read(options.before), BenchmarkResults.read(options.after)))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def run(arguments: list[str]) -> None:
    """Run the benchmarks; print one table of all ratios and their targets, and write them as JSON."""
    names = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures speed; prints ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all when none is given")
    parser.add_argument("--model", type=Path, default=GOLDEN, help="a pipeline or original checkpoint folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8, help="updates per image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT, help=f"the result file ({OUT})")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}, and compare")

    options.results = BenchmarkResults(machine=machine(options.device))
    print(options.results.machine)
    for name in options.names or names:
        print(f"\n== {name}")
        importlib.import_module(f"benchmarks.bench_{name}").main(options)
        options.results.write(options.out)  # an interrupted run leaves what it measured
    if options.results.ratios:
        print(f"\n== summary\n{options.results.table()}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
