"""A golden directory of BLIP3-o, with its checkpoint loaded by our code."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from PIL import Image

from echo4o.modeling.blip3o.original_layout import Blip3oCheckpoint, read_original
from echo4o.modeling.blip3o.pipeline_blip3o import Blip3oPipeline
from echo4o.modeling.blip3o.prompts_blip3o import CAPTION, user_turn

from .. import golden


class GoldenSet(golden.GoldenSet):
    """See [`golden.GoldenSet`]."""

    @cached_property
    def original(self) -> Blip3oCheckpoint:
        return read_original(self.directory / "checkpoint")

    @cached_property
    def pipeline(self) -> Blip3oPipeline:
        """The pipeline of the checkpoint, in float32."""
        pipe = Blip3oPipeline.from_original(self.directory / "checkpoint", dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def new_head(self) -> Any:
        """A second copy of the head, whose weights may change."""
        from echo4o.modeling.blip3o.convert import components_from_original

        others = ("language_model", "vision_model", "unet", "vae", "tokenizer")
        return components_from_original(self.directory / "checkpoint", torch.float32, skip=others)["transformer"]

    def pictures_of_size(self, size: tuple[int, int]) -> list[tuple[str, Image.Image]]:
        """The pictures that Qwen's image processor brings to this (width, height), and their names."""
        found = []
        for path in sorted((self.directory / "inputs").iterdir()):
            picture = self.picture(path.name)
            grid = self.pipeline.image_processor(images=[picture], return_tensors="pt")["image_grid_thw"][0].tolist()
            patch = self.pipeline.image_processor.patch_size
            if (grid[2] * patch, grid[1] * patch) == tuple(size):
                found.append((path.name, picture))
        return found


def caption_of(text: str) -> str | None:
    """The caption in a text with the generation template; None for other texts."""
    before, after = user_turn(CAPTION + "\0").split("\0")
    fits = text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if fits else None


def central_square(picture: Image.Image) -> Image.Image:
    """The largest centred square of a picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
