"""A tiny Mask2Former and a tiny CLIP with random weights, in the form that echo4o reads."""

import json
from pathlib import Path

import torch

from echo4o.evaluation.benchmarks.geneval.convert_detector import with_classes


def tiny_config():
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        image_size=224,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return with_classes(
        Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=12,
        )
    )


def write_detector(folder: Path, seed: int = 0) -> Path:
    """Sharp random logits, so that some detections pass the threshold."""
    from transformers import Mask2FormerForUniversalSegmentation

    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(tiny_config())
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)
    model.save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPConfig, CLIPModel

    vocabulary = [chr(code) for code in range(33, 127)]
    words = [*vocabulary, *(f"{letter}</w>" for letter in vocabulary), "re", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config=sizes | ids | {"vocab_size": len(words)},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    return folder
