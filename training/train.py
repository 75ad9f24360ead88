"""Train BAGEL on rows of Echo-4o-Image: `echo4o train RECIPE.yaml`, or any launcher on this module.

The whole of a run, in reading order: a recipe, the pipeline it starts from, an order of samples, optimizer steps,
checkpoints, and what comes out: a pipeline folder or an adapter. Accelerate spreads it over processes.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object, set_seed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from echo4o.common.files import replacing_folder, write_text
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.training import checkpoints, export
from echo4o.training.checkpoints import CheckpointError, CheckpointFolder
from echo4o.training.data import SHUFFLE_BUFFER, Rows, open_sources
from echo4o.training.ema import MovingAverage
from echo4o.training.engine import buffers_apart, build_accelerator, loads_weights
from echo4o.training.model import TrainedModel, cast, load_pipeline, set_up, trainable
from echo4o.training.objective import LossTerms
from echo4o.training.optimizers import build_optimizers
from echo4o.training.packing import FixedBatches, PackedBatches, merge_states
from echo4o.training.precompute import CachedSampleMaker, undecoded
from echo4o.training.prefetch import Prefetch
from echo4o.training.recipe import Lora, Objective, Recipe, RecipeError, dump_recipe, load_recipe, parse_changes
from echo4o.training.run_log import PHASES
from echo4o.training.samples import Dropout, SampleMaker, TrainingBatch
from echo4o.training.watch import Watch

# Settings that may change between the parts of one run: they decide nothing about what is computed in a step.
FREE = {"output_dir", "resume", "steps", "max_seconds", "checkpoints", "pictures", "trackers", "processes", "cache_mb"}
FREE |= {"save_dtype", "model", "data"}  # paths move; the weights and rows behind them must be the same


class NonFiniteLoss(RuntimeError):
    """The loss of a step is not a number; `ids` are the samples that made it so."""

    def __init__(self, step: int, ids: list[str]):
        self.step, self.ids = step, ids
        super().__init__(f"The loss of step {step} is not finite. Samples: {', '.join(ids)}.")


class DataError(ValueError):
    """Rows of a step cannot be read; the message names them."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint."""

    def __init__(self, signum: int, step: int, folder: Path):
        self.signum = signum
        super().__init__(f"Stopped by {signal.Signals(signum).name} after step {step}; all of it is in {folder}.")


def learning_rate_factor(kind: str, warmup_steps: int, step: int, progress: float) -> float:
    """What the learning rate is multiplied with before step `step` (from 0), `progress` of the run being done."""
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    decay = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[kind]
    return warmup * decay


def loss_counts(batches: list[TrainingBatch], settings: Objective) -> list[float]:
    """Noised values and labels (or the sum of their weights) in the batches: the denominators of the two losses."""
    labelled = [batch.sequence.labels >= 0 for batch in batches]
    if settings.ce_reweight:
        labels = sum(float(b.sequence.label_weights[m].sum()) for b, m in zip(batches, labelled))
    else:
        labels = float(sum(int(m.sum()) for m in labelled))
    return [float(sum(batch.noise.numel() for batch in batches)), labels]


def weighted_loss(terms: LossTerms, counts: torch.Tensor, settings: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch's share of the step's loss, and its shares (mse, cross-entropy) detached."""
    sums = terms.sums(settings.ce_reweight)
    shares = torch.stack([sums[0], sums[2]]) / torch.where(counts > 0, counts, 1).to(sums)
    weights = shares.new_tensor([settings.mse_weight, settings.ce_weight])
    return (shares * weights).sum(), shares.detach()


@dataclass
class TrainingResult:
    """What a run leaves behind."""

    pipeline_dir: Path  # or the adapter's folder
    log: list[dict]  # one entry per step: step, loss, mse, ce, lr, grad_norm, seconds, samples, tokens, ...
    seconds: float


class Trainer:
    """State of a run. `Trainer(recipe).run()` is the whole of it.

    Args:
        recipe: what to do.
        pipeline: start from this pipeline instead of loading `recipe.model`.
        dataset: train on these rows (a `datasets.Dataset`) instead of loading `recipe.data`.
    """

    def __init__(self, recipe: Recipe, pipeline: Echo4oPipeline | None = None, dataset=None):
        self.recipe, self.accelerator = recipe, build_accelerator(recipe)
        accelerator = self.accelerator
        keep = recipe.checkpoints.keep if recipe.checkpoints else 2
        self.checkpoints = CheckpointFolder(recipe.output_dir / "checkpoints", keep, accelerator.print)
        self._check_output()
        sources = [dataset] if dataset is not None else open_sources(recipe)  # before the gigabytes of a model
        self.pipeline = pipeline or load_pipeline(recipe, empty=not loads_weights(accelerator))
        if pipeline is not None:
            cast(pipeline, torch.float32)
        self.pipeline.vae.to(accelerator.device).requires_grad_(False)
        trained = TrainedModel(self.pipeline.transformer, self.pipeline.vision_model).train()
        set_up(trained, recipe)
        set_seed(recipe.seed, device_specific=True)  # of LoRA dropout alone: all other draws are named
        self.watch = Watch(recipe, accelerator, self.pipeline, trained)
        self.optimizers = build_optimizers(recipe.optimizer, trained)
        self.base_rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        with buffers_apart(accelerator, trained):
            self.model, *self.optimizers = accelerator.prepare(trained, *self.optimizers)
        self.average = MovingAverage(self.model, recipe.ema.decay) if recipe.ema else None
        self.batches = self._batches(sources)
        self.ahead = Prefetch(self.batches)
        self.step, self._signal = 0, 0

    def _check_output(self) -> None:
        """Raise RecipeError where the run has no place of its own to write to."""
        folder = self.recipe.output_dir
        if not self.recipe.resume and (last := self.checkpoints.last()):
            raise RecipeError(
                f"{folder} holds a run up to step {last.step}: go on with --resume, or choose another output_dir."
            )
        try:
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output_dir: {folder} cannot be made: {error.strerror}") from error
        self.accelerator.wait_for_everyone()
        if not os.access(folder, os.W_OK):
            raise RecipeError(f"output_dir: {folder} cannot be written to.")

    def _batches(self, sources: list):
        recipe, objective, accelerator = self.recipe, self.recipe.objective, self.accelerator
        dropout = Dropout(objective.text_dropout, objective.vit_dropout, objective.vae_dropout)
        if recipe.latents is None:
            maker = SampleMaker(self.pipeline, dropout, recipe.seed)
        else:
            maker = CachedSampleMaker(self.pipeline, dropout, recipe.seed, recipe.latents)
            sources = [undecoded(source) for source in sources]
        weights = [data.weight for data in recipe.data]
        buffers = [SHUFFLE_BUFFER if data.shuffle_buffer is None else data.shuffle_buffer for data in recipe.data]
        rows = Rows(sources, weights, maker, recipe.seed, recipe.cache_mb * 10**6, buffers)
        sides = (
            self.pipeline.transformer.config.max_latent_size,
            self.pipeline.vision_model.config.max_patches_per_side,
        )
        place = (sides, accelerator.process_index, accelerator.num_processes)
        if recipe.packing:
            return PackedBatches(rows, recipe, *place, report=self.watch.too_long)
        return FixedBatches(rows, recipe, *place)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, catch_signals: bool = False) -> TrainingResult:
        """Train, log every step to `train_log.jsonl`, and write what was trained.

        Args:
            catch_signals: SIGTERM and SIGINT end the run after a checkpoint, with [`Stopped`].
        """
        recipe = self.recipe
        with closing(self.ahead):
            self._resume()
            with self.watch.open(self.step), self._signals(catch_signals):
                while self.step < recipe.steps and (progress := self._progress()) < 1:
                    before = self.ahead.state()
                    try:
                        entry = self._step(self.step, progress)
                    except (NonFiniteLoss, DataError):
                        if recipe.checkpoints:
                            self._save(before)
                        raise
                    self.step += 1
                    self.watch.step(self.step, entry, self.ahead.facts())
                    self._after_step()
        folder = self.write()
        self.watch.close(self._draw_pictures)
        return TrainingResult(folder, self.watch.log, self.watch.seconds())

    def _after_step(self) -> None:
        recipe, signum = self.recipe, self.stop_asked
        every = recipe.checkpoints.every if recipe.checkpoints else 0
        if signum or (every and self.step % every == 0):
            folder = self._save(self.ahead.state())
            if signum:
                raise Stopped(signum, self.step, folder)
        if recipe.pictures and self.step % recipe.pictures.every == 0 and self.step < recipe.steps:
            self._draw_pictures()

    def _progress(self) -> float:
        """Share of the run that is done: of its steps or of its time, whichever is more; the same on all processes."""
        steps = self.step / self.recipe.steps
        if self.recipe.max_seconds is None:
            return steps
        share = torch.tensor(self.watch.seconds() / self.recipe.max_seconds, device=self.accelerator.device)
        return max(steps, float(self.accelerator.reduce(share, "mean")))

    def _step(self, step: int, progress: float) -> dict[str, float]:
        """One optimizer step over all processes and micro-batches; both losses are means over all of them."""
        settings, objective, accelerator = self.recipe.optimizer, self.recipe.objective, self.accelerator
        factor = learning_rate_factor(settings.schedule, settings.warmup_steps, step, progress)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.base_rates):
            group["lr"] = rate * factor
        moments = [time.perf_counter()]
        batches, problem = self._next_batches()
        # What all processes must know of each other, in one exchange: denominators, who was told to stop, who has no
        # data, amounts.
        mine = [*loss_counts(batches, objective), float(self._signal), float(problem is not None)]
        total = self._sum(torch.tensor([*mine, *self.watch.amounts(batches)], dtype=torch.float64))
        counts, self.stop_asked = total[:2], int(total[2]) and (self._signal or signal.SIGTERM)
        if total[3]:
            raise DataError("; ".join(p for p in gather_object([problem]) if p))
        batches = [batch.to(accelerator.device) for batch in batches]
        moments.append(time.perf_counter())
        shares = torch.zeros(2, device=accelerator.device)
        for index, batch in enumerate(batches):
            with self._last_only(index == len(batches) - 1):
                loss, share = weighted_loss(self.model(batch, objective.time_shift), counts, objective)
                # DDP and FSDP average gradients over processes where the sum is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            shares += share
        mse, ce = self._sum(shares).tolist()  # waits for the device, as does float(norm) below
        moments.append(time.perf_counter())
        if not math.isfinite(mse + ce):
            raise NonFiniteLoss(step, self._offenders(batches))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average:
            self.average.update(self.model)
        loss = objective.mse_weight * mse + objective.ce_weight * ce
        entry = {"step": step, "loss": loss, "mse": mse, "ce": ce, "lr": groups[0]["lr"], "grad_norm": float(norm)}
        moments.append(time.perf_counter())
        entry |= {f"{phase}_seconds": end - start for phase, start, end in zip(PHASES, moments, moments[1:])}
        return entry | dict(zip(("samples", "tokens", "flops"), total[4:].tolist()))

    def _next_batches(self) -> tuple[list[TrainingBatch], str | None]:
        """This process's batches of the next step, or why there are none."""
        try:
            return self.ahead.next_step(), None
        except (ValueError, OSError) as error:
            return [], str(error).strip() or repr(error)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").to(values.device)

    def _last_only(self, last: bool):
        """Processes exchange gradients after the last micro-batch; sharded ones after each, or they would hold all."""
        if last or self.accelerator.distributed_type == DistributedType.FSDP:
            return torch.enable_grad()
        return self.accelerator.no_sync(self.model)

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
        return gather_object(ids) or gather_object([sample for batch in batches for sample in batch.ids])

    # --- stopping and going on --------------------------------------------------------------------------------------

    def _signals(self, catch: bool):
        return _CaughtSignals(self._ask_to_stop) if catch else _CaughtSignals(None)

    def _ask_to_stop(self, signum: int, frame) -> None:
        self._signal = signum
        self.accelerator.print(f"{signal.Signals(signum).name}: stopping after this step, with a checkpoint ...")

    def _tensors(self) -> dict:
        """All that a checkpoint holds of the model; loading fills the same tensors in place."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers]
        tensors = {
            "model": {name: p.detach() for name, p in trainable(self.model)},
            "optimizer": get_optimizer_state_dict(self.model, optimizers, options=options),
        }
        return tensors | ({"ema": self.average.values} if self.average else {})

    def _save(self, data_state: dict) -> Path:
        """Write a checkpoint, with this process's position in the data."""
        data = merge_states(gather_object([data_state]))
        state = {"step": self.step, "data": data, "seconds": self.watch.seconds()}
        state |= {"recipe": self.recipe.model_dump(mode="json"), "updates": self.average and self.average.updates}
        try:
            return self.checkpoints.save(self.accelerator, self.step, self._tensors(), state)
        except CheckpointError as error:
            last = self.checkpoints.last()
            kept = f"the last one is {last.folder}" if last else "there is none before it"
            raise CheckpointError(
                f"The checkpoint of step {self.step} could not be written: {error}; {kept}."
            ) from error

    def _resume(self) -> None:
        if not self.recipe.resume:
            return
        last = self.checkpoints.last()
        if last is None:
            self.accelerator.print(f"{self.checkpoints.folder} holds no complete checkpoint: starting at step 0.")
            return
        state = last.state()
        check_same_run(Recipe.model_validate(state["recipe"]), self.recipe)
        tensors = self._tensors()
        checkpoints.load(last, self.accelerator, tensors)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers]
        set_optimizer_state_dict(self.model, inner, tensors["optimizer"], options=options)
        if self.average:
            self.average.updates = state["updates"]
        self.ahead.load_state(state["data"])
        self.step = state["step"]
        self.watch.resume(self.step, state["seconds"])
        self.accelerator.print(f"Going on after step {self.step}, from {last.folder}.")

    # --- what comes out ---------------------------------------------------------------------------------------------

    def write(self) -> Path:
        """Write the adapter, or the trained pipeline in `save_dtype`; averaged weights where there are any."""
        recipe, accelerator = self.recipe, self.accelerator
        dtype = getattr(torch, recipe.save_dtype)
        values = self.average.values if self.average else {n: p.detach() for n, p in trainable(self.model)}
        if isinstance(recipe.tune, Lora):
            folder = recipe.output_dir / "adapter"
            whole = {name: _whole(value) for name, value in values.items()}  # small; every process takes part
            if accelerator.is_main_process:
                export.write_adapter(folder, self.pipeline.transformer, recipe.tune, whole, torch.float32)
        elif accelerator.distributed_type == DistributedType.FSDP:
            folder = recipe.output_dir / "pipeline"
            saved = self._save(self.ahead.state())
            if accelerator.is_main_process:
                export.export_checkpoint(checkpoints.Checkpoint(saved), folder)
        else:
            folder = recipe.output_dir / "pipeline"
            accelerator.unwrap_model(self.model).eval()
            if accelerator.is_main_process:
                with torch.no_grad():
                    for name, parameter in trainable(self.model) if self.average else ():
                        parameter.copy_(values[name])
                cast(self.pipeline, dtype)
                with replacing_folder(folder) as work:
                    self.pipeline.save_pretrained(work)
        accelerator.wait_for_everyone()
        return folder

    def _draw_pictures(self) -> None:
        if self.recipe.pictures is None:
            return
        model = self.accelerator.unwrap_model(self.model).eval()
        if self.accelerator.is_main_process:
            self.watch.draw(self.pipeline, self.step)
        model.train()
        self.accelerator.wait_for_everyone()


class _CaughtSignals:
    """Within, SIGTERM and SIGINT call `handler` (None: as usual)."""

    def __init__(self, handler):
        self.handler = handler

    def __enter__(self):
        if self.handler:
            self.before = {s: signal.signal(s, self.handler) for s in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error):
        if self.handler:
            for signum, handler in self.before.items():
                signal.signal(signum, handler)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def check_same_run(before: Recipe, now: Recipe) -> None:
    """Raise RecipeError where a resumed run would not be the one that was interrupted."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    changed = [
        f"{key} ({old[key]!r} before, {new[key]!r} now)" for key in new if key not in FREE and old[key] != new[key]
    ]
    if len(before.data) != len(now.data):
        changed.append("data (another number of datasets)")
    if changed:
        raise RecipeError(f"The run that is resumed had other settings: {'; '.join(changed)}.")


def parse_arguments(arguments: list[str]) -> Recipe:
    """The recipe of a command line: RECIPE [--set section.key=value ...] [--resume]."""
    parser = argparse.ArgumentParser("echo4o train", description="Train as a recipe says.")
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes along")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a setting")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    given = parser.parse_args(arguments)
    return load_recipe(given.recipe, parse_changes(given.set) | ({"resume": True} if given.resume else {}))


def train(recipe: Recipe) -> TrainingResult:
    """A whole run, as the command line does it."""
    trainer = Trainer(recipe)
    if trainer.accelerator.is_main_process:
        write_text(recipe.output_dir / "recipe.yaml", dump_recipe(recipe))
    return trainer.run(catch_signals=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe named on the command line."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        result = train(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except Stopped as stop:
        if first:
            print(f"{stop}\nNext: the same command with --resume", file=sys.stderr)
        return 130 if stop.signum == signal.SIGINT else 0
    except (NonFiniteLoss, CheckpointError, export.ExportError, ValueError, OSError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if first:
        print(f"Trained {len(result.log)} steps in {result.seconds:.0f} s: {result.pipeline_dir}")
        run = result.pipeline_dir.parent
        if result.pipeline_dir.name == "adapter":
            print(f"Next: echo4o export {run} --merge --out {run / 'merged'}")
        else:
            print(f'Next: echo4o generate "a lighthouse made of glass" --model {result.pipeline_dir}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
