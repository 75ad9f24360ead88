"""Arithmetic of an optimizer step over all processes: totals, denominators, the weighted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from echo4o.training.backbones.base import Backbone, LossTerm, TrainingBatch


@dataclass(frozen=True)
class StepTotals:
    """Counts that the processes sum up before the forward pass of a step: of this process, or of all."""

    denominators: dict[str, float]  # of each loss
    samples: float
    tokens: float
    flops: float
    stop_requests: float = 0  # processes that received a signal
    failures: float = 0  # processes that could not read their rows

    @classmethod
    def of(cls, backbone: Backbone, batches: Sequence[TrainingBatch], stop: bool, failed: bool) -> StepTotals:
        """The counts of this process."""
        names = backbone.loss_weights()
        counts = [backbone.denominators(batch) for batch in batches]
        return cls(
            denominators={name: sum(count[name] for count in counts) for name in names},
            samples=sum(len(batch.ids) for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            flops=sum(backbone.flops(batch) for batch in batches),
            stop_requests=stop,
            failures=failed,
        )

    def over_processes(self, accelerator: Accelerator) -> StepTotals:
        """The sums over all processes, in one reduction."""
        others = [self.samples, self.tokens, self.flops, self.stop_requests, self.failures]
        local = torch.tensor([*self.denominators.values(), *others], dtype=torch.float64)
        total = sum_over_processes(accelerator, local).tolist()
        losses = len(self.denominators)
        return StepTotals(dict(zip(self.denominators, total[:losses])), *total[losses:])


def sum_over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum, on the device of `values`."""
    if accelerator.num_processes == 1:
        return values
    total: Any = accelerator.reduce(values.to(accelerator.device), "sum")
    return total.to(values.device)


def weighted_loss(
    terms: dict[str, LossTerm], weights: dict[str, float], denominators: dict[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch's contribution to the total loss, and its detached contributions to each loss in order of `weights`."""
    sums = torch.stack([terms[name].weighted_sum() for name in weights])
    counts = torch.tensor([denominators[name] for name in weights], dtype=torch.float64)
    shares = sums / torch.where(counts > 0, counts, 1).to(sums)
    return (shares * shares.new_tensor(list(weights.values()))).sum(), shares.detach()


def non_finite_samples(terms: dict[str, LossTerm], ids: Sequence[str]) -> list[str]:
    """Ids of the samples with a non-finite loss."""
    wrong: set[int] = set()
    for term in terms.values():
        if len(term.sample):
            finite = term.values.isfinite().flatten(1).all(-1) if term.values.ndim > 1 else term.values.isfinite()
            wrong |= set(term.sample[~finite].tolist())
    return [ids[index] for index in sorted(wrong)]
