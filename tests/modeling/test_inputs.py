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


def closed_picture() -> Image.Image:
    """A picture whose file was closed before its pixels were read."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(data, "PNG")
    image = Image.open(data)
    image.close()
    return image


REFUSED = {
    "path as reference": ({"prompt": "a", "image": "night.png"}, r"prompt 0 holds a str \('night.png'\)"),
    "paths as references": ({"prompt": ["a", "b"], "image": [None, "b.png"]}, "prompt 1 holds a str"),
    "image alone": ({"image": PICTURE}, "`image` needs a `prompt`"),
    "picture without pixels": ({"prompt": "a", "image": Image.new("RGB", (0, 5))}, "0 x 5 pixels"),
    "picture that was closed": ({"prompt": "a", "image": closed_picture()}, "image 0 of prompt 0 does not decode"),
    "32 bits of grey": ({"prompt": "a", "image": Image.new("I", (40, 40))}, "mode 'I', whose range is unknown"),
    "half a character": ({"prompt": "a \ud800 b"}, "Prompt 0 is not valid Unicode"),
    "interval as a number": (
        {"prompt": "a", "guidance_interval": 0.5},
        r"guidance_interval=0.5 must be \(low, high\)",
    ),
    "interval of words": ({"prompt": "a", "guidance_interval": ("a", "b")}, "guidance_interval="),
    "no temperature": ({"prompt": "a", "think": True, "do_sample": True, "temperature": None}, "temperature=None"),
    "latents as a number": ({"prompt": "a", "latents": 3.0}, "`latents` is a float"),
    "latents that are not finite": (
        {"prompt": "a", "height": 32, "width": 32, "latents": torch.full((1, 16, 4, 4), torch.nan)},
        "image 0 holds values that are not finite",
    ),
    "callback as a word": ({"prompt": "a", "callback_on_step_end": "x"}, "callback_on_step_end is a str"),
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
    "too many references": ({"prompt": "a", "image": [PICTURE] * 5}, "5 reference images.*at most 4"),
    "picture that does not decode": ({"prompt": "a", "image": broken_picture()}, "image 0 of prompt 0 does not"),
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
    "generators": ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    "seed as generator": ({"prompt": "a", "generator": 3}, "holds a int"),
    "latents of another size": (
        {"prompt": "a", "height": 64, "width": 64, "latents": torch.zeros(1, 16, 4, 4)},
        r"\(16, 4, 4\); it must be \(16, 8, 8\)",
    ),
    "latents for another batch": (
        {"prompt": "a", "height": 64, "width": 64, "latents": torch.zeros(2, 16, 8, 8)},
        "2 tensors for 1 images",
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
    from echo4o.modeling.common.image_files import to_rgb

    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (2, 2), (0, 0))
    assert to_rgb(grey).getpixel((0, 0)) == (255, 255, 255)


def test_latents_from_a_callback_keep_their_shape(pipe):
    def scramble(pipeline, step, timestep, given):
        return {"latents": given["latents"].reshape(1, 16, 8, 2)}

    with pytest.raises(ValueError, match=r"\(16, 8, 2\); it must be \(16, 4, 4\)"):
        pipe("a", height=32, width=32, num_inference_steps=2, callback_on_step_end=scramble)


OPTIONS = {
    "limits between entries": ({"vae_image_limits": {"max_size": 250, "min_size": 32}}, "multiples of 16"),
    "limits beyond the table": ({"vision_image_limits": {"max_size": 238, "min_size": 28}}, "<= 224"),
    "half of the limits": ({"vae_image_limits": {"max_size": 256}}, "exactly the keys max_size, min_size"),
    "half of the presets": ({"presets": {"text_to_image": {}}}, "exactly the keys text_to_image, with_references"),
    "references as a word": ({"max_references": "4"}, "max_references='4'"),
    "no think prompt": ({"think_prompts": {"image": "", "text": "a"}}, r"think_prompts\['image'\] is ''"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_impossible_options_are_refused_at_construction(pipe, name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        type(pipe)(**pipe.components, **options)


def test_a_tokenizer_of_another_model_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.tokenizer), "__len__", lambda self: 100_000)
    with pytest.raises(ValueError, match="100000 tokens and the transformer embeds 336"):
        type(pipe)(**pipe.components)


def test_options_are_not_shared_between_pipelines(pipe):
    one, other = type(pipe)(**pipe.components), type(pipe)(**pipe.components)
    one.config.presets["text_to_image"]["guidance_scale"] = 9
    assert other.config.presets["text_to_image"]["guidance_scale"] == 4.0
