"""Builds the tiny BAGEL of the quickstart and trains its base model on imperfectly captioned scenes."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from echo4o.evaluation.benchmarks.shapes4o.grammar import held_out_prompts
from echo4o.evaluation.benchmarks.shapes4o.scene import IMAGE_SIZE
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.quickstart.generation import generate_and_score
from echo4o.quickstart.imperfect_rows import (
    CLUTTERED,
    LOOSE,
    MISALIGNED,
    imperfect_rows,
    single_object_prompts,
    training_dataset,
)
from echo4o.training.recipe_files import bundled_recipe, load_recipe
from echo4o.training.train import Trainer

WIDTH = 192
GUIDANCE = {
    "guidance_scale": 2.0,
    "image_guidance_scale": 1.0,
    "guidance_interval": [0.0, 1.0],
    "guidance_renorm": "global",
}


def build_pipeline(tokenizer, vae: AutoencoderKL, seed: int = 0) -> Echo4oPipeline:
    """Returns a tiny BAGEL with random weights and the given tokenizer and VAE: 4.5M parameters, 64 x 64 pixel images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = BagelTransformer2DModel(
            hidden_size=WIDTH,
            intermediate_size=512,
            num_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            latent_channels=vae.config["latent_channels"],
            max_latent_size=8,
        )
        vision_model = BagelVisionModel(
            hidden_size=96,
            intermediate_size=256,
            num_layers=2,
            num_attention_heads=3,
            max_patches_per_side=8,
            output_size=WIDTH,
        )
    # Text embeddings of unit variance would be much larger than the other inputs.
    torch.nn.init.normal_(transformer.embed_tokens.weight, std=0.1)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return Echo4oPipeline(
        transformer=transformer.eval(),
        vision_model=vision_model.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        presets={"text_to_image": GUIDANCE, "with_references": GUIDANCE},
        vae_image_limits={"max_size": IMAGE_SIZE, "min_size": IMAGE_SIZE},
        vision_image_limits={"max_size": 56, "min_size": 56},
    )


def train_base(
    tokenizer, vae: AutoencoderKL, folder: Path, seed: int = 0, steps: int | None = None, rows: int = 12_000
) -> dict:
    """Trains the base model, saves it as a pipeline folder in 16 bit, and scores it.

    Returns:
        The contents of `base.json`: the composition of the rows, steps, seconds, loss of the last steps, and the scores
        on the held-out prompts and on single objects.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as run_dir:
        changes = {"output_dir": run_dir, "seed": seed}
        if steps:
            changes |= {"steps": steps, "optimizer.warmup_steps": steps // 30}
        recipe = load_recipe(bundled_recipe("quickstart_base"), changes)
        pipeline = build_pipeline(tokenizer, vae, seed)
        result = Trainer(recipe, pipeline, training_dataset(imperfect_rows(rows, seed))).run()
        _move(result.pipeline_dir, folder)
    pipeline = Echo4oPipeline.from_pretrained(folder, dtype=torch.float32)
    scores = {
        "held_out": generate_and_score(pipeline, held_out_prompts(), seed).scores["overall"],
        "single_objects": generate_and_score(pipeline, single_object_prompts(30), seed).scores["overall"],
    }
    facts = {
        "rows": {"number": rows, "misaligned": MISALIGNED, "loose": LOOSE, "cluttered": CLUTTERED},
        "steps": len(result.log),
        "samples": result.log[-1]["samples"],
        "seconds": round(result.seconds),
        "threads": torch.get_num_threads(),
        "mse": round(float(np.mean([entry["mse"] for entry in result.log[-100:]])), 4),
    } | {name: {"right": score.right, "of": score.of} for name, score in scores.items()}
    (folder / "base.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _move(saved: Path, folder: Path) -> None:
    """Moves a saved pipeline into the base folder and keeps the tokenizer and VAE there.

    Copies of the package's code, their names and local paths are removed, because the folder is part of the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for code in [*saved.glob("*.py"), *saved.glob("*/*.py")]:
        code.unlink()
    for file in [*saved.glob("*.json"), *saved.glob("*/config.json")]:
        values = json.loads(file.read_text("utf-8"))
        kept = {key: value for key, value in values.items() if key not in ("_name_or_path", "auto_map")}
        if kept != values:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", "utf-8")
    for item in saved.iterdir():
        target = folder / item.name
        if item.name in ("tokenizer", "vae") and target.is_dir():
            continue
        if target.is_dir():
            shutil.rmtree(target)
        shutil.move(item, target)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read
