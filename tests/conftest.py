"""Settings of every test: no network, no writing into the user's caches, no more threads than cores."""

import gc
import os
import platform
import tempfile

# Before anything imports huggingface_hub or torch: both read these once.
_cache = tempfile.TemporaryDirectory(prefix="echo4o-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _cache.name
for _variable in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
    os.environ.pop(_variable, None)
# A forgotten request to the Hub fails at once; tests that need a Hub start one on the loopback and name it.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Every x86 machine rounds alike, so that results can be compared bit by bit with those that 0.1 recorded.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))


def pytest_collection_modifyitems(items):
    # Spread over processes, the long tests start first: none is left to run alone at the end.
    if _workers > 1:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    # A tenth of the time would go to looking for garbage among the imported modules.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
