"""Invalid arguments of BLIP3-o's pipeline are errors before any computation."""

import pytest
import torch
from PIL import Image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt=3"),
        ({"prompt": []}, "prompt="),
        ({"prompt": "a", "height": 0}, "height=0"),
        ({"prompt": "a", "height": 4}, "the smallest side"),
        ({"prompt": "a", "num_inference_steps": 1.5}, "num_inference_steps=1.5"),
        ({"prompt": "a", "feature_steps": 0}, "feature_steps=0"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale=-1"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type='jpg'"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, "negative_prompt has 2"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "generator is a list of 2"),
        ({"prompt": "a", "generator": 3}, "generator is a int"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 3, 3)}, "latents is"),
        ({"prompt": "a", "feature_latents": torch.full((1, 24, 8, 8), float("nan"))}, "NaN"),
        ({"prompt": "a", "crops_coords_top_left": (1,)}, "crops_coords_top_left"),
        ({"prompt": "a", "callback_on_step_end": 1}, "callback_on_step_end"),
    ],
)
def test_invalid_arguments_are_errors_that_name_the_value(tiny, arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        tiny(**{"height": 32, "width": 48} | arguments)


def test_invalid_images_and_ways_are_errors(tiny):
    with pytest.raises(ValueError, match="through='eyes'"):
        tiny.reconstruct(Image.new("RGB", (8, 8)), through="eyes")
    with pytest.raises(ValueError, match="image is a str"):
        tiny.reconstruct("cat.png")
    with pytest.raises(ValueError, match="stands for images"):
        tiny.chat("What is <|image_pad|>?")
    with pytest.raises(ValueError, match="one entry for each"):
        tiny.chat(["a", "b"], image=[None])
