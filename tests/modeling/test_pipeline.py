"""What callers rely on beyond the golden numbers: shapes, seeds, callbacks, one prefill per prompt."""

import numpy as np
import pytest
import torch
from PIL import Image

STEPS = {"num_inference_steps": 3}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_same_seed_same_image_other_seed_other_image(pipe):
    size = {"height": 32, "width": 48}
    first = pipe("a dot", generator=seeded(1), **size, **STEPS).images[0]
    again = pipe("a dot", generator=seeded(1), **size, **STEPS).images[0]
    other = pipe("a dot", generator=seeded(2), **size, **STEPS).images[0]
    assert first.size == (48, 32)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_size_follows_the_last_reference_and_else_the_largest_square(pipe, pictures):
    edited = pipe("as one", image=[pictures["img_a"], pictures["img_b"]], **STEPS).images[0]
    assert edited.size == pipe.vae_limits.size(*pictures["img_b"].size)
    assert pipe("a dot", **STEPS).images[0].size == (64, 64)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipe, output_type):
    images = pipe(["a", "b"], height=32, width=48, output_type=output_type, **STEPS).images
    if output_type == "pil":
        assert [image.size for image in images] == [(48, 32)] * 2
    else:
        shape = {"np": (2, 32, 48, 3), "pt": (2, 3, 32, 48), "latent": (2, 16, 4, 6)}[output_type]
        assert tuple(images.shape) == shape
    if output_type in ("np", "pt"):
        assert images.min() >= 0 and images.max() <= 1


def test_different_sizes_come_as_lists(pipe, pictures):
    images = pipe(["a", "b"], image=[pictures["img_a"], None], output_type="latent", **STEPS).images
    assert [tuple(image.shape) for image in images] == [(16, 4, 8), (16, 8, 8)]
    images = pipe(["a", "b"], height=[32, 64], width=64, output_type="np", **STEPS).images
    assert [image.shape for image in images] == [(32, 64, 3), (64, 64, 3)]


def test_given_latents_replace_the_sampled_ones(pipe):
    noise = torch.randn(1, 16, 4, 6, generator=seeded(5)[0])
    size = {"height": 32, "width": 48}
    drawn = pipe("a dot", generator=seeded(5), output_type="latent", **size, **STEPS).images
    given = pipe("a dot", latents=noise, output_type="latent", **size, **STEPS).images
    assert torch.equal(drawn, given)


def test_images_of_one_prompt_share_one_reading(pipe, pictures, monkeypatch):
    calls = []
    prefill = pipe.prefill
    monkeypatch.setattr(pipe, "prefill", lambda rows, **k: (calls.append(len(rows)), prefill(rows, **k)))
    arguments = {"image": pictures["img_d"], "output_type": "latent", **STEPS}
    both = pipe("a dot", num_images_per_prompt=2, generator=seeded(1, 2), **arguments).images
    assert calls == [2]  # condition and image-free contexts, in one pass
    alone = pipe("a dot", generator=seeded(1), **arguments).images
    assert both.shape[0] == 2 and not torch.equal(both[0], both[1])
    torch.testing.assert_close(both[:1], alone, atol=3e-4, rtol=0)


def test_callback_sees_and_changes_latents_and_can_stop(pipe):
    seen = []

    def watch(pipeline, step, timestep, given):
        seen.append((step, float(timestep), given["latents"].shape))
        return {"latents": torch.zeros_like(given["latents"])}

    images = pipe("a", height=32, width=32, output_type="latent", callback_on_step_end=watch, **STEPS).images
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] == 1000.0
    assert seen[0][2] == (1, 16, 4, 4)
    assert images.abs().max() == 0

    def stop(pipeline, step, timestep, given):
        seen.append(step)
        pipeline._interrupt = True
        return given

    seen.clear()
    pipe("a", height=32, width=32, callback_on_step_end=stop, **STEPS)
    assert seen == [0]


def test_think_returns_its_plan_and_leaves_the_next_call_alone(pipe):
    arguments = {"height": 32, "width": 32, "generator": seeded(3), "output_type": "latent", **STEPS}
    thought = pipe("a dot", think=True, max_think_tokens=5, **arguments)
    assert len(thought.texts) == 1 and thought.texts[0]
    plain = pipe("a dot", **arguments | {"generator": seeded(3)})
    assert plain.texts is None and not torch.equal(plain.images, thought.images)


def test_sampled_text_follows_its_generator(pipe, pictures):
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12}
    first = pipe.chat("what?", pictures["img_a"], generator=seeded(1), **options)
    again = pipe.chat("what?", pictures["img_a"], generator=seeded(1), **options)
    other = pipe.chat("what?", pictures["img_a"], generator=seeded(2), **options)
    assert first == again != other


def test_chat_in_batches_equals_chat_alone(pipe, pictures):
    questions, images = (
        ["what?", "how many dots are there"],
        [[pictures["img_a"]], [pictures["img_b"], pictures["img_c"]]],
    )
    together = pipe.chat(questions, images, max_new_tokens=10)
    alone = [pipe.chat(q, i, max_new_tokens=10) for q, i in zip(questions, images)]
    assert together == alone and isinstance(alone[0], str)


def test_guidance_off_evaluates_one_row_per_image(pipe, monkeypatch):
    rows = []
    forward = pipe.transformer.forward

    def counting(hidden_states, timestep, sequence, *args, **kwargs):
        rows.append(len(sequence.spans))
        return forward(hidden_states, timestep, sequence, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", counting)
    pipe("a", height=32, width=32, guidance_scale=1.0, **STEPS)
    assert rows == [1, 1, 1, 1]
    rows.clear()
    pipe("a", height=32, width=32, guidance_interval=(0.9, 1.0), **STEPS)  # shifted times 1, 0.857, 0.6
    assert rows == [1, 2, 1, 1]
    rows.clear()
    pipe("a", image=Image.new("RGB", (40, 40)), **STEPS)
    assert rows == [1, 2, 3, 3, 3]  # the picture is read, then the text behind it and without it


def test_tuple_output(pipe):
    images, texts = pipe("a", height=32, width=32, return_dict=False, **STEPS)
    assert len(images) == 1 and texts is None


def test_random_numbers_are_for_condition_latents_then_noise_then_text(pipe, pictures):
    """A sampled plan changes the picture through the plan alone, never through the noise."""
    shapes = []
    draw = type(pipe).sample_noise
    pipe.sample_noise = lambda shape, generator: (shapes.append(shape), draw(pipe, shape, generator))[1]
    generate = pipe._generate_texts
    pipe._generate_texts = lambda *a, **k: (shapes.append("text"), generate(*a, **k))[1]
    try:
        pipe(
            "a", image=[pictures["img_a"], pictures["img_d"]], think=True, max_think_tokens=2, do_sample=True, **STEPS
        )
    finally:
        del pipe.sample_noise, pipe._generate_texts
    assert shapes == [(16, 4, 8), (16, 4, 4), (16, 4, 4), "text"]
