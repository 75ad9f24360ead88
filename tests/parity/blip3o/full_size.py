"""The released sizes: names, shapes and parameter counts of our models on the meta device."""

from __future__ import annotations

import math
from typing import Any

from echo4o.modeling.blip3o.original_layout import key_of
from echo4o.modeling.blip3o.release_sizes import RELEASES, release_model

from ..report import Check


def check(content: dict[str, Any], check: Check) -> None:
    """Compare with full_size.json: tensors by component and numbers of parameters."""
    tensors, counts = content["tensors"], content["parameters"]
    check("tensors", sorted(tensors), sorted([*RELEASES, "eva_clip_vision_tower", "unet", "vae"]))
    for size in RELEASES:
        with check.trying(size):
            _check_release(size, tensors[size], counts[size], check.of(size))
    for name, component in (("eva_clip_vision_tower", "vision_model"), ("unet", "unet"), ("vae", "vae")):
        with check.trying(name):
            model = release_model(component)
            _compare(name, _shapes(model), tensors[name], check)
            count = sum(p.numel() for p in model.parameters())
            check(f"{name}: parameters", count, counts["eva" if component == "vision_model" else name])


def _check_release(size: str, tensors: dict[str, list[int]], counts: dict[str, int], check: Check) -> None:
    ours, sums = {}, {}
    for component in ("transformer", "language_model"):
        model = release_model(component, size)
        tied = getattr(model.config, "tie_word_embeddings", False)
        ours |= {(component, n): s for n, s in _shapes(model).items() if not (tied and n == "lm_head.weight")}
    theirs = {(key_of(name).component, key_of(name).name): shape for name, shape in tensors.items()}
    _compare("tensors", {".".join(k): v for k, v in ours.items()}, {".".join(k): v for k, v in theirs.items()}, check)
    for (component, name), shape in ours.items():
        part = component
        if component == "language_model":
            part = "visual" if name.startswith("model.visual.") else "text"
        elif name == "queries.weight":
            part = "latent_queries"
        sums[part] = sums.get(part, 0) + math.prod(shape)
    sums["dit"] = sums.pop("transformer")
    check("parameters", {**sums, "total_without_eva": sum(sums.values())}.items() ^ counts.items(), set())


def _shapes(model) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare(part: str, ours: dict[str, list[int]], theirs: dict[str, list[int]], check: Check) -> None:
    check(f"{part}: names", sorted(ours), sorted(theirs))
    check(f"{part}: shapes", [n for n in theirs if n in ours and ours[n] != list(theirs[n])], [])
