"""Train BAGEL on rows of Echo-4o-Image: `python -m echo4o.training.train RECIPE.yaml`.

The whole of a run, in reading order: a recipe, the pipeline it starts from, an order of samples, optimizer steps, and
the pipeline folder that comes out. Accelerate spreads it over processes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.training.objective import LossTerms, add_noise, loss_terms
from echo4o.training.optimizers import build_optimizers
from echo4o.training.recipe import Objective, Recipe, RecipeError, load_recipe
from echo4o.training.samples import Dropout, PreparedRow, SampleMaker, TrainingBatch, collate


class NonFiniteLoss(RuntimeError):
    """The loss of a step is not a number; `ids` are the samples that made it so."""

    def __init__(self, step: int, ids: list[str]):
        self.step, self.ids = step, ids
        super().__init__(f"The loss of step {step} is not finite. Samples: {', '.join(ids)}.")


class TrainedModel(nn.Module):
    """The two models that learn, behind one forward pass."""

    def __init__(self, transformer: nn.Module, vision_model: nn.Module):
        super().__init__()
        self.transformer, self.vision_model = transformer, vision_model

    def forward(self, batch: TrainingBatch, time_shift: float) -> LossTerms:
        noised = None
        if batch.sequence.latents is not None:
            noised = add_noise(batch.sequence, batch.noise, batch.raw_time, time_shift)
        return loss_terms(self.transformer, self.vision_model, batch.sequence, noised)


def sample_order(rows: int, seed: int) -> Iterator[tuple[int, int]]:
    """(epoch, row) without end: every epoch is a new permutation."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for row in torch.randperm(rows, generator=generator).tolist():
            yield epoch, row
        epoch += 1


class BatchSource:
    """The batches of each step for one of `processes` processes.

    All processes walk the same order of samples; each step takes `batch_size` of them and deals them out in turn, so
    that a step's samples are the same for any number of processes. Prepared rows stay in memory.
    """

    def __init__(self, dataset, maker: SampleMaker, recipe: Recipe, sides: tuple[int, int], rank=0, processes=1):
        micro = recipe.micro_batch_size or -(-recipe.batch_size // processes)
        if recipe.batch_size % (micro * processes):
            raise RecipeError(
                f"batch_size={recipe.batch_size} does not divide into {processes} processes of micro batches of {micro}."
            )
        self.dataset, self.maker, self.sides = dataset, maker, sides
        self.order = sample_order(len(dataset), recipe.seed)
        self.batch_size, self.micro, self.rank, self.processes = recipe.batch_size, micro, rank, processes
        self._prepared: dict[int, PreparedRow] = {}

    def next_step(self) -> list[TrainingBatch]:
        """This process's micro-batches of the next step."""
        taken = [next(self.order) for _ in range(self.batch_size)][self.rank :: self.processes]
        new = sorted({row for _, row in taken} - self._prepared.keys())
        if new:
            self._prepared |= zip(new, self.maker.prepare(list(self.dataset.select(new))))
        samples = [self.maker.sample(self._prepared[row], epoch) for epoch, row in taken]
        parts = [samples[start : start + self.micro] for start in range(0, len(samples), self.micro)]
        return [collate(part, *self.sides) for part in parts]


def learning_rate_factor(kind: str, warmup_steps: int, step: int, progress: float) -> float:
    """What the learning rate is multiplied with before step `step` (from 0), `progress` of the run being done."""
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    decay = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[kind]
    return warmup * decay


def loss_counts(batches: list[TrainingBatch]) -> torch.Tensor:
    """(2,): noised values and labels in the batches, the denominators of the two losses."""
    labels = sum(int((batch.sequence.labels >= 0).sum()) for batch in batches)
    return torch.tensor([float(sum(batch.noise.numel() for batch in batches)), float(labels)])


def weighted_loss(terms: LossTerms, counts: torch.Tensor, settings: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch's share of the step's loss, and its shares (mse, cross-entropy) detached."""
    sums = terms.sums(settings.ce_reweight)
    shares = torch.stack([sums[0], sums[2]]) / counts.to(sums).clamp(min=1)
    weights = shares.new_tensor([settings.mse_weight, settings.ce_weight])
    return (shares * weights).sum(), shares.detach()


@dataclass
class TrainingResult:
    """What a run leaves behind."""

    pipeline_dir: Path
    log: list[dict]  # one entry per step: step, loss, mse, ce, lr, grad_norm, seconds, samples
    seconds: float


class Trainer:
    """State of a run. `Trainer(recipe).run()` is the whole of it.

    Args:
        recipe: what to do.
        pipeline: start from this pipeline instead of loading `recipe.model`.
        dataset: train on these rows (a `datasets.Dataset`) instead of loading `recipe.data`.
    """

    def __init__(self, recipe: Recipe, pipeline: Echo4oPipeline | None = None, dataset=None):
        self.recipe = recipe
        self.accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=recipe.device == "cpu")
        # Small steps vanish in 16-bit weights: learn in float32 and store at the end in `save_dtype`.
        self.pipeline = pipeline or Echo4oPipeline.from_pretrained(recipe.model, dtype=torch.float32)
        cast(self.pipeline, torch.float32)
        self.pipeline.vae.to(self.accelerator.device).requires_grad_(False)
        trained = TrainedModel(self.pipeline.transformer, self.pipeline.vision_model).train()
        self.optimizers = build_optimizers(recipe.optimizer, trained)
        self.base_rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.model, *self.optimizers = self.accelerator.prepare(trained, *self.optimizers)
        objective = recipe.objective
        dropout = Dropout(objective.text_dropout, objective.vit_dropout, objective.vae_dropout)
        self.batches = BatchSource(
            dataset if dataset is not None else load_rows(recipe),
            SampleMaker(self.pipeline, dropout, recipe.seed),
            recipe,
            (self.pipeline.transformer.config.max_latent_size, self.pipeline.vision_model.config.max_patches_per_side),
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def run(self) -> TrainingResult:
        """Train, log every step to `train_log.jsonl`, and save the pipeline folder."""
        recipe, start, log = self.recipe, time.monotonic(), []
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        quiet = not self.accelerator.is_main_process
        with (
            open(os.devnull if quiet else recipe.output_dir / "train_log.jsonl", "w", encoding="utf-8") as file,
            tqdm(total=recipe.steps, desc="training", unit="step", disable=quiet) as bar,
        ):
            for step in range(recipe.steps):
                progress = self._progress(step, time.monotonic() - start)
                if progress >= 1:
                    break
                entry = {"step": step, **self._step(step, progress), "seconds": time.monotonic() - start}
                entry["samples"] = (step + 1) * recipe.batch_size
                log.append(entry)
                if not quiet:
                    file.write(json.dumps({k: round(v, 6) for k, v in entry.items()}) + "\n")
                bar.update()
                bar.set_postfix_str(f"loss {smoothed(log):.4f}, {entry['samples'] / entry['seconds']:.0f} samples/s")
        return TrainingResult(self.save(), log, time.monotonic() - start)

    def _progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done: of its steps or of its time, whichever is more; the same on all processes."""
        if self.recipe.max_seconds is None:
            return step / self.recipe.steps
        share = torch.tensor(seconds / self.recipe.max_seconds, device=self.accelerator.device)
        return max(step / self.recipe.steps, float(self.accelerator.reduce(share, "mean")))

    def _step(self, step: int, progress: float) -> dict[str, float]:
        """One optimizer step over all processes and micro-batches; both losses are means over all of them."""
        settings, accelerator = self.recipe.optimizer, self.accelerator
        factor = learning_rate_factor(settings.schedule, settings.warmup_steps, step, progress)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.base_rates):
            group["lr"] = rate * factor
        batches = [batch.to(accelerator.device) for batch in self.batches.next_step()]
        counts = accelerator.reduce(loss_counts(batches).to(accelerator.device), "sum")
        shares = torch.zeros(2, device=accelerator.device)
        for batch in batches:
            # DDP averages gradients over processes where the sum is wanted.
            loss, share = weighted_loss(
                self.model(batch, self.recipe.objective.time_shift), counts, self.recipe.objective
            )
            accelerator.backward(loss * accelerator.num_processes)
            shares += share
        mse, ce = accelerator.reduce(shares, "sum").tolist()
        if not math.isfinite(mse + ce):
            raise NonFiniteLoss(step, self._offenders(batches))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        objective = self.recipe.objective
        loss = objective.mse_weight * mse + objective.ce_weight * ce
        return {"loss": loss, "mse": mse, "ce": ce, "lr": groups[0]["lr"], "grad_norm": float(norm)}

    @torch.no_grad()
    def _offenders(self, batches: list[TrainingBatch]) -> list[str]:
        """Ids of the samples whose own tokens have a loss that is not finite (all of them, if none stands out)."""
        ids = []
        for batch in batches:
            terms, sequence = self.model(batch, self.recipe.objective.time_shift), batch.sequence
            noised = sequence.segment_sample[sequence.gen_segment[sequence.gen_noised]]
            labelled = sequence.segment_sample[sequence.und_segment[sequence.labels >= 0]]
            wrong = {*noised[~terms.mse.isfinite().all(-1)].tolist()} if len(noised) else set()
            wrong |= {*labelled[~terms.cross_entropy.isfinite()].tolist()}
            ids += [batch.ids[index] for index in sorted(wrong)]
        return ids or [sample for batch in batches for sample in batch.ids]

    def save(self) -> Path:
        """Write the trained pipeline to `output_dir/pipeline` in `save_dtype`."""
        folder = self.recipe.output_dir / "pipeline"
        self.accelerator.unwrap_model(self.model).eval()
        if self.accelerator.is_main_process:
            cast(self.pipeline, getattr(torch, self.recipe.save_dtype))
            self.pipeline.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        return folder


def cast(pipeline: Echo4oPipeline, dtype: torch.dtype) -> None:
    """Bring the pipeline's weights to one dtype."""
    for module in (pipeline.transformer, pipeline.vision_model, pipeline.vae):
        nn.Module.to(module, dtype)  # diffusers' own `to` warns about modules kept in float32 that do not exist


def smoothed(log: list[dict], window: int = 50) -> float:
    """Mean loss of the last steps."""
    recent = log[-window:]
    return sum(entry["loss"] for entry in recent) / len(recent)


def load_rows(recipe: Recipe):
    """The recipe's dataset: a folder written by `save_to_disk`, or anything that `load_dataset` opens."""
    from datasets import load_dataset, load_from_disk

    data = recipe.data
    if (Path(data.path) / "dataset_info.json").is_file() and (Path(data.path) / "state.json").is_file():
        return load_from_disk(data.path)
    return load_dataset(data.path, data.name, split=data.split)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe named on the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m echo4o.training.train RECIPE.yaml", file=sys.stderr)
        return 2
    try:
        result = Trainer(load_recipe(arguments[0])).run()
    except (RecipeError, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Trained {len(result.log)} steps in {result.seconds:.0f} s. Pipeline: {result.pipeline_dir}")
    print(f'Next: echo4o generate "..." --model {result.pipeline_dir}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
