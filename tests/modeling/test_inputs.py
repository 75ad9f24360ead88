"""Whatever cannot be honoured is refused before any work, in one sentence that names value, place and what is allowed."""

import io

import pytest
import torch
from PIL import Image

PICTURE = Image.new("RGB", (40, 40), "red")


def broken_picture() -> Image.Image:
    """A PNG whose data ends early: PIL opens it and fails when the pixels are read."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(data, "PNG")
    return Image.open(io.BytesIO(data.getvalue()[:700]))


REFUSED = {
    "nothing": ({}, "Give either `prompt`.*neither"),
    "prompt and inputs": ({"prompt": "a", "inputs": ["a"]}, "got both"),
    "image with inputs": ({"inputs": ["a"], "image": PICTURE}, "belongs to `prompt`"),
    "empty prompt": ({"prompt": ""}, "Prompt 0 has an empty text"),
    "blank prompt in a list": ({"prompt": ["a", "  "]}, "Prompt 1 has an empty text"),
    "no prompts": ({"prompt": []}, "non-empty list"),
    "empty inputs": ({"inputs": []}, "non-empty list"),
    "mixed inputs": ({"inputs": ["a", ["b"]]}, "mixes lists with items"),
    "number as prompt": ({"prompt": ["a", 3]}, "Prompt 1 has a int"),
    "path as picture": ({"inputs": ["a", b"x.png"]}, "Prompt 0 has a bytes"),
    "fewer references than prompts": ({"prompt": ["a", "b"], "image": [[PICTURE]]}, "2 prompts but `image` has 1"),
    "one picture for two prompts": ({"prompt": ["a", "b"], "image": PICTURE}, "2 prompts but `image` has one Image"),
    "too many references": ({"prompt": "a", "image": [PICTURE] * 5}, "5 reference pictures.*at most 4"),
    "picture that does not decode": ({"prompt": "a", "image": broken_picture()}, "picture 0 of prompt 0 does not"),
    "odd height": ({"prompt": "a", "height": 100}, "height=100.*multiples of 16 from 16 to 256"),
    "beyond the table": ({"prompt": "a", "width": 272}, "width=272.*to 256"),
    "float size": ({"prompt": "a", "width": 64.0}, "width=64.0"),
    "two sizes for one prompt": ({"prompt": "a", "height": [64, 64]}, "2 sizes for 1 prompts"),
    "image guidance without picture": ({"prompt": "a", "image_guidance_scale": 2.0}, "prompt 0 has none.*cannot be"),
    "image guidance alone": (
        {"prompt": "a", "image": PICTURE, "image_guidance_scale": 2.0, "guidance_scale": 1.0},
        "has no effect with guidance_scale=1.0",
    ),
    "negative guidance": ({"prompt": "a", "guidance_scale": -1.0}, "guidance_scale=-1.0.*at least 0"),
    "infinite guidance": ({"prompt": "a", "guidance_scale": float("inf")}, "finite"),
    "interval upside down": ({"prompt": "a", "guidance_interval": (0.9, 0.1)}, "low < high"),
    "unknown renormalisation": ({"prompt": "a", "guidance_renorm": "local"}, "'local' must be one of global, channel"),
    "renorm floor": ({"prompt": "a", "guidance_renorm_min": 1.5}, r"1.5 must lie in \[0, 1\]"),
    "no steps": ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps=0.*at least 1"),
    "half a picture": ({"prompt": "a", "num_images_per_prompt": 0.5}, "num_images_per_prompt=0.5"),
    "no think tokens": ({"prompt": "a", "think": True, "max_think_tokens": 0}, "max_think_tokens=0"),
    "cold sampling": ({"prompt": "a", "think": True, "do_sample": True, "temperature": 0.0}, "temperature=0.0"),
    "output type": ({"prompt": "a", "output_type": "jpeg"}, "'jpeg' must be one of pil, np, pt, latent"),
    "generators": ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
    "seed as generator": ({"prompt": "a", "generator": 3}, "holds a int"),
    "latents of another size": (
        {"prompt": "a", "height": 64, "width": 64, "latents": torch.zeros(1, 16, 4, 4)},
        r"\(16, 4, 4\); it must be \(16, 8, 8\)",
    ),
    "latents for another batch": (
        {"prompt": "a", "height": 64, "width": 64, "latents": torch.zeros(2, 16, 8, 8)},
        "2 noises for 1 pictures",
    ),
    "callback tensors": (
        {"prompt": "a", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        r"\['prompt_embeds'\]; known are \['latents'\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(pipe, monkeypatch, name):
    arguments, message = REFUSED[name]
    for component in (pipe.transformer, pipe.vision_model, pipe.vae.encoder):
        monkeypatch.setattr(component, "forward", lambda *a, **k: pytest.fail("work was done before the check"))
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_chat_refuses_too(pipe):
    with pytest.raises(ValueError, match="Prompt 0 has an empty text"):
        pipe.chat("")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        pipe.chat("a", max_new_tokens=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda_is_named(pipe):
    with pytest.raises(ValueError, match="(?i)cuda"):
        pipe.to("cuda")


def test_transparency_becomes_white(pipe):
    from echo4o.modeling.bagel.image_processor_bagel import to_rgb

    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
