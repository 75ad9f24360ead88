"""A golden directory of BAGEL, with its checkpoint loaded by our code."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from echo4o.modeling.bagel.segments_bagel import SpecialTokens

from .. import golden


class GoldenSet(golden.GoldenSet):
    """See [`golden.GoldenSet`]."""

    @cached_property
    def components(self) -> dict[str, Any]:
        """transformer, vision_model, vae, scheduler and tokenizer of the checkpoint, in float32."""
        from echo4o.modeling.bagel.convert import components_from_original

        components = components_from_original(self.directory / "checkpoint", dtype=torch.float32)
        for name in ("transformer", "vision_model", "vae"):
            components[name].eval()
        return components

    @cached_property
    def tokens(self) -> SpecialTokens:
        return SpecialTokens.from_tokenizer(self.components["tokenizer"])
