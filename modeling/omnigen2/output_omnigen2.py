"""What a call of the pipeline returns."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.outputs import BaseOutput
from PIL import Image


@dataclass
class OmniGen2PipelineOutput(BaseOutput):
    """Result of a call.

    Args:
        images: in the order of the prompts, those of one prompt side by side: a list of PIL images, or for other
            output types an array (B, H, W, 3) or a tensor (B, C, H, W), or a list of such if sizes differ. None if
            [`OmniGen2Pipeline.respond`] only answered.
        texts: the answers of [`OmniGen2Pipeline.respond`]; None from a call.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor | list | None
    texts: list[str] | None
