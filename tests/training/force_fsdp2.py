"""The trainer's command line with real sharding on CPU, where Accelerate would quietly run DDP instead.

`torchrun --nproc-per-node 2 -m tests.training.force_fsdp2 RECIPE ... [-- RECIPE ...]` writes what of the model is a
DTensor beside the run, as `sharded-RANK.json`. Several runs, one after the other, share the processes: their imports
take longer than they do.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from echo4o.training import train

_init = AcceleratorState.__init__


def _with_fsdp(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = kwargs["fsdp_plugin"]
        PartialState._shared_state["distributed_type"] = self.distributed_type


AcceleratorState.__init__ = _with_fsdp
_run = train.Trainer.run


def _reporting_run(self, **kwargs):
    parameters = list(self.model.parameters())
    held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
    facts = {
        "sharded": sum(isinstance(p, DTensor) for p in parameters),
        "parameters": len(parameters),
        "share": held / sum(p.numel() for p in parameters),
    }
    self.recipe.output_dir.mkdir(parents=True, exist_ok=True)
    file = self.recipe.output_dir / f"sharded-{self.accelerator.process_index}.json"
    file.write_text(json.dumps(facts))
    return _run(self, **kwargs)


train.Trainer.run = _reporting_run


def main(arguments: list[str]) -> int:
    # Groups of processes that follow each other in one rendezvous can mistake one for the other: all runs share one.
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    try:
        for index, group in enumerate(_split(arguments)):
            os.environ.pop("ACCELERATE_USE_FSDP", None)
            AcceleratorState._reset_state()
            if index:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
            torch.manual_seed(index)  # whatever random state the process is in
            if code := train.main(group):
                return code
        return 0
    finally:
        end()


def main_and_exit() -> None:
    """Ends the process without torch's destructors: after several runs in one group they abort it now and then."""
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _split(arguments: list[str]) -> list[list[str]]:
    groups = [[]]
    for argument in arguments:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    return groups


if __name__ == "__main__":
    main_and_exit()
