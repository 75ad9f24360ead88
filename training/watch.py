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
from echo4o.training.backbones.base import Backbone
from echo4o.training.engine import matrix_rate, memory_gb
from echo4o.training.model import count_parameters
from echo4o.training.recipe import TrainingRecipe
from echo4o.training.report import write_report
from echo4o.training.run_log import LOG_FILE, phase_shares, rounded, smoothed, to_lines


class Watch:
    """What a run says about itself. Only the main process writes.

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
        """The log's file; it begins with the entries of the steps before."""
        if self.quiet:
            return nullcontext()
        files.write_text(self._log_file, to_lines(self.log))
        return closing(JsonLinesWriter(self._log_file))

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
    def generate_images(self, pipeline, step: int) -> None:
        """Generate images of the recipe's prompts with the model as it is."""
        settings = self.recipe.images
        assert settings is not None
        folder = self.recipe.output_dir / "images" / f"step-{step:08d}"
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

                drawn = {f"images/{index}": np.asarray(image)[None] for index, image in enumerate(images)}
                tracker.log_images(drawn, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"images": list(images)}, step=step)

    def close(self, generate_images: Callable[[], None]) -> None:
        """After the last step: the last images, `run.html`, and the ends of the trackers."""
        generate_images()
        if not self.quiet and self.log:
            write_report(self.recipe, self.log, self.parts, self.losses)
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
