"""The benchmarks, one file each; a new one is a file here and a line below."""

from echo4o.evaluation.benchmarks.base import Benchmark
from echo4o.evaluation.benchmarks.dpg.benchmark import DPGBench, DPGOneCall
from echo4o.evaluation.benchmarks.geneval.benchmark import GenEval
from echo4o.evaluation.benchmarks.genevalpp import GenEvalPP
from echo4o.evaluation.benchmarks.imagine_bench import ImagineBench
from echo4o.evaluation.benchmarks.omnicontext import OmniContext
from echo4o.evaluation.benchmarks.shapes4o.benchmark import Shapes4o

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b for b in (GenEvalPP(), ImagineBench(), OmniContext(), GenEval(), DPGBench(), DPGOneCall(), Shapes4o())
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of a name; `-` and `++` may be written."""
    plain = name.lower().replace("-", "_").replace("++", "pp")
    plain = {
        "geneval_pp": "genevalpp",
        "imaginebench": "imagine_bench",
        "omni_context": "omnicontext",
        "dpg_bench": "dpg",
    }.get(plain, plain)
    if plain not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[plain]
