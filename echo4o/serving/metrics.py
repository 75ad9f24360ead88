"""Counters of a server in the text format of Prometheus."""

import threading
from collections import Counter, defaultdict

_HELP = {
    "requests": "Requests by path and status.",
    "images": "Generated images.",
    "answers": "Answers of the chat model.",
    "batches": "Calls of the pipeline.",
    "busy_seconds": "Seconds spent in calls of the pipeline.",
    "rejected": "Requests rejected because the queue was full.",
    "cancelled": "Images and answers cancelled by their clients.",
    "failed": "Images and answers that ended with an error.",
}
_SIZES = (1, 2, 4, 8, 16)


class Metrics:
    """Counters, safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._requests: Counter[tuple[str, int]] = Counter()
        self._sizes: Counter[int] = Counter()

    def count(self, name: str, number: float = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def request(self, path: str, status: int) -> None:
        with self._lock:
            self._requests[path, status] += 1

    def batch(self, size: int, seconds: float, chat: bool) -> None:
        """Count a call of the pipeline."""
        with self._lock:
            self._counts["batches"] += 1
            self._counts["busy_seconds"] += seconds
            self._counts["answers" if chat else "images"] += size
            self._sizes[size] += 1

    def __getitem__(self, name: str) -> float:
        return self._counts[name]

    @property
    def batch_sizes(self) -> dict[int, int]:
        """Number of calls by batch size."""
        return dict(self._sizes)

    def text(self, **gauges: float) -> str:
        """All metrics; `gauges` are current values by name."""
        with self._lock:
            lines = []
            for name, help_text in _HELP.items():
                lines += [f"# HELP echo4o_{name}_total {help_text}", f"# TYPE echo4o_{name}_total counter"]
                if name == "requests":
                    for (path, status), number in sorted(self._requests.items()):
                        lines.append(f'echo4o_requests_total{{path="{path}",status="{status}"}} {number}')
                else:
                    lines.append(f"echo4o_{name}_total {self._counts[name]:g}")
            lines += ["# HELP echo4o_batch_size Images or answers of a call.", "# TYPE echo4o_batch_size histogram"]
            for bound in _SIZES:
                number = sum(count for size, count in self._sizes.items() if size <= bound)
                lines.append(f'echo4o_batch_size_bucket{{le="{bound}"}} {number}')
            total = sum(self._sizes.values())
            lines.append(f'echo4o_batch_size_bucket{{le="+Inf"}} {total}')
            lines.append(f"echo4o_batch_size_sum {sum(size * count for size, count in self._sizes.items())}")
            lines.append(f"echo4o_batch_size_count {total}")
            for name, value in gauges.items():
                lines += [f"# TYPE echo4o_{name} gauge", f"echo4o_{name} {value:g}"]
        return "\n".join(lines) + "\n"
