"""Settings of every test: no network, no writing into the user's caches, no more threads than cores."""

import gc
import os
import platform
import sys
import tempfile

import pytest

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
# Machines of one vendor round alike, so that results can be compared bit by bit with those that 0.1 recorded.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# Processes that together have more threads than there are cores wait for each other: tests would take six times as long.
_cores = os.cpu_count() or 1
_threads = max(1, _cores // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(min(_threads, int(os.environ.get("OMP_NUM_THREADS", _threads))))


@pytest.fixture(autouse=True)
def threads():
    """Gives torch its number of threads back."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish():
    # A tenth of the time would go to looking for garbage among the imported modules.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
