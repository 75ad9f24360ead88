"""Exponential moving average of the trained parameters. It is sharded if the model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from echo4o.training.model import trainable


class MovingAverage:
    """Float32 averages of the trained parameters. The decay warms up, so that early steps have little weight."""

    def __init__(self, model: nn.Module, decay: float, copy_first: bool = False):
        self.decay, self.copy_first, self.updates = decay, copy_first, 0
        self.values = {name: p.detach().clone().float() for name, p in trainable(model)}

    def decay_now(self) -> float:
        """The decay of the update that is counted last."""
        if self.copy_first and self.updates <= 1:
            return 0.0
        return min(self.decay, self.updates / (self.updates + 9))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the averages after an optimizer step."""
        self.updates += 1
        decay = self.decay_now()
        for name, parameter in trainable(model):
            self.values[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context, the model's parameters have the averaged values."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchange parameters and averages, one at a time: a copy of all of them may not fit into memory."""
        for name, parameter in trainable(model):
            value = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(value)
