"""Validation: the loss of fixed rows at fixed noise levels, equal for any number of processes.

Two validations of the same weights give the same numbers: times are fixed, and noise is named by the row. A validation
never changes the training: it uses no random state and has no gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from echo4o.training.backbones.base import (
    Backbone,
    LossTerm,
    RowPreparation,
    TrainingBatch,
    TrainingSample,
    WrappedPreparation,
)
from echo4o.training.data import PreparedRows, RowRef
from echo4o.training.held_out import TASKS, ValidationRows
from echo4o.training.recipe import TrainingRecipe
from echo4o.training.run_monitor import RunMonitor
from echo4o.training.step import sum_over_processes
from echo4o.training.stopping import DataError
from echo4o.training.validation_result import ValidationResult


class _FixedSamples(WrappedPreparation):
    """Prepares rows as in training; a row's sample is the list of its validation samples."""

    def __init__(self, source: RowPreparation, levels: Sequence[float]):
        super().__init__(source)
        self.levels = levels

    def sample(self, prepared: Any, epoch: int) -> Sequence[TrainingSample]:
        return self.source.validation_samples(prepared, self.levels)


@dataclass
class _Pass:
    """One forward pass: a batch with the task and the noise level (index; -1: none) of each sample."""

    batch: TrainingBatch
    tasks: list[int]
    levels: list[int]


class Validator:
    """Evaluates the rows of a run.

    Args:
        source: prepares rows: the backbone, or a cache of its latents.
        monitor: is told of rows that are left out: those that exceed a pack and, with `on_bad_row: skip`, unreadable ones.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        accelerator: Accelerator,
        backbone: Backbone,
        source: RowPreparation,
        rows: ValidationRows,
        monitor: RunMonitor,
    ):
        assert recipe.validation is not None
        self.recipe, self.accelerator, self.backbone, self.rows = recipe, accelerator, backbone, rows
        self.monitor, self.levels = monitor, source.noise_levels(recipe.validation)
        samples = _FixedSamples(source, self.levels)
        weights = [1.0] * len(rows.sources)
        self._prepared = PreparedRows(rows.sources, weights, samples, recipe.seed, recipe.cache_mb * 10**6)
        # As many samples as a forward pass of the training has.
        self._samples = recipe.micro_batch_size or -(-(recipe.batch_size or 0) // accelerator.num_processes)

    @torch.no_grad()
    def evaluate(
        self, model: torch.nn.Module, step: int, stop_requested: Callable[[], bool]
    ) -> ValidationResult | None:
        """Validate with the weights that the model has now, on all processes together.

        Args:
            model: with [`echo4o.training.model.TrainedModel`]'s forward pass, not wrapped in DDP.
            stop_requested: whether this process received a signal.

        Returns:
            The result, or None if a process received a signal.

        Raises:
            DataError: a row cannot be read.
        """
        start = time.monotonic()
        names = list(self.backbone.loss_weights())
        # Numerators and denominators: (losses, tasks, levels and none, 2); exact answers and all answers.
        sums = torch.zeros(len(names), len(TASKS), len(self.levels) + 1, 2, dtype=torch.float64)
        answers = torch.zeros(2, dtype=torch.float64)
        passes = self._passes()
        while True:
            item, problem = None, None
            try:
                item = next(passes, None)
            except (ValueError, OSError) as error:
                problem = str(error).strip() or repr(error)
            flags = torch.tensor([item is not None, stop_requested(), problem is not None], dtype=torch.float64)
            more, stops, failures = sum_over_processes(self.accelerator, flags).tolist()
            if failures:
                raise DataError("; ".join(p for p in gather_object([problem]) if p))
            if stops:
                return None
            if not more:
                break
            if item is not None:
                self._add(model, item, names, sums, answers)
            elif self.accelerator.distributed_type == DistributedType.FSDP:
                model(self._any_batch())  # the other processes gather weights: take part
        sums, answers = (sum_over_processes(self.accelerator, values) for values in (sums, answers))
        return self._result(step, names, sums, answers, time.monotonic() - start)

    def _add(self, model, item: _Pass, names: list[str], sums: torch.Tensor, answers: torch.Tensor) -> None:
        count = len(item.tasks)
        terms: dict[str, LossTerm] = model(item.batch.to(self.accelerator.device))
        for index, name in enumerate(names):
            totals, weights = sample_sums(terms[name], count)
            for task, level, total, weight in zip(item.tasks, item.levels, totals, weights):
                sums[index, task, level] += torch.tensor([total, weight])
            if terms[name].correct is not None:
                exact = exact_samples(terms[name], count)
                answers += torch.tensor([sum(e for e in exact if e is not None), sum(e is not None for e in exact)])

    # --- batches ---

    def _passes(self) -> Iterator[_Pass]:
        """This process's forward passes: every n-th row, as many samples together as training has in a pass."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(zip(self.rows.refs, self.rows.tasks))[rank::processes]
        waiting: list[tuple[TrainingSample, int, int]] = []
        for ref, task in mine:
            for sample, level in self._samples_of(ref, task):
                if waiting and not self._fits([s for s, _, _ in waiting], sample):
                    yield self._collated(waiting)
                    waiting = []
                waiting.append((sample, TASKS.index(task), level))
        if waiting:
            yield self._collated(waiting)

    def _samples_of(self, ref: RowRef, task: str) -> list[tuple[TrainingSample, int]]:
        try:
            samples: Any = self._prepared.samples([ref])[0]
        except (ValueError, OSError) as error:
            if self.recipe.on_bad_row == "stop":
                raise
            self.monitor.bad_row(str(error))
            return []
        packing = self.recipe.packing
        if packing and samples[0].full_length > packing.tokens:
            self.monitor.too_long(samples[0].id, samples[0].full_length)
            return []
        return list(zip(samples, range(len(samples)) if task != "answers" else [-1]))

    def _fits(self, waiting: list[TrainingSample], sample: TrainingSample) -> bool:
        if self.recipe.packing:
            return sum(map(len, waiting)) + len(sample) <= self.recipe.packing.tokens
        return len(waiting) < self._samples

    def _collated(self, waiting: Sequence[tuple[TrainingSample, int, int]]) -> _Pass:
        samples, tasks, levels = zip(*waiting)
        return _Pass(self.backbone.collate(samples), list(tasks), list(levels))

    def _any_batch(self) -> TrainingBatch:
        samples: Any = self._prepared.samples([self.rows.refs[0]])[0]
        return self.backbone.collate(samples[:1]).to(self.accelerator.device)

    # --- means ---

    def _result(
        self, step: int, names: list[str], sums: torch.Tensor, answers: torch.Tensor, seconds: float
    ) -> ValidationResult:
        def means(values: torch.Tensor) -> dict[str, float]:
            return {n: float(total / weight) for n, (total, weight) in zip(names, values) if weight > 0}

        losses = means(sums.sum((1, 2)))
        tasks = {task: means(sums[:, index].sum(1)) for index, task in enumerate(TASKS)}
        times = {f"{level:g}": means(sums[:, :, index].sum(1)) for index, level in enumerate(self.levels)}
        exact, count = answers.tolist()
        return ValidationResult(
            step=step,
            loss=sum(weight * losses.get(name, 0.0) for name, weight in self.backbone.loss_weights().items()),
            losses=losses,
            tasks={task: values for task, values in tasks.items() if values},
            times={level: values for level, values in times.items() if values},
            rows=len(self.rows.refs),
            exact_match=exact / count if count else None,
            seconds=seconds,
        )


def sample_sums(term: LossTerm, samples: int) -> tuple[list[float], list[float]]:
    """For each sample of a batch: the sum of a loss, and the number of its values.

    The weights of the training are left out: some depend on the batch, and validations must not.
    """
    values = term.values.float()
    width = values[0].numel() if len(values) else 1
    sums, index = values.flatten(1).sum(1) if values.ndim > 1 else values, term.sample.cpu()
    totals = torch.zeros(samples, dtype=torch.float64).index_add(0, index, sums.double().cpu())
    counts = torch.bincount(index, minlength=samples) * width
    return totals.tolist(), counts.tolist()


def exact_samples(term: LossTerm, samples: int) -> list[bool | None]:
    """Whether all labels of each sample are the likeliest tokens; None for a sample without labels.

    Greedy decoding then gives exactly the labels, because it sees the same tokens before each of them.
    """
    assert term.correct is not None
    index = term.sample.tolist()
    right: list[bool | None] = [None] * samples
    for sample, correct in zip(index, term.correct.tolist()):
        right[sample] = correct if right[sample] is None else right[sample] and correct
    return right
