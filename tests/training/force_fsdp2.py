"""The trainer's command line with real sharding on CPU, where Accelerate would quietly run DDP instead.

`torchrun --nproc-per-node 2 -m tests.training.force_fsdp2 RECIPE ...` writes what of the model is a DTensor
beside the run, as `sharded-RANK.json`.
"""

import json
import sys

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

if __name__ == "__main__":
    sys.exit(train.main())
