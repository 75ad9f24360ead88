"""Adapters as OmniGen2's training script and its users store them: weights without a configuration."""

import re
from typing import Any

import torch

_PART = re.compile(r"(?:transformer\.|diffusion_model\.)?(.+)\.(lora_[AB])(?:\.\w+)?\.weight")


def read_original_adapter(
    state: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Weights and configuration named as in diffusers (`transformer.*`). The original's alpha equals the rank.

    Names may begin with `transformer.`, `diffusion_model.` or nothing, and may contain the adapter's name. A state with
    other names is returned as it is, with None.
    """
    named, ranks = {}, {}
    for name, tensor in state.items():
        match = _PART.fullmatch(name)
        if match is None:
            return state, None
        module, part = match[1], match[2]
        named[f"transformer.{module}.{part}.weight"] = tensor
        if part == "lora_A":
            ranks[module] = tensor.shape[0]
    if not ranks or len(named) != len(state):
        return state, None
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    settings |= {"rank_pattern": others, "alpha_pattern": others} if others else {}
    return named, {f"transformer.{name}": value for name, value in settings.items()}
