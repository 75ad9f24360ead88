"""Turns the checkpoint of GenEval's detector, a `.pth` of mmdet 2, into a folder that transformers loads."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo4o.common.files import write_json
from echo4o.evaluation.benchmarks.geneval.mmdet_names import changed, targets_of
from echo4o.evaluation.benchmarks.geneval.scoring import CLASSES

if TYPE_CHECKING:
    import torch

CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
CHECKPOINT_URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/"
    f"mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/{CHECKPOINT}"
)
# OpenMMLab names a checkpoint by the first digits of its SHA-256.
PUBLISHED_SHA256 = "743b7d99"
PUBLISHED_BACKBONE: dict[str, Any] = {
    "model_type": "swin",
    "image_size": 224,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": [2, 2, 18, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "drop_path_rate": 0.3,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SOURCE = "detector.json"
# COCO's names where GenEval has its own.
_COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
COCO_CLASSES = tuple(_COCO_NAMES.get(name, name) for name in CLASSES)


def convert_detector(checkpoint: Path, out: Path, config: Any = None) -> dict[str, Any]:
    """Convert a checkpoint; returns what `out/detector.json` says about it.

    Args:
        checkpoint: the `.pth` file. It is read as tensors only, never executed.
        out: a folder that does not exist or is empty.
        config: a `Mask2FormerConfig`; None: that of the published detector.

    Raises:
        ValueError: the file holds more than tensors, is not this detector, or has other classes.
    """
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: it exists and is not an empty folder; the detector is written into a new one")
    digest = _sha256(checkpoint)
    content = _read(checkpoint)
    state = content.get("state_dict", content)
    classes = _classes(content)
    require_coco_order(classes, str(checkpoint))
    tensors = _converted(state, checkpoint)
    config = with_classes(config or published_config())
    _require_fit(tensors, config, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    about = {
        "source": checkpoint.name,
        "sha256": digest,
        "published": digest.startswith(PUBLISHED_SHA256),
        "classes": list(CLASSES),
    }
    write_json(out / SOURCE, about)
    return about


def published_config() -> Any:
    """The `Mask2FormerConfig` of the published detector."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(**{name: value for name, value in PUBLISHED_BACKBONE.items() if name != "model_type"})
    return with_classes(Mask2FormerConfig(backbone_config=backbone))


def with_classes(config: Any) -> Any:
    """The configuration with GenEval's classes as labels."""
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {name: number for number, name in enumerate(CLASSES)}
    return config


def require_coco_order(classes: list[str] | tuple[str, ...] | None, where: str) -> None:
    """Raise ValueError unless the classes are COCO's 80 in their order; None: nothing is known, nothing is checked."""
    if classes is None:
        return
    if len(classes) != len(CLASSES):
        raise ValueError(f"{where}: the detector has {len(classes)} classes; GenEval's has COCO's {len(CLASSES)}")
    for number, (name, coco, ours) in enumerate(zip(classes, COCO_CLASSES, CLASSES)):
        if _plain(name) not in (_plain(coco), _plain(ours)):
            raise ValueError(
                f"{where}: class {number} of the detector is {name!r}, it must be {coco!r}: the classes are not in "
                "COCO's order"
            )


def _plain(name: str) -> str:
    """Some lists write "hair dryer", "donut" as "doughnut", or join words: only letters are compared."""
    letters = "".join(letter for letter in name.lower() if letter.isalpha())
    return {"hairdryer": "hairdrier", "doughnut": "donut", "tvmonitor": "tv", "sofa": "couch"}.get(letters, letters)


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; download it with: curl -LO {CHECKPOINT_URL}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(checkpoint: Path) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{checkpoint}: it holds more than tensors and plain values, and loading that could run code ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{checkpoint}: it is not a checkpoint of torch ({' '.join(str(error).split())[:200]})"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint}: it holds a {type(content).__name__}, not a checkpoint of mmdet")
    return content


def _classes(content: dict[str, Any]) -> list[str] | None:
    meta = content.get("meta")
    classes = meta.get("CLASSES") if isinstance(meta, dict) else None
    return list(classes) if isinstance(classes, (list, tuple)) else None


def _converted(state: dict[str, Any], checkpoint: Path) -> dict[str, torch.Tensor]:
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{checkpoint}: {name} is not a tensor; a checkpoint of mmdet has its weights in state_dict"
            )
        try:
            targets = targets_of(name)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}; use {CHECKPOINT_URL}") from None
        for target, change in targets:
            tensors[target] = changed(tensor, change).clone()
    return tensors


def _require_fit(tensors: dict[str, torch.Tensor], config: Any, checkpoint: Path) -> None:
    """Raise ValueError unless the tensors are all that a model of this configuration has."""
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    names = {name for name, _ in model.named_parameters()}
    total = sum(p.numel() for name, p in model.named_parameters() if not without_effect(name))
    got = sum(tensor.numel() for tensor in tensors.values())
    if got != total:
        raise ValueError(
            f"{checkpoint}: its tensors hold {got:,} values, the detector has {total:,} in {len(names)} parameters; "
            f"use {CHECKPOINT_URL}"
        )


def without_effect(name: str) -> bool:
    """Whether a parameter of the transformers model is not in mmdet's and does not change the output."""
    return re.match(r"model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.|criterion\.", name) is not None
