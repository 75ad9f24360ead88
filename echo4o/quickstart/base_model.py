"""Builds the tiny BAGEL of the quickstart and trains its base model on single objects.

The base model has the role that BAGEL has for Echo-4o: it generates simple images and was not trained on complex
instructions. Its training data has single objects only, none of them held out, and no row of Shapes-4o.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from echo4o.evaluation.benchmarks.shapes4o.grammar import ShapesPrompt, is_held_out
from echo4o.evaluation.benchmarks.shapes4o.rendering import render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, IMAGE_SIZE, SHAPES, ShapeGroup, lay_out
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.bagel.vision_bagel import BagelVisionModel
from echo4o.quickstart.generation import generate_and_score
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


def single_objects() -> list[ShapeGroup]:
    """Returns every single object that is not held out, with its colour, and without it if it is the typical colour."""
    stated = [ShapeGroup(shape, colour) for shape in SHAPES for colour in COLOURS]
    return [group for group in [*stated, *(ShapeGroup(shape) for shape in SHAPES)] if not is_held_out([group])]


def _name(group: ShapeGroup) -> str:
    return f"a {group.colour} {group.shape}" if group.colour else f"a {group.shape}"


def single_object_rows(number: int, seed: int) -> list[dict]:
    """Returns the training rows of the base model: four of five ask for an image, the fifth asks what an image shows."""
    rng = np.random.default_rng([seed, 77])
    groups, rows = single_objects(), []
    for index in range(number):
        group = groups[int(rng.integers(len(groups)))]
        image = render(lay_out([group], "free", rng), tint(int(rng.integers(2197))))
        row = {"id": f"single-{seed}-{index}", "instruction": f"a photo of {_name(group)}", "reference_images": []}
        row |= {"image": image, "answer": None}
        if index % 5 == 4:
            named = ShapeGroup(group.shape, group.drawn_colour)
            row |= {"instruction": "what is this?", "answer": _name(named)}
            row |= {"image": None, "reference_images": [image]}
        rows.append(row)
    return rows


def single_object_prompts(number: int) -> list[ShapesPrompt]:
    """Returns prompts for single objects, for which the base model was trained."""
    groups = [group for group in single_objects() if group.colour]
    chosen = [groups[i] for i in np.random.default_rng(5).permutation(len(groups))[:number]]
    return [ShapesPrompt("single object", f"a photo of {_name(group)}", (group,)) for group in chosen]


class RowList(list):
    """A list with the methods of `datasets.Dataset` that the trainer calls."""

    def select(self, indices) -> list[dict]:
        return [self[index] for index in indices]


def train_base(
    tokenizer, vae: AutoencoderKL, folder: Path, seed: int = 0, steps: int | None = None, rows: int = 6000
) -> dict:
    """Trains the base model, saves it as a pipeline folder in 16 bit, and scores it on single objects.

    Returns:
        The contents of `base.json`: steps, seconds, loss of the last steps, and the score.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as run_dir:
        changes = {"output_dir": run_dir, "seed": seed} | ({"steps": steps} if steps else {})
        recipe = load_recipe(bundled_recipe("quickstart_base"), changes)
        pipeline = build_pipeline(tokenizer, vae, seed)
        result = Trainer(recipe, pipeline, RowList(single_object_rows(rows, seed))).run()
        _move(result.pipeline_dir, folder)
    pipeline = Echo4oPipeline.from_pretrained(folder, dtype=torch.float32)
    generated = generate_and_score(pipeline, single_object_prompts(30), seed=seed)
    facts = {
        "steps": len(result.log),
        "samples": result.log[-1]["samples"],
        "seconds": round(result.seconds),
        "threads": torch.get_num_threads(),
        "mse": round(float(np.mean([entry["mse"] for entry in result.log[-100:]])), 4),
        "single_objects": {"right": generated.scores["overall"].right, "of": generated.scores["overall"].of},
    }
    (folder / "base.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _move(saved: Path, folder: Path) -> None:
    """Moves a saved pipeline into the base folder and keeps the tokenizer and VAE there.

    Copies of the package's code and local paths are removed, because the folder is part of the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for code in [*saved.glob("*.py"), *saved.glob("*/*.py")]:
        code.unlink()
    for file in [*saved.glob("*.json"), *saved.glob("*/config.json")]:
        values = json.loads(file.read_text("utf-8"))
        if values.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
    for item in saved.iterdir():
        target = folder / item.name
        if item.name in ("tokenizer", "vae") and target.is_dir():
            continue
        if target.is_dir():
            shutil.rmtree(target)
        shutil.move(item, target)
