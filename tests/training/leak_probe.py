"""`torchrun ... -m tests.training.leak_probe RECIPE ...`: writes live tensors and memory of rank 0 after every 10 steps.

Runs of [`tests.training.force_fsdp2`], with `leaks.json` beside each run.
"""

import gc
import json
import resource

import torch

from echo4o.training.run_monitor import RunMonitor
from tests.training import force_fsdp2

_step = RunMonitor.step


def _counting_step(self, step, entry, facts):
    _step(self, step, entry, facts)
    if step % 10 == 0:
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        self.leaks = [*getattr(self, "leaks", []), [step, tensors, len(gc.get_objects()), resident]]
        if not self.quiet:
            (self.recipe.output_dir / "leaks.json").write_text(json.dumps(self.leaks))


RunMonitor.step = _counting_step

if __name__ == "__main__":
    force_fsdp2.main_and_exit()
