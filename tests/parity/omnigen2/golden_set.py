"""A golden directory of OmniGen2, with its checkpoint loaded by our code."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline

from .. import golden


class GoldenSet(golden.GoldenSet):
    """See [`golden.GoldenSet`]."""

    @cached_property
    def components(self) -> dict[str, Any]:
        """The components of the checkpoint in float32."""
        components = OmniGen2Pipeline.conversion().components_from_original(
            self.directory / "checkpoint", dtype=torch.float32
        )
        for name in ("transformer", "vae", "mllm"):
            components[name].eval()
        return components

    @cached_property
    def pipe(self) -> OmniGen2Pipeline:
        pipe = OmniGen2Pipeline(**self.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def reference(self, index: int):
        return self.picture(f"ref{index}.png")
