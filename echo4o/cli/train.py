"""``echo4o train`` and ``echo4o export``."""

import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.frame import finish, say


class Weights(StrEnum):
    """Which weights of a checkpoint to export; ``auto`` is the moving average if there is one."""

    auto = "auto"
    ema = "ema"
    raw = "raw"


class AdapterLayout(StrEnum):
    """Names of an exported adapter's tensors."""

    original = "original"


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: section.key=value; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last complete checkpoint, or start if there is none.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show the memory and disk space that the run needs.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="With --plan: memory of a GPU, for example 24GB.", show_default="80GB")
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="With --plan: number of GPUs.", show_default="processes of the recipe")
    ] = None,
) -> None:
    """Fine-tune a model with LoRA or fully, on one device or many. A recipe describes the run.

    Example: [bold]echo4o train lora_single_gpu --set model=DIR --set data.path=DIR[/bold]
    Will it fit? [bold]echo4o train lora_single_gpu --set model=release --plan --gpu 24GB[/bold]
    Resume: [bold]echo4o train lora_single_gpu --set model=DIR --set data.path=DIR --resume[/bold]

    Bundled recipes, which you can copy and change:

    - lora_single_gpu: an adapter on one GPU
    - qlora_24gb: the same over 4-bit weights
    - full_fsdp2_8gpu: all weights, sharded over the GPUs of this machine
    - full_fsdp2_multinode: the same over several machines; on each, run
      [bold]accelerate launch -m echo4o.training.train full_fsdp2_multinode ...[/bold]
    - omnigen2_lora_single_gpu, omnigen2_full_fsdp2_8gpu: the same for OmniGen2
    - blip3o_lora_single_gpu, blip3o_full_8gpu: the same for BLIP3-o
    - distill_lora: an adapter that makes an image in four updates without guidance
    - quickstart_cpu: a tiny model
    """
    from echo4o.training.recipe_files import load_recipe, parse_changes

    if not plan and (gpu is not None or num_gpus is not None):
        raise ValueError(f"--{'gpu' if gpu is not None else 'num-gpus'} has no effect without --plan.")
    changes = parse_changes(set_ or []) | ({"resume": True} if resume else {})
    settings = load_recipe(recipe, changes)
    if plan:
        from echo4o.planning.training_memory import print_plan

        fits = print_plan(settings, gpu or "80GB", num_gpus or settings.processes or 1)
        raise typer.Exit(0 if fits else 1)
    arguments = [recipe, *(part for pair in set_ or [] for part in ("--set", pair)), *(["--resume"] if resume else [])]
    if settings.processes not in (None, 1) and "WORLD_SIZE" not in os.environ:
        launch(settings.processes, settings.device, settings.mixed_precision, arguments)
    from echo4o.training.train import main

    if code := main(arguments):
        raise typer.Exit(code)


def launch(processes: int, device: str, mixed_precision: str, arguments: list[str]) -> None:
    """Replace this process by `accelerate launch`. It does not return."""
    import torch

    if device != "cpu" and torch.cuda.device_count() < processes:
        raise ValueError(
            f"the recipe needs {processes} processes, but this machine has {torch.cuda.device_count()} GPUs: set "
            "processes, or start it on every node with `accelerate launch --config_file ... -m echo4o.training.train`"
        )
    # Without a GPU, --multi_gpu starts this many processes on the CPU; --cpu would silently start one.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", mixed_precision, "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "echo4o.training.train", *arguments]
    say(shlex.join(["accelerate", "launch", *command[3:]]))
    os.execv(command[0], command)


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or one of its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=0, help="The step of the checkpoint.", show_default="the last")
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="ema: the moving average; raw: the trained weights; auto: ema if there is one.")
    ] = Weights.auto,
    best: Annotated[
        bool, typer.Option("--best", help="The step with the lowest validation loss (checkpoints.keep_best).")
    ] = False,
    to: Annotated[
        AdapterLayout | None,
        typer.Option(help="original: an adapter with the names of the original checkpoint, for PEFT."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a complete pipeline with the adapter merged into its weights.")
    ] = False,
) -> None:
    """Export a checkpoint as a pipeline folder or an adapter.

    Example: [bold]echo4o export runs/lora --step 500 --out lora-500[/bold]
    """
    from echo4o.training.checkpoints import Checkpoint, CheckpointFolder, missing_from
    from echo4o.training.export import export_checkpoint, export_to_original, merge_run
    from echo4o.training.recipe_files import read_recipe

    if to is not None and merge:
        raise ValueError(
            "--to original is for adapters; export with --merge, then use `echo4o convert --to original`."
        )
    if best and step is not None:
        raise ValueError("give either --best or --step.")
    if merge and step is None and not best and weights is Weights.auto and (run / "adapter").is_dir():
        finish(
            merge_run(run, out), shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", str(out)])
        )
        return
    if run.name.startswith("step-"):
        if best:
            raise ValueError(f"--best is for a run, and {run} is one checkpoint.")
        if why := missing_from(run):
            raise ValueError(f"{run} is not a complete checkpoint: {why}")
        available = [Checkpoint(run)]
    else:
        checkpoints = CheckpointFolder(run / "checkpoints", log=say)
        available = checkpoints.complete()
        if best:
            marked = checkpoints.read_best()
            if marked is None:
                raise ValueError(f"{run} has no best checkpoint: its recipe needs checkpoints.keep_best: true.")
            available, step = [marked], marked.step
    chosen = [c for c in available if step is None or c.step == step]
    if not chosen:
        steps = ", ".join(str(c.step) for c in available) or "none"
        raise ValueError(f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; there are: {steps}")
    if to is not None:
        folder = export_to_original(chosen[-1], out, weights.value)
        say(f"step {chosen[-1].step}, the adapter with original names:")
        finish(folder, f"python: pipe.load_lora_weights({str(out)!r})")
        return
    folder = export_checkpoint(chosen[-1], out, weights.value, merge)
    adapter = not (folder / "model_index.json").is_file()
    settings = read_recipe(chosen[-1].state()["recipe"])
    say(f"step {chosen[-1].step}, the {'adapter' if adapter else 'pipeline'}:")
    if settings.distill is not None:
        command = [
            "echo4o",
            "generate",
            "a lighthouse made of glass",
            "--model",
            settings.model,
            "--lora",
            str(folder),
        ]
        finish(folder, shlex.join(command))
    elif adapter:
        finish(folder, shlex.join(["echo4o", "export", str(run), "--merge", "--out", f"{out}-merged"]))
    else:
        finish(folder, shlex.join(["echo4o", "generate", "a lighthouse made of glass", "--model", str(out)]))
