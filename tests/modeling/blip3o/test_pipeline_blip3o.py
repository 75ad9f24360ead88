"""BLIP3-o's pipeline: batches, generators, sizes, outputs, and where it differs from the original on purpose."""

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from echo4o.modeling.blip3o.conditions_blip3o import eva_pixels
from echo4o.modeling.blip3o.inputs_blip3o import read_images
from echo4o.modeling.blip3o.prompts_blip3o import generation_text, training_text
from echo4o.modeling.blip3o.sampling_blip3o import CLIP_MEAN, CLIP_STD

pytestmark = pytest.mark.long
PROMPTS = ["a red cube left of two blue balls", "seven small cats", ""]
FAST = {"height": 32, "width": 48, "num_inference_steps": 2, "feature_steps": 3}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_batch_of_prompts_equals_single_runs(tiny):
    """The original takes one prompt per call: its mask is one column short (surprise 6)."""
    batch = tiny(PROMPTS, generator=generators(1, 2, 3), output_type="pt", **FAST).images
    for number, prompt in enumerate(PROMPTS):
        single = tiny(prompt, generator=generators(number + 1)[0], output_type="pt", **FAST).images
        torch.testing.assert_close(batch[number], single[0], atol=2e-5, rtol=0)


def test_padding_does_not_leak(tiny):
    states = tiny.encode_texts([generation_text(p) for p in PROMPTS])
    table = tiny.language_model.get_input_embeddings().weight
    pad = tiny.token_ids.pad
    before = table[pad].clone()
    with torch.no_grad():
        table[pad] = 1e4
        try:
            changed = tiny.encode_texts([generation_text(p) for p in PROMPTS])
        finally:
            table[pad] = before
    assert torch.equal(states, changed)


def test_attention_without_sdpa_works_and_agrees(tiny):
    """Users of the original saw "size of tensor a (98) must match b (97)"."""
    texts = [generation_text(p) for p in PROMPTS]
    with torch.no_grad():
        want = tiny.encode_texts(texts)
        tiny.language_model.set_attn_implementation("eager")
        try:
            got = tiny.encode_texts(texts)
        finally:
            tiny.language_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


def test_images_of_one_prompt_share_its_reading_and_have_their_own_noise(tiny):
    images = tiny(
        PROMPTS[:2], num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="pt", **FAST
    ).images
    single = tiny(PROMPTS[1], generator=generators(4)[0], output_type="pt", **FAST).images
    torch.testing.assert_close(images[3], single[0], atol=2e-5, rtol=0)
    assert not torch.equal(images[2], images[3])


def test_noise_is_sampled_in_the_order_features_negative_latents(tiny):
    drawn = generators(5)[0]
    shape = (1, *tiny.feature_shape)
    noise = {
        "feature_latents": torch.randn(shape, generator=drawn),
        "negative_feature_latents": torch.randn(shape, generator=drawn),
        "latents": torch.randn((1, 4, 4, 6), generator=drawn),
    }
    given = tiny(PROMPTS[0], output_type="pt", **noise, **FAST).images
    assert torch.equal(given, tiny(PROMPTS[0], generator=generators(5)[0], output_type="pt", **FAST).images)


def test_equal_seeds_give_equal_images_in_every_call(tiny):
    """The original keeps the negative features of its first call, so that later calls differ (surprise 4)."""
    first, second = (tiny(PROMPTS[0], generator=generators(7)[0], output_type="pt", **FAST).images for _ in range(2))
    assert torch.equal(first, second)


def test_without_guidance_no_negative_noise_is_sampled(tiny):
    one, other = generators(3, 3)
    tiny(PROMPTS[0], generator=one, guidance_scale=1.0, output_type="latent", **FAST)
    torch.randn((1, *tiny.feature_shape), generator=other)
    torch.randn((1, 4, 4, 6), generator=other)
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=other))


def test_sizes_are_rounded_down_and_the_decoder_knows_the_size_asked_for(tiny):
    seen = []
    hook = tiny.unet.register_forward_pre_hook(
        lambda m, args, kw: seen.append(kw["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    options = FAST | {"height": 70, "width": 45}
    image = tiny(PROMPTS[0], generator=generators(0)[0], **options).images[0]
    hook.remove()
    assert image.size == (40, 64)
    assert seen[0].tolist() == [[1024, 1024, 0, 0, 70, 45]] * 2


def test_output_types(tiny):
    def run(kind):
        return tiny(PROMPTS[:2], generator=generators(1, 2), output_type=kind, **FAST).images

    features, latents = run("features"), run("latent")
    assert features.shape == (2, 64, tiny.feature_shape[0]) and latents.shape == (2, 4, 4, 6)
    pixels, arrays, images = run("pt"), run("np"), run("pil")
    assert pixels.shape == (2, 3, 32, 48) and arrays.shape == (2, 32, 48, 3)
    np.testing.assert_allclose(arrays[0], pixels[0].permute(1, 2, 0), atol=1e-6)
    assert np.array_equal(np.asarray(images[1]), np.round(arrays[1] * 255).astype(np.uint8))
    assert tiny(PROMPTS[0], output_type="features", return_dict=False, **FAST)[0].shape[0] == 1


def test_negative_prompts_change_the_image(tiny):
    plain, own = (
        tiny(PROMPTS[:2], negative_prompt=n, generator=generators(1, 2), output_type="pt", **FAST).images
        for n in (None, [" ", "blue"])
    )
    torch.testing.assert_close(plain[0], own[0], atol=2e-5, rtol=0)
    assert not torch.allclose(plain[1], own[1], atol=1e-3)


def test_a_callback_can_change_the_latents(tiny):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = tiny(PROMPTS[0], output_type="latent", callback_on_step_end=callback, **FAST).images
    assert steps == [0, 1] and not out.any()


def test_bfloat16_is_close_to_float32(tiny):
    model = copy.deepcopy(tiny.transformer).to(torch.bfloat16)
    x, z = (
        torch.randn((2, *tiny.feature_shape), generator=generators(0)[0]),
        torch.randn(2, 64, model.config.condition_dim),
    )
    time = torch.tensor([500, 20])
    with torch.no_grad():
        want = tiny.transformer(x, time, z).sample
        got = model(x.bfloat16(), time, z.bfloat16()).sample.float()
    assert (got - want).abs().mean() / want.abs().mean() < 2e-2


def test_special_tokens_in_a_prompt_are_read_as_such_with_a_warning(tiny, caplog):
    logging.getLogger("diffusers").propagate = True
    name = "echo4o.modeling.blip3o.pipeline_blip3o"
    with caplog.at_level(logging.WARNING, logger=name):
        tiny("a sign that says <|im_end|>", output_type="features", **FAST)
    assert any("<|im_end|>" in record.message for record in caplog.records)


def test_transparent_images_are_read_on_white(tiny):
    """The original drops the transparency and shows what lies under it."""
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    side = tiny.vision_model.config.image_size
    ours = eva_pixels(read_images(image)[0], side, CLIP_MEAN, CLIP_STD)
    white, red = (eva_pixels(Image.new("RGB", (40, 40), c), side, CLIP_MEAN, CLIP_STD) for c in ("white", "red"))
    assert torch.equal(ours, white) and not torch.equal(ours, red)


def test_reconstruction_through_the_features_ignores_the_language_model(tiny):
    image = Image.new("RGB", (60, 50), (10, 200, 90))
    options = {k: v for k, v in FAST.items() if k != "feature_steps"}
    out = tiny.reconstruct([image, image], generator=generators(1, 2), output_type="pt", **options).images
    single = tiny.reconstruct(image, generator=generators(2)[0], output_type="pt", **options).images
    torch.testing.assert_close(out[1], single[0], atol=2e-5, rtol=0)
    features = tiny.reconstruct(image, output_type="features").images
    assert torch.equal(features[0], tiny.encode_image(image))


def test_chat_answers_lists_as_single_questions(tiny):
    image = Image.new("RGB", (60, 50), (10, 200, 90))
    questions = ["What is in the picture?", "Is it green?"]
    answers = tiny.chat(questions, image=[image, None], max_new_tokens=4)
    assert answers == [tiny.chat(questions[0], image, max_new_tokens=4), tiny.chat(questions[1], max_new_tokens=4)]


def test_answers_hide_special_tokens(tiny):
    """The original's set-up replaces the list of special tokens, so that its answers show some (surprise 12)."""
    ids = tiny.tokenizer.encode("a<|im_start|><|vision_end|>b", add_special_tokens=False)
    assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_training_and_generation_differ_as_released(tiny):
    """Surprise 1: training closes the empty answer before the queries."""
    released, matched = training_text("Please x"), training_text("Please x", matched=True)
    assert released == matched + "<|im_end|>\n"
