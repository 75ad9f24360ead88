"""To see what happens: the log, the progress bar, trackers, pictures on the way, and `run.html` at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from echo4o.common import files
from echo4o.common.json_lines import JsonLines, JsonLinesWriter
from echo4o.training.engine import memory_gb
from echo4o.training.flops import Arithmetic, matrix_rate
from echo4o.training.model import part_of, summary, trainable
from echo4o.training.recipe import Recipe
from echo4o.training.report import write_report
from echo4o.training.run_log import LOG_FILE, phase_shares, rounded, smoothed, to_lines
from echo4o.training.samples import TrainingBatch


class Watch:
    """What a run says about itself. Only the main process writes.

    Args:
        pipeline: the models, before Accelerate has wrapped them; `trained`: both behind one forward pass.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, pipeline, trained: torch.nn.Module):
        self.recipe, self.accelerator, self.quiet = recipe, accelerator, not accelerator.is_main_process
        self.log: list[dict] = []
        self.parts = summary(trained)
        learning = {part_of(name) for name, _ in trainable(trained)} if recipe.tune.method == "full" else set()
        und_frozen = not any(p.requires_grad for b in pipeline.transformer.layers for p in b.und.parameters())
        embeds_frozen = "text" not in learning and "vision" not in learning
        self.arithmetic = Arithmetic(
            pipeline.transformer.config, pipeline.vision_model.config, learning, und_frozen and embeds_frozen
        )
        dtype = torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float32
        self.rate = matrix_rate(accelerator.device, dtype) * accelerator.num_processes
        self._earlier, self._start, self._last = 0.0, time.monotonic(), 0.0
        self._reported: set[str] = set()

    def seconds(self) -> float:
        """Of training, with the parts before interruptions."""
        return self._earlier + time.monotonic() - self._start

    def resume(self, step: int, seconds: float) -> None:
        """Take up the log of a run that has done `step` steps in `seconds`."""
        self._earlier, self._start = seconds, time.monotonic()
        if not self.quiet:
            self.log = [entry for entry in JsonLines(self._log_file) if entry["step"] < step]

    @property
    def _log_file(self) -> Path:
        return self.recipe.output_dir / LOG_FILE

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """While the run goes on: its log, its bar and its trackers."""
        recipe = self.recipe
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        if self._earlier == 0:
            self._start = time.monotonic()
        self._last = self.seconds()
        if recipe.trackers:
            own = {"wandb": {"dir": str(recipe.output_dir), "name": recipe.output_dir.name}}
            self.accelerator.init_trackers("echo4o", _flat(recipe.model_dump(mode="json")), own)
        if not self.quiet:
            learning = ", ".join(f"{n['learning']:,} of {part}" for part, n in self.parts.items() if n["learning"])
            count, kind = self.accelerator.num_processes, self.accelerator.distributed_type.value.lower()
            where = f"{count} processes, {kind}" if count > 1 else "1 process"
            tqdm.write(f"learning: {learning} ({where})")
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
        """The log's file; it begins with the entries of the steps before."""
        if self.quiet:
            return nullcontext()
        files.write_text(self._log_file, to_lines(self.log))
        return closing(JsonLinesWriter(self._log_file))

    def amounts(self, batches: list[TrainingBatch]) -> list[float]:
        """Samples, tokens and floating point operations in the batches."""
        tokens = sum(len(b.sequence.input_ids) + len(b.sequence.gen_segment) for b in batches)
        return [float(sum(len(b.ids) for b in batches)), float(tokens), sum(map(self.arithmetic.of, batches))]

    def step(self, step: int, entry: dict, facts: dict[str, float]) -> None:
        """After `step` steps: log, bar, trackers."""
        now = self.seconds()
        took, self._last = max(now - self._last, 1e-9), now
        total = entry["samples"] + (self.log[-1]["samples"] if self.log else 0)
        speed = {"tokens_per_second": entry["tokens"] / took, "mfu": entry.pop("flops") / took / self.rate}
        memory = memory_gb(self.accelerator.device)
        entry |= {"seconds": now, "samples": total} | speed | {"memory_gb": memory} | facts
        self.log.append(entry)
        if self._lines:
            self._lines.append(rounded(entry))
        if self.recipe.trackers:
            self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=step)
        self._bar.update()
        packed = f", packs {facts['packing_efficiency']:.0%} full" if facts else ""
        self._bar.set_postfix_str(
            f"loss {smoothed(self.log):.4f}, {speed['tokens_per_second']:.0f} tokens/s, mfu {speed['mfu']:.0%}, "
            f"data {phase_shares(self.log)['data']:.0%}, {memory:.1f} GB{packed}"
        )

    def too_long(self, sample: str, tokens: int) -> None:
        """A sample does not fit into a pack: said once, and written down every time."""
        file = self.recipe.output_dir / f"too_long_{self.accelerator.process_index}.jsonl"
        with closing(JsonLinesWriter(file)) as lines:
            lines.append({"id": sample, "tokens": tokens})
        if sample not in self._reported:
            self._reported.add(sample)
            if len(self._reported) <= 10:
                limit = self.recipe.packing.tokens
                tqdm.write(f"left out: {sample} has {tokens} tokens, packing.tokens is {limit} ({file.name})")

    @torch.no_grad()
    def draw(self, pipeline, step: int) -> None:
        """Draw the recipe's prompts with the model as it is."""
        settings = self.recipe.pictures
        folder = self.recipe.output_dir / "pictures" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.set_progress_bar_config(disable=True)
        with self.accelerator.autocast():
            images = pipeline(
                list(settings.prompts),
                num_inference_steps=settings.steps,
                generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(len(settings.prompts))],
            ).images
        for index, image in enumerate(images):
            image.save(folder / f"{index}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                drawn = {f"pictures/{index}": np.asarray(image)[None] for index, image in enumerate(images)}
                tracker.log_images(drawn, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"pictures": list(images)}, step=step)

    def close(self, draw: Callable[[], None]) -> None:
        """After the last step: the last pictures, `run.html`, and the trackers' ends."""
        draw()
        if not self.quiet and self.log:
            write_report(self.recipe, self.log, self.parts)
        self._end_trackers()


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested settings by dotted name, as trackers want them."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
