"""Configurations of adapters for the tiny BAGEL, and calls to compare."""

import torch
from peft import LoraConfig

from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {r"layers.0.gen.to_q": 7, "to_k": 2}, "alpha_pattern": {"layers.1.gen.to_v": 40}},
}


def draw(pipe, **options):
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe("a dot", generator=torch.Generator().manual_seed(0), **settings, **options).images


def config(kind="plain", expert="gen", **options):
    options = {"r": 4, "lora_alpha": 13, **KINDS[kind], **options}
    return LoraConfig(target_modules=BagelTransformer2DModel._lora_targets[expert], init_lora_weights=False, **options)


def scalings(pipe):
    return {name: dict(m.scaling) for name, m in pipe.transformer.named_modules() if hasattr(m, "scaling")}
