"""Comparable times: measured in turns after a warm-up, with their spread. Replays the matrix products of a run alone."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def in_turns(ways: dict[str, Callable[[], object]], repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times each, after one warm-up.

    The ways take turns, so that a slow moment of the machine falls on all of them.
    """
    for run in ways.values():
        run()
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            times[name].append(time.perf_counter() - start)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, times: dict[str, list[float]]) -> str:
    """Median, spread and ratio to the first way, as lines of text."""
    lines = [title]
    base = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        lines.append(f"  {name:<44} {median:8.3f} s  ({spread})  x{median / base:.2f}")
    return "\n".join(lines)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Context in which torch uses this many threads, whatever the environment sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def spread(values: list[float], digits: int = 1) -> str:
    """Median, and the range of the middle half."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 2 else (min(values), 0, max(values))
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Ratios of the measurements of each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


# --- matrix products ------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Records every matrix product and attention call, with arguments of the same shapes and strides."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.calls, self.weights, self.pool = [], weights, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution") or "scaled_dot_product" in name:
            arguments = [self._like(a) for a in args], {k: self._like(v) for k, v in (kwargs or {}).items()}
            self.calls.append((function, *arguments))
        return result

    def _like(self, value):
        """Weights themselves, which are read from memory as in the run; for other tensors one per shape, which stays in
        the processor's caches as the activations of a run do."""
        if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in self.weights:
            return value
        key = (tuple(value.shape), value.stride(), value.dtype, value.device)
        if key not in self.pool or value.dtype == torch.bool:
            self.pool[key] = value.detach().clone(memory_format=torch.preserve_format)
        return self.pool[key]


def record(run: Callable[[], object], *models: torch.nn.Module) -> list[tuple]:
    """Run a function and return its matrix products, with the weights of `models`."""
    recorder = _Recorder({p.untyped_storage().data_ptr() for model in models for p in model.parameters()})
    with recorder:
        run()
    return recorder.calls


@torch.no_grad()
def replay(calls: list[tuple]) -> None:
    """Compute the recorded products again."""
    for function, args, kwargs in calls:
        function(*args, **kwargs)
