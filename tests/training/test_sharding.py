"""FSDP2 on two processes, really sharded (see force_fsdp2): resumed, with LoRA, in bfloat16, exported, on two machines."""

import json
import math
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.training.checkpoints import Checkpoint, CheckpointFolder
from echo4o.training.export import export_checkpoint
from echo4o.training.recipe_files import load_recipe

from .running import assert_same, finished, log_of, losses_of, start, torchrun, weights_of
from .test_invariants import close

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

LORA = {"tune": {"method": "lora", "experts": ["gen", "und"], "rank": 4, "alpha": 8, "dropout": 0.3}}
STEPS = 6


def settings(**changes) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder, rows_folder):
    """Five runs of two processes each: their folder, and the function that starts more."""
    import yaml

    folder = tmp_path_factory.mktemp("sharding")
    shared = {"model": str(model_folder), "data": {"path": str(rows_folder)}, "output_dir": "given below"}
    shared |= {"packing": {"tokens": 120, "packs_per_step": 4, "buffer": 4}, "steps": STEPS, "device": "cpu"}
    shared |= {"sharding": "fsdp2", "processes": 2, "ema": {"decay": 0.9}, "checkpoints": {"every": 2, "keep": 9}}
    shared |= {"optimizer": {"lr": 1e-3, "warmup_steps": 1, "schedule": "linear"}, "save_dtype": "float32"}
    for name, changes in {"full": {}, "lora": LORA}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(shared | changes))

    def together(*groups: list) -> None:
        arguments = [part for name, *more in groups for part in ("--", folder / f"{name}.yaml", *more)]
        torchrun(2, "tests.training.force_fsdp2", *arguments[1:])

    def into(name: str) -> list[str]:
        return settings(output_dir=folder / name)

    together(
        ["full", *into("full")],
        ["full", *into("bf16"), *settings(mixed_precision="bf16", gradient_checkpointing="true", steps=3)],
        ["lora", *into("lora")],
        ["lora", *into("lora-ddp"), *settings(sharding="none")],
    )
    for name, step in (("full", 2), ("lora", 4)):
        part = folder / f"{name}-resumed"
        shutil.copytree(folder / name / "checkpoints" / f"step-{step:08d}", part / "checkpoints" / f"step-{step:08d}")
        shutil.copy(folder / name / "train_log.jsonl", part)
    together(*([name, "--resume", *into(f"{name}-resumed")] for name in ("full", "lora")))
    return folder


def test_every_process_holds_its_share(runs):
    for name in ("full", "bf16", "lora"):
        for rank in range(2):
            facts = json.loads((runs / name / f"sharded-{rank}.json").read_text())
            assert facts["sharded"] == facts["parameters"] > 100, "every parameter is a DTensor"
            assert facts["share"] == pytest.approx(0.5, abs=0.02), "and each process holds half"
    assert json.loads((runs / "lora-ddp" / "sharded-0.json").read_text())["sharded"] == 0


@pytest.mark.parametrize("name, out", [("full", "pipeline"), ("lora", "adapter")])
def test_resumed_equals_uninterrupted(runs, name, out):
    assert losses_of(runs / f"{name}-resumed") == losses_of(runs / name)
    assert len(log_of(runs / name)) == STEPS
    assert_same(weights_of(runs / f"{name}-resumed" / out), weights_of(runs / name / out))


def test_a_sharded_adapter_is_the_one_of_ddp(runs, model_folder):
    assert losses_of(runs / "lora") == pytest.approx(losses_of(runs / "lora-ddp"), abs=1e-5)
    sharded, whole = (weights_of(runs / name / "adapter") for name in ("lora", "lora-ddp"))
    close(sharded, whole, 1e-5)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in sharded.items() if "lora_B" in name), "it learned"
    pipeline = Echo4oPipeline.from_pretrained(model_folder)
    pipeline.load_lora_weights(runs / "lora" / "adapter")
    assert pipeline("a red square", num_inference_steps=2).images[0].size == (64, 64)


def test_16_bit_with_activation_checkpointing_learns(runs):
    losses = losses_of(runs / "bf16")
    assert losses == pytest.approx(losses_of(runs / "full")[:3], rel=0.05)
    assert losses != losses_of(runs / "full")[:3], "but it is not float32"
    assert all(math.isfinite(float(tensor.sum())) for tensor in weights_of(runs / "bf16" / "pipeline").values())


@pytest.mark.parametrize("name, out", [("full", "pipeline"), ("lora", "adapter")])
def test_any_sharded_checkpoint_exports_in_one_process(runs, name, out, tmp_path):
    last = Checkpoint(runs / name / "checkpoints" / f"step-{STEPS:08d}")
    assert_same(weights_of(export_checkpoint(last, tmp_path / "last")), weights_of(runs / name / out))
    early = Checkpoint(runs / name / "checkpoints" / "step-00000002")
    raw = weights_of(export_checkpoint(early, tmp_path / "raw", "raw"))
    averaged = weights_of(export_checkpoint(early, tmp_path / "ema", "ema"))
    assert any(not torch.equal(raw[key], averaged[key]) for key in raw)


# Every recipe of several processes, in small and otherwise as it is, started as its guide says.
SMALL = {"device": "cpu", "steps": 2, "optimizer.warmup_steps": 1, "packing.tokens": 120, "packing.buffer": 4}
SMALL |= {"processes": 2, "packing.packs_per_step": 2, "checkpoints.every": 1, "save_dtype": "float32"}


def launch(config: str, recipe: str, *options, **changes) -> subprocess.Popen:
    launcher = ["--config_file", f"training/accelerate/{config}.yaml", "--num_processes", 2, *options]
    launcher += ["-m", "tests.training.force_fsdp2", recipe, *settings(**(SMALL | changes))]
    return start(*launcher, module="accelerate.commands.launch")


def test_the_recipe_for_eight_gpus_in_small(tmp_path, model_folder, rows_folder):
    paths = {"model": model_folder, "data.path": rows_folder, "output_dir": tmp_path / "run"}
    finished(launch("node_8gpu", "full_fsdp2_8gpu", "--main_process_port", 0, **paths))
    check_whole(tmp_path / "run", model_folder)


def test_the_recipe_for_many_nodes_on_two_machines_in_small(tmp_path, model_folder, rows_folder):
    paths = {"model": model_folder, "data.path": rows_folder, "output_dir": tmp_path / "run"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    machines = [
        launch("multinode_4x8gpu", "full_fsdp2_multinode", *address, "--machine_rank", rank, **paths, resume="true")
        for rank in range(2)
    ]
    try:
        said = [finished(machine) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert "Trained 2 steps" in said[0] and "Trained" not in said[1], "one of them speaks"
    check_whole(tmp_path / "run", model_folder)


def check_whole(run, model_folder) -> None:
    """It learned, and what it wrote is a whole pipeline."""
    assert len(log_of(run)) == 2 and all(math.isfinite(loss) for loss in losses_of(run))
    for rank in range(2):
        assert json.loads((run / f"sharded-{rank}.json").read_text())["share"] == pytest.approx(0.5, abs=0.02)
    before, after = weights_of(model_folder), weights_of(run / "pipeline")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(("vision_model.", "vae.")) for name in changed)


EXPORT = """
import sys, threading, time
from pathlib import Path
from echo4o.training import export
from echo4o.training.backbones import bagel  # imported before memory is measured
from echo4o.training.checkpoints import Checkpoint

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def watch():
    global most
    while True:
        most = max(most, resident())
        time.sleep(0.002)

export.SHARD_BYTES = 10_000_000
before = most = resident()
threading.Thread(target=watch, daemon=True).start()
export.export_checkpoint(Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]))
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc")
def test_an_export_never_holds_the_whole_model(tmp_path, model_folder, recipe_file):
    shutil.copytree(model_folder, tmp_path / "base")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = BagelTransformer2DModel(**sizes, num_layers=5, vocab_size=1000, max_latent_size=16)
    model.save_pretrained(tmp_path / "base" / "transformer")
    weights = {f"transformer.{name}": p.detach() for name, p in model.named_parameters()}
    recipe = load_recipe(recipe_file(model=str(tmp_path / "base")))
    state = {"step": 1, "recipe": recipe.model_dump(mode="json")}
    folder = CheckpointFolder(tmp_path / "checkpoints").save(Accelerator(cpu=True), 1, {"model": weights}, state)
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, folder, tmp_path / "out"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = sum(tensor.nbytes for tensor in weights.values())
    assert whole > 150e6 and int(done.stdout) < 0.4 * whole, (done.stdout, whole)
    written = load_file(max((tmp_path / "out" / "transformer").glob("*.safetensors")))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.items())
