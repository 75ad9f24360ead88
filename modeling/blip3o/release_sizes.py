"""Configurations of the released 8B and 4B models, for checks and memory plans without weights."""

import importlib
from typing import Any

import torch

VOCABULARY = 151668
_QWEN = {
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128000,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
# Name -> configuration of the language model.
RELEASES: dict[str, dict[str, Any]] = {
    "8B": _QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 3584},
    },
    "4B": _QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 2048},
    },
}
# Emu2-Gen's public configuration; the release's UNet is its fine-tuned version.
UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1792,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 3328,
}
# SDXL's.
VAE: dict[str, Any] = {
    "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}


def release_configs(size: str = "8B") -> dict[str, dict[str, Any]]:
    """Component -> configuration of a released model, "8B" or "4B"."""
    language = RELEASES[size]
    return {
        "transformer": {"condition_dim": language["hidden_size"]},
        "language_model": language,
        "vision_model": {},
        "unet": UNET,
        "vae": VAE,
    }


def release_model(component: str, size: str = "8B") -> Any:
    """A model of the released size on the meta device: without memory, and without values."""
    from .convert import LIBRARY_CLASSES, OWN_CODE

    config = release_configs(size)[component]
    with torch.device("meta"):
        if component == "language_model":
            from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

            return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
        module, name = (OWN_CODE | LIBRARY_CLASSES)[component]
        library = (
            importlib.import_module(f".{module}", __package__)
            if component in OWN_CODE
            else importlib.import_module(module)
        )
        return getattr(library, name).from_config(config)
