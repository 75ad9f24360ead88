"""Train a model on rows of Echo-4o-Image: `echo4o train RECIPE.yaml`, or any launcher on this module.

A run reads a recipe, loads the pipeline to start from, takes optimizer steps, saves checkpoints and writes a pipeline
folder or an adapter. Accelerate distributes the run over processes. Model-specific code is in training/backbones.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object, set_seed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from echo4o.common.files import write_text
from echo4o.common.locks import FolderLock
from echo4o.training import checkpoints, export
from echo4o.training.backbones import backbone_class
from echo4o.training.backbones.base import Backbone, RowPreparation, TrainingBatch
from echo4o.training.checkpoints import CheckpointError, CheckpointFolder
from echo4o.training.data import SHUFFLE_BUFFER, PreparedRows, mixing_weights, open_sources
from echo4o.training.distillation import DistilledRows
from echo4o.training.ema import MovingAverage
from echo4o.training.engine import build_accelerator, hidden_buffers, loads_weights, reshard
from echo4o.training.held_out import split_rows
from echo4o.training.hub_uploads import HubUploads
from echo4o.training.model import TrainedModel, cast, load_backbone, set_up, trainable
from echo4o.training.optimizers import build_optimizers, learning_rate_factor
from echo4o.training.packing import FixedBatches, PackedBatches, merge_states
from echo4o.training.precompute import CachedBackbone
from echo4o.training.prefetch import Prefetch
from echo4o.training.recipe import RecipeError, TrainingRecipe
from echo4o.training.recipe_files import dump_recipe, load_recipe, parse_changes, read_recipe
from echo4o.training.resolution import ResizedRows
from echo4o.training.results import write_result
from echo4o.training.resuming import check_same_run
from echo4o.training.row_checks import check_features, check_rows, check_stored
from echo4o.training.row_images import DecodedRows, is_mapped, undecoded
from echo4o.training.run_log import PHASES
from echo4o.training.run_monitor import RunMonitor
from echo4o.training.sample_images import SampleImages
from echo4o.training.spikes import GradientSpikes, SpikeFilter
from echo4o.training.step import StepTotals, non_finite_samples, sum_over_processes, weighted_loss
from echo4o.training.stopping import CaughtSignals, DataError, NonFiniteLoss, TrainingStopped
from echo4o.training.validation import Validator
from echo4o.training.validation_log import ValidationLog
from echo4o.training.validation_result import ValidationResult


@dataclass
class TrainingResult:
    """The result of a run."""

    pipeline_dir: Path  # the pipeline's folder or the adapter's
    log: list[dict]  # one entry per step: step, loss, each loss by name, lr, grad_norm, seconds, samples, tokens, ...
    seconds: float
    validations: list[ValidationResult] = field(default_factory=list)


class Trainer:
    """A run: `Trainer(recipe).run()`.

    Args:
        recipe: the settings of the run.
        pipeline: start from this pipeline instead of loading `recipe.model`.
        dataset: train on these rows (a `datasets.Dataset`) instead of loading `recipe.data`.
    """

    def __init__(self, recipe: TrainingRecipe, pipeline=None, dataset=None):
        self.recipe, self.accelerator = recipe, build_accelerator(recipe)
        accelerator = self.accelerator
        keep = recipe.checkpoints.keep if recipe.checkpoints else 2
        self.checkpoints = CheckpointFolder(recipe.output_dir / "checkpoints", keep, accelerator.print)
        self._check_output()
        sources = (
            [dataset]
            if dataset is not None
            else open_sources(recipe.data, bool(recipe.packing), targets=recipe.distill is None)
        )  # fails before gigabytes are loaded
        check_features(sources)
        sources, validation_rows = split_rows(recipe, sources, accelerator)
        self.backbone = self._backbone(pipeline)
        self.pipeline = self.backbone.pipeline
        if recipe.on_bad_row == "stop":
            check_rows(sources, self.pipeline.config.get("max_references"))
        trained = TrainedModel(self.backbone).train()
        set_up(trained, recipe, self.backbone.component_classes)
        self._move_frozen_components()
        set_seed(
            recipe.seed, device_specific=True
        )  # only LoRA dropout uses it; everything else samples from named generators
        self.monitor = RunMonitor(recipe, accelerator, self.backbone, trained)
        self.optimizers = build_optimizers(recipe.optimizer, trained, self.backbone.component_classes)
        self.base_rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        with hidden_buffers(accelerator, trained):
            self.model, *self.optimizers = accelerator.prepare(trained, *self.optimizers)
        self.average = MovingAverage(self.model, recipe.ema.decay, recipe.ema.copy_first) if recipe.ema else None
        source, sources = self._row_preparation(sources)
        self.batches = self._batches(sources, source)
        self.images = SampleImages(recipe, accelerator, self.pipeline, validation_rows) if recipe.images else None
        self.spikes = SpikeFilter(recipe.optimizer.skip_above) if recipe.optimizer.skip_above else None
        self.uploads = HubUploads(recipe) if recipe.hub and accelerator.is_main_process else None
        self.validator = self.validations = None
        if recipe.validation and validation_rows:
            settings = (recipe, accelerator, self.backbone, source, validation_rows, self.monitor)
            self.validator = Validator(*settings)
            self.validations = ValidationLog(recipe.output_dir, accelerator, recipe.validation.stop_after)
        self.ahead = Prefetch(self.batches)
        self.step = 0
        self._signal: int | None = None  # that this process received
        self.stop_requested = False  # by a signal to any process

    def _backbone(self, pipeline) -> Backbone:
        if pipeline is None:
            return load_backbone(self.recipe, empty=not loads_weights(self.accelerator))
        cast(pipeline, torch.float32)
        return backbone_class(self.recipe.backbone)(pipeline, self.recipe)

    def _row_preparation(self, sources: list) -> tuple[RowPreparation, list]:
        """What prepares the rows, and the sources with images as it reads them."""
        recipe, cached = self.recipe, None
        if recipe.latents is not None:
            cached = CachedBackbone(self.backbone, recipe.latents)
        if recipe.distill is not None:
            cached = DistilledRows(self.backbone, recipe)
        if cached is not None:
            sources = [undecoded(rows) for rows in sources]
            check_stored(sources, cached.cache, cached.prepare, cached.cache.folder, whole=recipe.distill is not None)
            return cached, sources
        source: RowPreparation = self.backbone
        if recipe.resolution is not None:
            source = ResizedRows(self.backbone, recipe.resolution)
        return DecodedRows(source), [rows if is_mapped(rows) else undecoded(rows) for rows in sources]

    def _move_frozen_components(self) -> None:
        """Move the components that only encode rows to the device of the trained ones, without gradients."""
        for name, component in self.pipeline.components.items():
            if isinstance(component, torch.nn.Module) and name not in self.backbone.trained_components:
                stays = name in self.backbone.idle_components(self.recipe)
                component.to("cpu" if stays else self.accelerator.device).requires_grad_(False)

    def _check_output(self) -> None:
        """Raise RecipeError if the output folder holds another run or cannot be written to."""
        folder = self.recipe.output_dir
        if not self.recipe.resume and (last := self.checkpoints.last()):
            raise RecipeError(
                f"{folder} holds a run up to step {last.step}: continue it with --resume, or choose another output_dir."
            )
        try:
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output_dir: {folder} cannot be created: {error.strerror}") from error
        self.accelerator.wait_for_everyone()
        if not os.access(folder, os.W_OK):
            raise RecipeError(f"output_dir: {folder} cannot be written to.")

    def _batches(self, sources: list, source: RowPreparation) -> FixedBatches | PackedBatches:
        recipe, accelerator = self.recipe, self.accelerator
        weights = mixing_weights(recipe.data, sources, recipe.mixing)
        buffers = [SHUFFLE_BUFFER if data.shuffle_buffer is None else data.shuffle_buffer for data in recipe.data]
        on_bad = self.monitor.bad_row if recipe.on_bad_row == "skip" else None
        rows = PreparedRows(sources, weights, source, recipe.seed, recipe.cache_mb * 10**6, buffers, on_bad)
        process = (self.backbone.collate, accelerator.process_index, accelerator.num_processes)
        if recipe.packing:
            return PackedBatches(rows, recipe.packing, *process, report=self.monitor.too_long)
        assert recipe.batch_size is not None
        return FixedBatches(rows, recipe.batch_size, recipe.micro_batch_size, *process)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, catch_signals: bool = False) -> TrainingResult:
        """Train, log every step to `train_log.jsonl`, and write the pipeline or adapter.

        Args:
            catch_signals: SIGTERM and SIGINT end the run after a checkpoint, with [`TrainingStopped`].
        """
        recipe = self.recipe
        with closing(self.ahead):
            self._resume()
            with self.monitor.open(self.step), CaughtSignals(self._request_stop if catch_signals else None):
                if recipe.validation and self.step % recipe.validation.every == 0:
                    self._validate()  # the model before training, or where an interrupted run was
                while self.step < recipe.steps and (progress := self._progress()) < 1 and not self._ends_early():
                    before = self.ahead.state()
                    try:
                        entry = self._step(self.step, progress)
                    except (NonFiniteLoss, GradientSpikes, DataError):
                        if recipe.checkpoints:
                            self._save(before)
                        raise
                    self.step += 1
                    self.monitor.step(self.step, entry, self.ahead.facts())
                    self._after_step()
                self._validate()
        self._generate_images()
        folder = self._write_result()
        if self.uploads:
            self.uploads.finish(folder, self.step)
        validations = self.validations.results if self.validations else []
        self.monitor.close(validations)
        return TrainingResult(folder, self.monitor.log, self.monitor.seconds(), validations)

    def _after_step(self) -> None:
        recipe = self.recipe
        due = recipe.checkpoints is not None and self.step % recipe.checkpoints.every == 0
        if self.stop_requested:
            self._stop()
        if due:
            saved = self._save(self.ahead.state())
            if self.uploads and recipe.hub and self.step % recipe.hub.every == 0:
                self.uploads.start(saved, self.step)
        if recipe.validation and self.step % recipe.validation.every == 0:
            self._validate()
        if recipe.images and self.step % recipe.images.every == 0 and self.step < recipe.steps:
            self._generate_images()
        self.monitor.pause()

    def _stop(self) -> None:
        folder = self._save(self.ahead.state())
        raise TrainingStopped(self._signal or signal.SIGTERM, self.step, folder)

    def _progress(self) -> float:
        """The fraction of the run that is done, by steps or by time, whichever is larger; equal on all processes."""
        steps = self.step / self.recipe.steps
        if self.recipe.max_seconds is None:
            return steps
        share = torch.tensor(self.monitor.seconds() / self.recipe.max_seconds, device=self.accelerator.device)
        mean: Any = self.accelerator.reduce(share, "mean")
        return max(steps, float(mean))

    def _step(self, step: int, progress: float) -> dict[str, float]:
        """One optimizer step over all processes and micro-batches. Returns its log entry; losses are means over all."""
        accelerator, loss_weights = self.accelerator, self.backbone.loss_weights()
        rate = self._set_learning_rate(step, progress)
        times = [time.perf_counter()]
        batches, totals = self._next_batches()
        times.append(time.perf_counter())
        shares = torch.zeros(len(loss_weights), device=accelerator.device)
        for index, batch in enumerate(batches):
            with self._last_only(index == len(batches) - 1):
                loss, share = weighted_loss(self.model(batch), loss_weights, totals.denominators)
                # DDP and FSDP average gradients over processes where the sum is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            shares += share
        # waits for the device, as does float(norm) below
        losses = dict(zip(loss_weights, sum_over_processes(accelerator, shares).tolist()))
        times.append(time.perf_counter())
        if not all(map(math.isfinite, losses.values())):
            raise NonFiniteLoss(step, self._non_finite_samples(batches))
        norm: Any = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.max_grad_norm)
        skipped = self._skips(step, float(norm), batches)
        for optimizer in self.optimizers:
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
        if self.average and not skipped:
            self.average.update(self.model)
        times.append(time.perf_counter())
        loss = sum(weight * losses[name] for name, weight in loss_weights.items())
        entry = {"step": step, "loss": loss, **losses, "lr": rate, "grad_norm": float(norm)}
        entry |= {"skipped": float(skipped)} if self.spikes else {}
        entry |= {f"{phase}_seconds": end - start for phase, start, end in zip(PHASES, times, times[1:])}
        return entry | {"samples": totals.samples, "tokens": totals.tokens, "flops": totals.flops}

    def _skips(self, step: int, norm: float, batches: list[TrainingBatch]) -> bool:
        """Whether the step is left out because of its gradient norm, which is equal on all processes.

        Raises GradientSpikes if too many steps in a row are.
        """
        if self.spikes is None or not self.spikes.skips(norm):
            return False
        ids = gather_object([sample for batch in batches for sample in batch.ids])
        self.monitor.skipped(step, norm, self.spikes.median, ids)
        self.spikes.check(step, ids)
        return True

    def _set_learning_rate(self, step: int, progress: float) -> float:
        """Set every group's rate for this step and return the first one."""
        settings = self.recipe.optimizer
        factor = learning_rate_factor(settings.schedule, settings.warmup_steps, step, progress)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.base_rates):
            group["lr"] = rate * factor
        return groups[0]["lr"]

    def _next_batches(self) -> tuple[list[TrainingBatch], StepTotals]:
        """This process's batches of the next step, on its device, and the step's totals.

        Raises DataError on all processes if any of them cannot read its rows.
        """
        problem = None
        try:
            batches = self.ahead.next_step()
        except (ValueError, OSError) as error:
            batches, problem = [], str(error).strip() or repr(error)
        local = StepTotals.of(self.backbone, batches, self._signal is not None, problem is not None)
        totals = local.over_processes(self.accelerator)
        self.stop_requested = totals.stop_requests > 0
        if totals.failures:
            raise DataError("; ".join(p for p in gather_object([problem]) if p))
        return [batch.to(self.accelerator.device) for batch in batches], totals

    def _last_only(self, last: bool):
        """Reduce gradients after the last micro-batch only; after each one under FSDP, which must not hold unsharded gradients."""
        if last or self.accelerator.distributed_type == DistributedType.FSDP:
            return torch.enable_grad()
        return self.accelerator.no_sync(self.model)

    @torch.no_grad()
    def _non_finite_samples(self, batches: list[TrainingBatch]) -> list[str]:
        """Ids of the samples whose own loss is not finite; all samples of the step if there is none."""
        ids = [id for batch in batches for id in non_finite_samples(self.model(batch), batch.ids)]
        return gather_object(ids) or gather_object([sample for batch in batches for sample in batch.ids])

    # --- stopping and resuming --------------------------------------------------------------------------------------

    def _request_stop(self, signum: int, frame) -> None:
        self._signal = signum
        self.accelerator.print(f"{signal.Signals(signum).name}: stopping after this step, with a checkpoint ...")

    def _tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint; loading fills them in place."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers]
        tensors = {
            "model": {name: p.detach() for name, p in trainable(self.model)},
            "optimizer": get_optimizer_state_dict(self.model, optimizers, options=options),
        }
        return tensors | ({"ema": self.average.values} if self.average else {})

    def _save(self, data_state: dict) -> Path:
        """Write a checkpoint. `data_state`: this process's position in the data."""
        data = merge_states(gather_object([data_state]))
        state = {"step": self.step, "data": data, "seconds": self.monitor.seconds()}
        state |= {"recipe": self.recipe.model_dump(mode="json"), "updates": self.average and self.average.updates}
        state |= {"spikes": self.spikes.state()} if self.spikes else {}
        try:
            return self.checkpoints.save(self.accelerator, self.step, self._tensors(), state)
        except CheckpointError as error:
            last = self.checkpoints.last()
            kept = f"the last complete one is {last.folder}" if last else "there is no earlier one"
            raise CheckpointError(
                f"The checkpoint of step {self.step} could not be written: {error}; {kept}."
            ) from error

    def _resume(self) -> None:
        if not self.recipe.resume:
            return
        last = self.checkpoints.last()
        if last is None:
            self.accelerator.print(f"{self.checkpoints.folder} has no complete checkpoint: starting at step 0.")
            return
        state = last.state()
        check_same_run(read_recipe(state["recipe"]), self.recipe)
        tensors = self._tensors()
        checkpoints.load(last, self.accelerator, tensors)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers]
        set_optimizer_state_dict(self.model, inner, tensors["optimizer"], options=options)
        if self.average:
            self.average.updates = state["updates"]
        self.ahead.load_state(state["data"])
        self.step = state["step"]
        if self.spikes and "spikes" in state:
            self.spikes.load_state(state["spikes"])
        if self.validations:
            self.validations.resume(self.step)
            self._mark_best()
        self.monitor.resume(self.step, state["seconds"])
        self.accelerator.print(f"Resuming after step {self.step}, from {last.folder}.")

    # --- validation -------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Validate this step, unless it is done; keep the checkpoint of the best one."""
        if self.validator is None or self.validations is None or self.validations.has(self.step):
            return
        with self._exported_weights() as model:
            result = self.validator.evaluate(model, self.step, lambda: self._signal is not None)
        if result is None:
            self._stop()
            return
        if self.recipe.checkpoints and self.recipe.checkpoints.keep_best and self.validations.would_be_best(result):
            self._save(self.ahead.state())
        self.validations.add(result)
        self._mark_best()
        self.monitor.validation(result)

    def _mark_best(self) -> None:
        best = self.validations.best if self.validations else None
        if best and self.recipe.checkpoints and self.recipe.checkpoints.keep_best:
            self.checkpoints.mark_best(self.accelerator, best.step, best.loss)

    def _ends_early(self) -> bool:
        reason = self.validations.why_stop() if self.validations else None
        if reason:
            self.accelerator.print(reason)
        return reason is not None

    @contextmanager
    def _exported_weights(self) -> Iterator[TrainedModel]:
        """The model in evaluation mode, with the weights that an export has: the averages if there are any."""
        model = self.accelerator.unwrap_model(self.model).eval()
        with self.average.applied(model) if self.average else nullcontext():
            yield model
            reshard(model)
        model.train()

    # --- results ----------------------------------------------------------------------------------------------------

    def _write_result(self) -> Path:
        recipe, accelerator = self.recipe, self.accelerator
        return write_result(
            recipe, accelerator, self.model, self.pipeline, self.average, lambda: self._save(self.ahead.state())
        )

    def _generate_images(self) -> None:
        if self.images is not None:
            with self._exported_weights() as model:
                self.images.generate(model, self.step)


def parse_arguments(arguments: list[str]) -> TrainingRecipe:
    """The recipe of a command line: RECIPE [--set section.key=value ...] [--resume]."""
    parser = argparse.ArgumentParser("echo4o train", description="Train a model as a recipe describes.")
    parser.add_argument("recipe", help="a YAML file, or the name of a bundled recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a setting")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    given = parser.parse_args(arguments)
    return load_recipe(given.recipe, parse_changes(given.set) | ({"resume": True} if given.resume else {}))


def train(recipe: TrainingRecipe) -> TrainingResult:
    """Run the recipe as the command line does: signals save a checkpoint, and the recipe is kept beside the result."""
    first = os.environ.get("RANK", "0") == "0"
    with FolderLock(recipe.output_dir) if first else nullcontext():
        trainer = Trainer(recipe)
        if trainer.accelerator.is_main_process:
            write_text(recipe.output_dir / "recipe.yaml", dump_recipe(recipe))
        return trainer.run(catch_signals=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe named on the command line."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        result = train(recipe)
    except TrainingStopped as stop:
        if first:
            print(f"{stop}\nNext: the same command with --resume", file=sys.stderr)
        return 130 if stop.signum == signal.SIGINT else 0
    except (NonFiniteLoss, GradientSpikes, CheckpointError, export.ExportError, ValueError, OSError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if first:
        print(f"Trained {len(result.log)} steps in {result.seconds:.0f} s: {result.pipeline_dir}")
        run = result.pipeline_dir.parent
        if recipe.distill is not None:
            command = ["echo4o", "generate", "a lighthouse made of glass", "--model", recipe.model]
            print(f"Next: {shlex.join([*command, '--lora', str(result.pipeline_dir)])}")
        elif result.pipeline_dir.name == "adapter":
            command = ["echo4o", "export", str(run), "--merge", "--out", str(run / "merged")]
            print(f"Next: {shlex.join(command)}")
        else:
            command = ["echo4o", "generate", "a lighthouse made of glass", "--model", str(result.pipeline_dir)]
            print(f"Next: {shlex.join(command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
