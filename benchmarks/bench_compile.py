"""Times regional compilation on this processor, and updates before and after it at both sizes of `sampling`."""

import copy
import shutil
import time
from argparse import Namespace

import torch

from benchmarks.bench_sampling import ROUNDS, THREADS, Case, middle_pipeline, quickstart_pipeline
from benchmarks.measure import in_turns, ratios, spread, threads


def main(options: Namespace) -> None:
    """Print one table."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        print("needs a C++ compiler (g++), which torch.compile writes code for")
        return
    print(f"{THREADS} threads, float32; medians of {ROUNDS} rounds, middle half")
    print("\n| one update | eager, ms | compiled, ms | eager / compiled | largest difference |")
    print("|---|---|---|---|---|")
    with threads(THREADS), torch.no_grad():
        for title, pipe, side in (("middle size", middle_pipeline(), 16), ("quickstart", quickstart_pipeline(), 4)):
            torch._dynamo.reset()
            fast = copy.copy(pipe)
            fast.transformer = copy.deepcopy(pipe.transformer)
            fast.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
            torch.manual_seed(0)
            plain = Case(pipe, side)
            torch.manual_seed(0)
            start = time.perf_counter()
            compiled = Case(fast, side)
            compiled.update(1)()
            seconds = time.perf_counter() - start
            for rows in (1, 2, 3):
                ways = plain.update(rows), compiled.update(rows)
                away = max((a - b).abs().max().item() for a, b in zip(*(way() for way in ways), strict=True))
                eager, code = in_turns(dict(zip(("eager", "compiled"), ways)), ROUNDS).values()
                cells = [spread([1000 * s for s in times]) for times in (eager, code)]
                name = f"{title}, {rows} row{'s' * (rows > 1)}"
                print(
                    f"| {name} | {cells[0]} | {cells[1]} | {spread(ratios(eager, code), 2)} | {away:.0e} |", flush=True
                )
            print(f"| {title}: compiling, once | | {seconds:.1f} s | | |", flush=True)
