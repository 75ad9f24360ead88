"""Converts adapters of other trainers: kohya, ComfyUI, and PEFT on the original layout of a model.

A file is converted if every name and every alpha in it has one exact meaning for the model. Otherwise it is returned as
it is, and loading raises the error for the first name without a place.
"""

import re
from collections import Counter
from typing import Any

import torch

_PARTS = re.compile(r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")  # kohya: dots in module names become underscores


def convert_adapter(
    state: dict[str, torch.Tensor], settings: dict[str, Any] | None, modules: list[str], original_names: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Weights named `transformer.<module>.lora_A.weight` and their configuration, from the format of another trainer.

    Args:
        state: the weights as stored.
        settings: the configuration beside them. None: the alphas are tensors of the file.
        modules: names of the model's matrices.
        original_names: regular expression of our names -> template of the name in the original layout.

    Returns:
        `state` and `settings` as they are if the names are ours already, or if some have no exact meaning.
    """
    own = {f"transformer.{name}" for name in modules}
    names = _names(modules, original_names)
    weights: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    used: dict[str, str] = {}  # our module -> its stored name
    for stored, tensor in state.items():
        match = _PARTS.fullmatch(stored)
        stem = match["module"] if match else stored.removesuffix(".alpha")
        module = names.get(stem)
        if module is None or (match is None and (stem == stored or tensor.numel() != 1)):
            return state, settings
        if used.setdefault(module, stem) != stem:
            return state, settings  # one module under two names
        if match is None:
            alphas[module] = float(tensor)
        else:
            part = {"lora_down": "lora_A", "lora_up": "lora_B"}.get(match["part"], match["part"])
            weights[f"transformer.{module}.{part}.weight"] = tensor
    if not weights or (settings is not None and set(used.values()) <= own and not alphas):
        return state, settings
    ranks = {name: weights[f"transformer.{name}.lora_A.weight"].shape[0] for name in used if _has_down(weights, name)}
    if settings is None:
        if set(alphas) != set(used) or set(ranks) != set(used):
            return state, settings  # the alpha of some module is unknown
        return weights, _configuration(ranks, alphas)
    if alphas:
        return state, settings  # two sources of one number
    stems = {name: _without_prefix(stem) for name, stem in used.items()}
    return weights, _renamed(settings, stems)


def _has_down(weights: dict[str, torch.Tensor], module: str) -> bool:
    return f"transformer.{module}.lora_A.weight" in weights


def _names(modules: list[str], original_names: dict[str, str]) -> dict[str, str]:
    """Every stored name that means exactly one module -> that module."""
    found: dict[str, set[str]] = {}
    for module in modules:
        forms = {module}
        for pattern, template in original_names.items():
            if match := re.fullmatch(pattern, module):
                forms.add(match.expand(template))
        for form in forms:
            for name in (*(p + form for p in _PREFIXES), *(p + form.replace(".", "_") for p in _FLAT_PREFIXES)):
                found.setdefault(name, set()).add(module)
    return {name: next(iter(meanings)) for name, meanings in found.items() if len(meanings) == 1}


def _without_prefix(stem: str) -> str:
    return next(stem.removeprefix(prefix) for prefix in _PREFIXES if stem.startswith(prefix))


def _configuration(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Options of a `LoraConfig` with the ranks and alphas of every module."""
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _renamed(settings: dict[str, Any], stems: dict[str, str]) -> dict[str, Any]:
    """A configuration for our module names: `stems` maps each to the name that the configuration was written for."""
    from peft.utils.other import get_pattern_key

    chosen = {}
    for option, default in (("rank_pattern", settings.get("r", 8)), ("alpha_pattern", settings.get("lora_alpha", 8))):
        patterns = settings.get(option) or {}
        values = {name: patterns.get(get_pattern_key(list(patterns), stem), default) for name, stem in stems.items()}
        chosen[option] = {name: value for name, value in values.items() if value != default}
    return settings | chosen | {"target_modules": sorted(stems), "exclude_modules": None, "layers_to_transform": None}
