"""Reasons for which a run ends early: signals, non-finite losses, unreadable rows."""

from __future__ import annotations

import signal
from pathlib import Path


class NonFiniteLoss(RuntimeError):
    """The loss of a step is NaN or infinite. `ids` names the samples with a non-finite loss."""

    def __init__(self, step: int, ids: list[str]):
        self.step, self.ids = step, ids
        super().__init__(f"The loss of step {step} is not finite. Samples: {', '.join(ids)}.")


class DataError(ValueError):
    """Rows of a step cannot be read; the message names them."""


class TrainingStopped(Exception):
    """A signal ended the run after it saved a checkpoint."""

    def __init__(self, signum: int, step: int, folder: Path):
        self.signum = signum
        super().__init__(f"Stopped by {signal.Signals(signum).name} after step {step}; the checkpoint is {folder}.")


class CaughtSignals:
    """A context in which SIGTERM and SIGINT call `handler`; None leaves them as they are."""

    def __init__(self, handler):
        self.handler = handler

    def __enter__(self):
        if self.handler:
            self.before = {s: signal.signal(s, self.handler) for s in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error):
        if self.handler:
            for signum, handler in self.before.items():
                signal.signal(signum, handler)
