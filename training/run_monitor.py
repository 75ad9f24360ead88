"""Monitoring of a run: log, progress bar, trackers, and `run.html` at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from echo4o.common import files
from echo4o.common.json_lines import JsonLines, JsonLinesWriter
from echo4o.training.backbones.base import Backbone
from echo4o.training.engine import matrix_rate, memory_gb
from echo4o.training.model import count_parameters
from echo4o.training.recipe import TrainingRecipe
from echo4o.training.report import write_report
from echo4o.training.run_log import LOG_FILE, phase_shares, rounded, smoothed, to_lines
from echo4o.training.validation_result import ValidationResult


class RunMonitor:
    """Writes the log, the progress bar and the trackers of a run. Only the main process writes.

    Args:
        trained: the trained components, before Accelerate wraps them.
    """

    def __init__(self, recipe: TrainingRecipe, accelerator: Accelerator, backbone: Backbone, trained: torch.nn.Module):
        self.recipe, self.accelerator, self.quiet = recipe, accelerator, not accelerator.is_main_process
        self.log: list[dict] = []
        self.parts = count_parameters(trained, type(backbone))
        self.losses = list(backbone.loss_weights())
        dtype = torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float32
        self.rate = matrix_rate(accelerator.device, dtype) * accelerator.num_processes
        self._earlier, self._start, self._last = 0.0, time.monotonic(), 0.0
        self._reported: set[str] = set()
        self._bad: set[str] = set()
        self._validated: ValidationResult | None = None  # the last one

    def seconds(self) -> float:
        """Seconds of training, including the time before interruptions."""
        return self._earlier + time.monotonic() - self._start

    def resume(self, step: int, seconds: float) -> None:
        """Continue the log of a run that has done `step` steps in `seconds`."""
        self._earlier, self._start = seconds, time.monotonic()
        if not self.quiet:
            self.log = [entry for entry in JsonLines(self._log_file) if entry["step"] < step]

    @property
    def _log_file(self) -> Path:
        return self.recipe.output_dir / LOG_FILE

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Open the log, the progress bar and the trackers for the duration of the run."""
        recipe = self.recipe
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        if self._earlier == 0:
            self._start = time.monotonic()
        self._last = self.seconds()
        if recipe.trackers:
            options = {"wandb": {"dir": str(recipe.output_dir), "name": recipe.output_dir.name}}
            self.accelerator.init_trackers("echo4o", _flat(recipe.model_dump(mode="json")), options)
        if not self.quiet:
            trained = ", ".join(f"{n['trained']:,} of {part}" for part, n in self.parts.items() if n["trained"])
            count, kind = self.accelerator.num_processes, self.accelerator.distributed_type.value.lower()
            where = f"{count} processes, {kind}" if count > 1 else "1 process"
            tqdm.write(f"training: {trained} ({where})")
        with (
            self._open_log() as self._lines,
            tqdm(total=recipe.steps, initial=step, desc="training", unit="step", disable=self.quiet) as self._bar,
        ):
            try:
                yield
            except BaseException:
                self._end_trackers()
                raise

    def _end_trackers(self) -> None:
        if self.recipe.trackers:
            self.accelerator.end_training()

    def _open_log(self):
        """A writer of the log file, which starts with the entries of earlier steps."""
        if self.quiet:
            return nullcontext()
        files.write_text(self._log_file, to_lines(self.log))
        return closing(JsonLinesWriter(self._log_file))

    def step(self, step: int, entry: dict, facts: dict[str, float]) -> None:
        """Log a finished step: file, progress bar and trackers. `step` counts from 1."""
        now = self.seconds()
        duration, self._last = max(now - self._last, 1e-9), now
        total = entry["samples"] + (self.log[-1]["samples"] if self.log else 0)
        speed = {"tokens_per_second": entry["tokens"] / duration, "mfu": entry.pop("flops") / duration / self.rate}
        memory = memory_gb(self.accelerator.device)
        entry |= {"seconds": now, "samples": total} | speed | {"memory_gb": memory} | facts
        self.log.append(entry)
        if self._lines:
            self._lines.append(rounded(entry))
        if self.recipe.trackers:
            self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=step)
        self._bar.update()
        validated = f", validation {self._validated.loss:.4f}" if self._validated else ""
        packed = f", packs {facts['packing_efficiency']:.0%} full" if facts else ""
        self._bar.set_postfix_str(
            f"loss {smoothed(self.log):.4f}{validated}, {speed['tokens_per_second']:.0f} tokens/s, mfu {speed['mfu']:.0%}, "
            f"data {phase_shares(self.log)['data']:.0%}, {memory:.1f} GB{packed}"
        )

    def validation(self, result: ValidationResult) -> None:
        """Show a validation: terminal, progress bar and trackers."""
        self._validated = result
        if self.recipe.trackers:
            self.accelerator.log({f"validation/{k}": v for k, v in result.flat().items()}, step=result.step)
        if not self.quiet:
            tasks = [f"{task} {name} {v:.4f}" for task, losses in result.tasks.items() for name, v in losses.items()]
            exact = [] if result.exact_match is None else [f"{result.exact_match:.0%} of answers exact"]
            when = f"after step {result.step}" if result.step else "before training"
            tqdm.write(f"validation {when}: loss {result.loss:.4f} ({', '.join(tasks + exact)})")

    def pause(self) -> None:
        """Do not count the time since the last step as part of the next one."""
        self._last = self.seconds()

    def too_long(self, sample: str, tokens: int) -> None:
        """Record a sample that does not fit into a pack: always in a file, and once on the terminal."""
        file = self.recipe.output_dir / f"too_long_{self.accelerator.process_index}.jsonl"
        with closing(JsonLinesWriter(file)) as lines:
            lines.append({"id": sample, "tokens": tokens})
        if sample not in self._reported:
            self._reported.add(sample)
            if len(self._reported) <= 10:
                limit = self.recipe.packing.tokens if self.recipe.packing else 0
                tqdm.write(f"left out: {sample} has {tokens} tokens, packing.tokens is {limit} ({file.name})")

    def bad_row(self, problem: str) -> None:
        """Record a row that cannot be read: in a file, and the first ones on the terminal.

        Raises ValueError if there are more than `max_bad`.
        """
        if problem in self._bad:
            return
        self._bad.add(problem)
        file = self.recipe.output_dir / f"bad_rows_{self.accelerator.process_index}.jsonl"
        with closing(JsonLinesWriter(file)) as lines:
            lines.append({"problem": problem})
        if len(self._bad) > self.recipe.max_bad:
            raise ValueError(
                f"{len(self._bad)} rows cannot be read (max_bad: {self.recipe.max_bad}); the last: {problem}"
            )
        if len(self._bad) <= 10:
            tqdm.write(f"skipped: {problem} ({file.name})")

    def skipped(self, step: int, norm: float, median: float, ids: list[str]) -> None:
        """Record a step that was skipped for its gradient norm. `step` counts from 0, as in the log."""
        if not self.quiet:
            with closing(JsonLinesWriter(self.recipe.output_dir / "skipped.jsonl")) as lines:
                lines.append({"step": step, "grad_norm": str(norm), "median": median, "ids": ids})
            tqdm.write(f"skipped step {step}: gradient norm {norm:.3g}, median {median:.3g} (skipped.jsonl)")

    def close(self, validations: Sequence[ValidationResult] = ()) -> None:
        """Finish the run: write `run.html` and close the trackers."""
        if not self.quiet and self.log:
            write_report(self.recipe, self.log, self.parts, self.losses, validations)
        self._end_trackers()


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested settings as one dictionary with dotted keys, the form that trackers accept."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
